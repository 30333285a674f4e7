"""Reading a `FlightInfo`: every endpoint, in parallel, each from a location that answers.

`read` gives a `pyarrow.RecordBatchReader`, `read_batches` the iterator beneath it. Here are
the calls to servers; what to decide about an endpoint is in `_endpoints.py`, threads and
bounds are in `_fetch.py`. Nothing is cached here and no client is ever closed.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import pyarrow as pa
from pyarrow import flight

from ._buffer import interrupted, no_schema
from ._checks import check_count
from ._endpoints import (
    Place,
    SchemaMismatchError,
    check_schema,
    described,
    endpoint_name,
    has_expired,
    in_order_of_trial,
    is_connection_failure,
    most_telling,
    places_of,
    renewal_of,
    renewed_endpoint,
)
from ._errors import ResolverError
from ._fetch import Fetch
from ._resolver import default_channel_resolver
from ._urls import parse_worker_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ._resolver import ChannelResolver

CALL_ERRORS: Final = (flight.FlightError, pa.ArrowException, OSError, ResolverError)
_MAX_COUNT: Final = 10_000


def read(
    info: flight.FlightInfo | flight.FlightDescriptor,
    resolver: ChannelResolver | None = None,
    *,
    url: Any = None,
    concurrency: int = 8,
    prefetch: int = 8,
    timeout: float | None = None,
    answer_timeout: float | None = None,
    allow: Callable[[str], bool] | None = None,
) -> pa.RecordBatchReader:
    """Read all endpoints of `info` in parallel, as one `pyarrow.RecordBatchReader`.

    ``info``
        A `FlightInfo`, or a `FlightDescriptor` for which ``url`` is asked.
    ``resolver``
        Gives the client of each location; `default_channel_resolver()` when it is None.
    ``url``
        The worker that the info came from: asked for a descriptor's info, for endpoints
        without locations or with ``arrow-flight-reuse-connection://?``, and for renewals.
    ``concurrency``
        Endpoints fetched at a time, each on a thread.
    ``prefetch``
        Batches that may wait for the reader. In all, at most ``prefetch + concurrency + 1``
        are in memory, whatever the result's size; beyond that servers are made to wait.
    ``timeout``
        Seconds that one call may take, a `do_get` from its start to its last batch, so a
        slow reader needs a long one; None: no limit.
    ``answer_timeout``
        Seconds within which a location has to give its first batch, if there is any; else it
        is left for the endpoint's next one. None: it is left when its call fails.
    ``allow``
        Called with the canonical URL of each location, on a fetching thread; those for
        which it returns false are not used. Locations are what a *server* wrote, and the
        connector sends its headers and tokens to them: give this where you do not trust
        every server with the addresses of the others.

    Batches come in the order of the endpoints when the info is ordered, else as they
    arrive. Application metadata is dropped. Nothing is fetched before the first batch is
    asked for, except when the info has no schema.

    Closing the reader, dropping it, or an error cancels every stream; a thread that waits
    for a server's very first word ends with the call, at the latest after ``timeout``.

    Raises what getting the info raises; TypeError and ValueError for arguments that make no
    sense. While reading, a failure is an OSError, or an ArrowInvalid (ValueError) for a
    schema that differs: pyarrow hands on the words of an error but not its class. Use
    `read_batches` where the class matters. The reader is for one thread at a time.
    """
    batches = read_batches(
        info,
        resolver,
        url=url,
        concurrency=concurrency,
        prefetch=prefetch,
        timeout=timeout,
        answer_timeout=answer_timeout,
        allow=allow,
    )
    # Closing a reader made of an iterator does nothing; one made of a C stream lets go of
    # the stream, and with it of the iterator.
    inner = pa.RecordBatchReader.from_batches(batches.schema, _InWords(batches))
    return pa.RecordBatchReader.from_stream(inner)


def read_batches(
    info: flight.FlightInfo | flight.FlightDescriptor,
    resolver: ChannelResolver | None = None,
    *,
    url: Any = None,
    concurrency: int = 8,
    prefetch: int = 8,
    timeout: float | None = None,
    answer_timeout: float | None = None,
    allow: Callable[[str], bool] | None = None,
) -> FlightBatches:
    """Like `read`, as an iterator of `pyarrow.RecordBatch` that raises errors as they are.

    While reading, that is what the server's Flight client raised (`FlightError`),
    `WorkerConnectError` for a location that cannot be reached, ResolverError for an endpoint
    without a usable location, or its subclass (a ValueError) for a schema that differs.
    Notes on the exception name the endpoint and what its other locations said.
    """
    check_arguments(concurrency, prefetch, timeout, answer_timeout, allow)
    if resolver is None:
        resolver = default_channel_resolver()
    origin = None if url is None else parse_worker_url(url).key
    calls = _Calls(resolver, origin, timeout, answer_timeout, allow)
    if isinstance(info, flight.FlightDescriptor):
        info = calls.get_info(info)
    check_info(info)
    calls.endpoints = list(info.endpoints)
    calls.schema = info.schema
    fetch = Fetch(
        calls.fetch_endpoint,
        len(calls.endpoints),
        ordered=bool(info.ordered),
        concurrency=concurrency,
        prefetch=prefetch,
    )
    return FlightBatches(info, fetch)


class FlightBatches:
    """The batches of a `FlightInfo`, as `read_batches` fetches them.

    An iterator and a context manager, for one thread at a time; `close` is for any thread.
    Dropping it closes it.
    """

    def __init__(self, info: flight.FlightInfo, fetch: Fetch) -> None:
        self._info = info
        self._fetch = fetch
        # Also run before the interpreter ends, while its threads can still hear of it.
        self._closing = weakref.finalize(self, fetch.stop)

    @property
    def info(self) -> flight.FlightInfo:
        """What is read: the info given, or the one that the server gave."""
        return self._info

    @property
    def schema(self) -> pa.Schema:
        """The info's schema; where it has none, that of the endpoint that answers first."""
        schema = self._info.schema
        if schema is None:
            schema = self._asked(self._fetch.schema)
        if schema is None:
            raise no_schema(is_closed=self._fetch.is_stopped)
        return schema

    @property
    def peak_waiting(self) -> int:
        """The most batches that ever waited for the reader at once."""
        return self._fetch.peak

    def close(self) -> None:
        """Cancel every stream and end the iteration; idempotent. Waits for nothing."""
        self._closing()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> pa.RecordBatch:
        batch = self._asked(self._fetch.take)
        if batch is None:
            raise StopIteration
        return batch

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except BaseException:
            self._fetch.fail(interrupted())  # unless it is that it failed
            self.close()  # else the finalizer keeps the error, whose frames keep this
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class Agreeing(Protocol):
    """Where the schema is settled that all endpoints must have."""

    def agree(self, schema: Any) -> Any:
        """The schema that counts."""
        ...


