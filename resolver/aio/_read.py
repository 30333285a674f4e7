"""Reads a ``FlightInfo`` in asyncio: all endpoints in parallel, each from whoever answers first.

What a location means, which is tried when, and what the errors say is `resolver._read`'s and
`resolver._endpoints`' business; here are the calls.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
from pyarrow import flight

from resolver._buffer import interrupted, no_schema
from resolver._endpoints import (
    SchemaMismatchError,
    described,
    has_expired,
    most_telling,
    renewal_of,
    renewed_endpoint,
)
from resolver._read import CALL_ERRORS, EndpointCalls, check_arguments, check_info, unanswered
from resolver._urls import parse_worker_url

from ._fetch import Fetch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from resolver._endpoints import Place

    from ._resolver import ChannelResolver

__all__ = ["FlightBatches", "read"]


async def read(
    info: flight.FlightInfo | flight.FlightDescriptor,
    resolver: ChannelResolver,
    *,
    url: Any = None,
    concurrency: int = 8,
    prefetch: int = 8,
    timeout: float | None = None,  # noqa: ASYNC109 -- of each call, not of this one
    answer_timeout: float | None = None,
    allow: Callable[[str], bool] | None = None,
) -> FlightBatches:
    """All endpoints of `info`, fetched in parallel, as an asynchronous iterator of batches.

    ``info``
        A `FlightInfo`, or a `FlightDescriptor` for which ``url`` is asked.
    ``resolver``
        Gives the client of each location.
    ``url``
        The worker that the info came from: asked for a descriptor's info, for endpoints
        without locations or with ``arrow-flight-reuse-connection://?``, and for renewals.
    ``concurrency``
        Endpoints fetched at a time, each in a task.
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
        Called with the canonical URL of each location; those for which it returns false are
        not used. Locations are what a *server* wrote, and the connector sends its headers and
        tokens to them: give this where you do not trust every server with the others'.

    Batches come in the order of the endpoints when the info is ordered, else as they arrive.
    Application metadata is dropped. Nothing is fetched before the first batch is asked for.

    Raises what getting the info raises; TypeError and ValueError for arguments that make no
    sense. While reading: what the client raised (`FlightError`), `WorkerConnectError` for a
    location that cannot be reached, ResolverError for an endpoint without a usable location,
    or its subclass (a ValueError) for a schema that differs. Notes on the exception name the
    endpoint and what its other locations said.
    """
    check_arguments(concurrency, prefetch, timeout, answer_timeout, allow)
    origin = None if url is None else parse_worker_url(url).key
    calls = _Calls(resolver, origin, timeout, answer_timeout, allow)
    if isinstance(info, flight.FlightDescriptor):
        info = await calls.get_info(info)
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
    """The batches of a `FlightInfo`, as `read` fetches them.

    An asynchronous iterator and context manager, for one task at a time, on its own event
    loop. Dropping it, an error, or cancelling who reads cancels every stream.
    """

    def __init__(self, info: flight.FlightInfo, fetch: Fetch) -> None:
        self._info = info
        self._fetch = fetch
        self._abandoning = weakref.finalize(self, fetch.abandon)
        self._abandoning.atexit = False  # the loop is gone by then

    @property
    def info(self) -> flight.FlightInfo:
        """What is read: the info given, or the one that the server gave."""
        return self._info

    async def read_schema(self) -> pa.Schema:
        """The info's schema; where it has none, that of the endpoint that answers first."""
        schema = self._info.schema
        if schema is None:
            schema = await self._asked(self._fetch.schema)
        if schema is None:
            raise no_schema(is_closed=self._fetch.is_stopped)
        return schema

    async def read_all(self) -> pa.Table:
        """Everything that is left, as one table; all of it is in memory then."""
        schema = await self.read_schema()
        return pa.Table.from_batches([batch async for batch in self], schema)

    @property
    def peak_waiting(self) -> int:
        """The most batches that ever waited for the reader at once."""
        return self._fetch.peak

    async def aclose(self) -> None:
        """Cancel every stream, end the iteration, and wait until all have ended; idempotent."""
        await self._fetch.stop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pa.RecordBatch:
        batch = await self._asked(self._fetch.take)
        if batch is None:
            raise StopAsyncIteration
        return batch

    async def _asked(self, question: Callable[[], Awaitable[Any]]) -> Any:
        self._fetch.check()
        try:
            return await question()
        except BaseException:
            self._fetch.fail(interrupted())  # unless it is that it failed
            self._abandoning.detach()  # it keeps the error, whose frames keep this
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()


class _Calls(EndpointCalls):
    """The calls that reading takes; shared by the fetching tasks."""

    async def get_info(self, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        if self.origin is None:
            raise TypeError("to read a descriptor, pass the url= of the worker to ask")
        client = await self._client(None)
        with self.invalidating(None, client):
            return await client.get_flight_info(descriptor, timeout=self.timeout)

    async def fetch_endpoint(self, index: int, fetch: Fetch) -> None:
        """Read one endpoint from the first of its locations that answers."""
        name = self.name(index)
        endpoint, remark = await self._renewed(self.endpoints[index])
        errors: list[Exception] = []
        for place in self.to_try(endpoint, name):
            begun = False
            try:
                client = await self._client(place)
                with self.invalidating(place, client):
                    stream, chunk = await self._begun(client, endpoint.ticket)
                    try:
                        self.check_schema(stream.schema, fetch, name, place)
                        if self.answer_timeout is None:
                            chunk = await anext(stream, None)
                        while chunk is not None:
                            if chunk.data is not None:  # else it is metadata alone
                                begun = True
                                await fetch.put(index, chunk.data)
                            chunk = await anext(stream, None)
                    finally:
                        stream.cancel()  # of one that has ended, nothing
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

    async def _begun(self, client: Any, ticket: flight.Ticket) -> tuple[Any, Any]:
        """The stream and, with ``answer_timeout``, its first chunk; None where it is empty."""
        if self.answer_timeout is None:
            return await client.do_get(ticket, timeout=self.timeout), None
        stream = None
        try:
            async with asyncio.timeout(self.answer_timeout) as limit:
                stream = await client.do_get(ticket, timeout=self.timeout)
                return stream, await anext(stream, None)
        except BaseException as error:
            if stream is not None:
                stream.cancel()
            if isinstance(error, TimeoutError) and limit.expired():
                raise unanswered(self.answer_timeout) from None
            raise

    async def _renewed(self, endpoint: flight.FlightEndpoint) -> tuple[flight.FlightEndpoint, str]:
        """The endpoint to read, and what to say of it should that fail."""
        if not has_expired(endpoint, time.time_ns()):
            return endpoint, ""
        if self.origin is None:
            return endpoint, "; it has expired, and without url= nobody can be asked to renew it"
        try:
            client = await self._client(None)
            with self.invalidating(None, client):
                answers = client.do_action(renewal_of(endpoint), timeout=self.timeout)
                answer = await anext(answers, None)  # as the blocking twin: no more than one
                return renewed_endpoint([] if answer is None else [answer]), ""
        except CALL_ERRORS as error:
            # A server need not renew, and may serve what it called expired.
            return endpoint, f"; it has expired and was not renewed ({described(error)})"

    async def _client(self, place: Place) -> Any:
        return await self.resolver.get_flight_client_for_url(self.shown(place))