class EndpointCalls:
    """What is known while the endpoints of one info are read; blocking or not."""

    def __init__(
        self,
        resolver: Any,
        origin: str | None,
        timeout: float | None,
        answer_timeout: float | None,
        allow: Callable[[str], bool] | None,
    ) -> None:
        self.endpoints: list[flight.FlightEndpoint] = []
        self.schema: pa.Schema | None = None
        self.resolver = resolver
        self.origin = origin
        self.timeout = timeout
        self.answer_timeout = answer_timeout
        # A location that failed once is the last to be tried for the endpoints that follow.
        # (One in the resolver's own failure memory is refused there at no cost.)
        self.failed: set[Place] = set()
        self._allow = allow

    def to_try(self, endpoint: flight.FlightEndpoint, name: str) -> Iterable[Place]:
        """Where to read an endpoint, in order."""
        places = places_of(endpoint, name=name, origin=self.origin, allow=self._allow)
        return in_order_of_trial(places, self.failed)

    def name(self, index: int) -> str:
        return endpoint_name(index, len(self.endpoints))

    def shown(self, place: Place) -> str:
        """The URL of a place."""
        return place if place is not None else self.origin or ""

    def check_schema(self, actual: pa.Schema, fetch: Agreeing, name: str, place: Place) -> None:
        """Raise unless all endpoints have one schema."""
        expected = fetch.agree(actual) if self.schema is None else self.schema
        check_schema(expected, actual, name=name, url=self.shown(place))

    @contextlib.contextmanager
    def invalidating(self, place: Place, client: Any) -> Iterator[None]:
        """Have the resolver forget this very client should its connection fail."""
        try:
            yield
        except flight.FlightUnavailableError as error:
            invalidate = getattr(self.resolver, "invalidate", None)
            if is_connection_failure(error) and invalidate is not None:
                with contextlib.suppress(ResolverError):  # closed meanwhile
                    invalidate(self.shown(place), client)
            raise

    def note(self, error: Exception, name: str, place: Place, remark: str) -> None:
        """Say on an error what it was that failed."""
        self.failed.add(place)
        error.add_note(f"{name}, from {self.shown(place)}{remark}")


class _Calls(EndpointCalls):
    """The calls that reading takes; shared by the fetching threads."""

    def get_info(self, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        if self.origin is None:
            raise TypeError("to read a descriptor, pass the url= of the worker to ask")
        client = self._client(None)
        with self.invalidating(None, client):
            return client.get_flight_info(descriptor, **self._options(client))

    def fetch_endpoint(self, index: int, fetch: Fetch) -> None:
        """Read one endpoint from the first of its locations that answers."""
        name = self.name(index)
        endpoint, remark = self._renewed(self.endpoints[index])
        errors: list[Exception] = []
        for place in self.to_try(endpoint, name):
            fetch.check_running()
            begun = False
            try:
                client = self._client(place)
                with self.invalidating(place, client):
                    call = partial(client.do_get, endpoint.ticket, **self._options(client))
                    stream, chunks = self._begun(call, fetch)
                    with fetch.opened(stream):
                        self.check_schema(stream.schema, fetch, name, place)
                        for chunk in chunks:
                            if chunk.data is not None:  # else it is metadata alone
                                begun = True
                                fetch.put(index, chunk.data)
                return  # noqa: TRY300 -- read to its end
            except CALL_ERRORS as error:
                self.note(error, name, place, remark)
                # After the first batch, another location would give some rows twice.
                if begun or isinstance(error, SchemaMismatchError):
                    raise
                errors.append(error)
        try:
            raise most_telling(errors)
        finally:
            errors.clear()  # or it, the tracebacks and this frame form a cycle

    def _begun(self, call: Callable[[], Any], fetch: Fetch) -> tuple[Any, Iterable[Any]]:
        """The stream that `call` opens, and its chunks; the first within ``answer_timeout``."""
        if self.answer_timeout is None:
            stream = call()
            return stream, stream
        begun = fetch.first_within(self.answer_timeout, call)
        if begun is None:
            raise unanswered(self.answer_timeout)
        stream, first = begun
        return stream, () if first is None else chain([first], stream)

    def _renewed(self, endpoint: flight.FlightEndpoint) -> tuple[flight.FlightEndpoint, str]:
        """The endpoint to read, and what to say of it should that fail."""
        if not has_expired(endpoint, time.time_ns()):
            return endpoint, ""
        if self.origin is None:
            return endpoint, "; it has expired, and without url= nobody can be asked to renew it"
        try:
            client = self._client(None)
            with self.invalidating(None, client):
                results = client.do_action(renewal_of(endpoint), **self._options(client))
                return renewed_endpoint(results), ""
        except CALL_ERRORS as error:
            # A server need not renew, and may serve what it called expired.
            return endpoint, f"; it has expired and was not renewed ({described(error)})"

    def _client(self, place: Place) -> Any:
        return self.resolver.get_flight_client_for_url(self.shown(place))

    def _options(self, client: Any) -> dict[str, Any]:
        from ._grpc_client import FlightServiceClient  # noqa: PLC0415 -- most never read so

        if isinstance(client, FlightServiceClient):
            return {"timeout": self.timeout}
        return {"options": flight.FlightCallOptions(timeout=self.timeout)}


class _InWords:
    """`batches`, with errors that keep their meaning where only a message is handed on.

    No generator: that would end after an error, as if what came before it were all.
    """

    def __init__(self, batches: FlightBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except ValueError as error:
            raise ValueError(described(error)) from error
        except Exception as error:
            raise OSError(described(error)) from error


def unanswered(seconds: float) -> flight.FlightTimedOutError:
    """What is said of a location that was left."""
    return flight.FlightTimedOutError(f"It gave no batch within {seconds:g} s (answer_timeout)")


def check_arguments(
    concurrency: Any, prefetch: Any, timeout: Any, answer_timeout: Any, allow: Any
) -> None:
    """Raise TypeError or ValueError for what makes no sense."""
    check_count("concurrency", concurrency, at_most=_MAX_COUNT)
    check_count("prefetch", prefetch, at_most=_MAX_COUNT)
    _check_timeout("timeout", timeout)
    _check_timeout("answer_timeout", answer_timeout)
    if allow is not None and not callable(allow):
        raise TypeError("allow is a function from a URL to a bool")


def check_info(info: Any) -> None:
    """Raise TypeError for what is no `FlightInfo`."""
    if not isinstance(info, flight.FlightInfo):
        raise TypeError(f"read takes a FlightInfo or a FlightDescriptor, not {type(info).__name__}")


def _check_timeout(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds or None, not {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name} is more than 0 seconds; None means no limit")
