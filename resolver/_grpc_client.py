"""The Flight service over a grpcio channel, blocking, with pyarrow's types at its edge.

For users of interceptors, service config, channelz and the like. How a channel is made is
``_grpc.py``'s business; grpc is not imported here but by whoever made the channel.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import deque
from functools import partial
from operator import attrgetter, is_not
from typing import TYPE_CHECKING, Any, Final, Self

import pyarrow as pa
from pyarrow import flight

from ._background import discard
from ._flight_batches import BatchDecoder, BatchEncoder, FlightStreamChunk, metadata_only
from ._flight_calls import (
    METHODS,
    as_flight_error,
    as_metadata,
    bearer_of,
    stub,
    with_basic_authorization,
)
from ._shared_errors import without_traceback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from . import _flight_wire as wire

__all__ = [
    "FlightMetadataReader",
    "FlightServiceClient",
    "FlightStreamReader",
    "FlightStreamWriter",
]

_is_there = partial(is_not, None)
_AHEAD: Final = 2  # encoded messages that wait for the network, at most


class FlightServiceClient:
    """The calls of the Flight service. Thread-safe; made by a connector or from a channel.

    Every call takes ``timeout``, in seconds for the whole call (``None``: no limit), and
    ``headers``, a mapping or pairs. Errors are those of pyarrow's own client.

    A stream keeps its channel open, so it lives on when the client is closed or dropped.
    """

    def __init__(self, channel: Any, *, close: Callable[[], object] | None = None) -> None:
        self._channel: _Channel | None = _Channel(channel, close)
        self._stubs: dict[str, Any] = {name: stub(channel, name) for name in METHODS}

    def handshake(
        self, payload: bytes = b"", *, timeout: float | None = None, headers: Any = None
    ) -> list[bytes]:
        """What the server answers to one message of a handshake."""
        return list(self._stream("handshake", iter([payload]), timeout, headers))

    def authenticate_basic_token(
        self, username: str, password: str, *, timeout: float | None = None, headers: Any = None
    ) -> tuple[bytes, bytes]:
        """The header, name and value, with the token that the server gives for a password.

        For the ``headers`` of later calls. Raises ``FlightUnauthenticatedError`` when the
        server gives none.
        """
        given = with_basic_authorization(headers, username, password)
        messages = self._stream("handshake", iter(()), timeout, given)
        metadata = messages.metadata("handshake")
        for _ in messages:
            pass
        return bearer_of(*(read() for read in metadata))

    def list_flights(
        self, criteria: bytes = b"", *, timeout: float | None = None, headers: Any = None
    ) -> Iterator[flight.FlightInfo]:
        """The flights that the server has for ``criteria``, as they come."""
        return self._stream("list_flights", criteria, timeout, headers)

    def get_flight_info(
        self,
        descriptor: flight.FlightDescriptor,
        *,
        timeout: float | None = None,
        headers: Any = None,
    ) -> flight.FlightInfo:
        """Where the data of ``descriptor`` is."""
        return self._unary("get_flight_info", descriptor, timeout, headers)

    def poll_flight_info(
        self,
        descriptor: flight.FlightDescriptor,
        *,
        timeout: float | None = None,
        headers: Any = None,
    ) -> wire.PollInfo:
        """Where the data is so far, of a query that may still run."""
        info: wire.PollInfo = self._unary("poll_flight_info", descriptor, timeout, headers)
        return info

    def get_schema(
        self,
        descriptor: flight.FlightDescriptor,
        *,
        timeout: float | None = None,
        headers: Any = None,
    ) -> flight.SchemaResult:
        """The schema of the data of ``descriptor``."""
        return self._unary("get_schema", descriptor, timeout, headers)

    def do_get(
        self,
        ticket: flight.Ticket,
        *,
        timeout: float | None = None,
        headers: Any = None,
        read_options: pa.ipc.IpcReadOptions | None = None,
    ) -> FlightStreamReader:
        """The batches of ``ticket``. Fails here if the server refuses at once."""
        messages = self._stream("do_get", ticket, timeout, headers)
        return FlightStreamReader(messages, read_options).begun()

    def do_put(
        self,
        descriptor: flight.FlightDescriptor,
        schema: pa.Schema,
        *,
        timeout: float | None = None,
        headers: Any = None,
        write_options: pa.ipc.IpcWriteOptions | None = None,
    ) -> tuple[FlightStreamWriter, FlightMetadataReader]:
        """A writer of batches, and a reader of what the server says meanwhile.

        Close the writer to know that everything arrived.
        """
        requests = _Requests()
        messages = self._stream("do_put", requests, timeout, headers)
        reader = FlightMetadataReader(messages)
        messages.read_by(reader)
        writer = FlightStreamWriter(requests, messages, descriptor, write_options)
        writer.begin(schema)
        return writer, reader

    def do_exchange(
        self,
        descriptor: flight.FlightDescriptor,
        *,
        timeout: float | None = None,
        headers: Any = None,
        read_options: pa.ipc.IpcReadOptions | None = None,
        write_options: pa.ipc.IpcWriteOptions | None = None,
    ) -> tuple[FlightStreamWriter, FlightStreamReader]:
        """Batches in both directions. ``writer.begin(schema)`` comes before the first one."""
        requests = _Requests()
        messages = self._stream("do_exchange", requests, timeout, headers)
        reader = FlightStreamReader(messages, read_options)
        messages.read_by(reader)
        writer = FlightStreamWriter(requests, messages, descriptor, write_options)
        return writer, reader

    def do_action(
        self,
        action: flight.Action | str | tuple[str, Any],
        *,
        timeout: float | None = None,
        headers: Any = None,
    ) -> Iterator[flight.Result]:
        """The results of ``action``, as they come. The call begins now."""
        return self._stream("do_action", action, timeout, headers)

    def list_actions(
        self, *, timeout: float | None = None, headers: Any = None
    ) -> list[flight.ActionType]:
        """The actions that the server knows."""
        return list(self._stream("list_actions", b"", timeout, headers))

    def close(self) -> None:
        """Make no more calls. Idempotent; streams go on, and the channel ends with the last."""
        self._channel = None
        self._stubs = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _unary(self, name: str, request: Any, timeout: float | None, headers: Any) -> Any:
        method, _channel = self._method(name)
        try:
            return method(request, timeout=timeout, metadata=as_metadata(headers))
        except Exception as error:  # noqa: BLE001 -- those of grpc become pyarrow's
            raise as_flight_error(error) from None

    def _stream(self, name: str, request: Any, timeout: float | None, headers: Any) -> _Messages:
        method, channel = self._method(name)
        call = method(request, timeout=timeout, metadata=as_metadata(headers))
        if isinstance(request, _Requests):
            # A generator begins when it is read, and nothing reads while batches are written.
            add_callback = _method_of(call, "add_callback", name)
            if not add_callback(request.end):  # it has ended already
                request.end()
        return _Messages(call, channel)

    def _method(self, name: str) -> tuple[Any, _Channel]:
        # The channel first: close() drops it first, too.
        channel, method = self._channel, self._stubs.get(name)
        if channel is None or method is None:
            raise pa.ArrowInvalid("this FlightServiceClient is closed")
        return method, channel


class _Channel:
    """A channel, closed with the last client or stream that uses it, if it is ours to close."""

    def __init__(self, channel: Any, close: Callable[[], object] | None) -> None:
        self._channel = channel
        self._close = close

    def __del__(self) -> None:
        # close() waits for a thread of gRPC's. That may be the very thread that is here, if it
        # collected a cycle; and in an interpreter that ends, it never runs again.
        if self._close is not None and not sys.is_finalizing():
            discard([_Closing(self._close)])


class _Closing:
    """Closes a channel when it is let go: on the disposer's thread."""

    def __init__(self, close: Callable[[], object]) -> None:
        self._close = close

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._close()


class _Messages:
    """The answers of a call, with pyarrow's errors. Holds on to the channel. Thread-safe.

    A reader takes them one by one; a writer that ends the call takes the rest, which is kept
    for the reader as long as there is one.
    """

    def __init__(self, call: Any, channel: _Channel) -> None:
        self._call = call
        self._channel: _Channel | None = channel
        self._receiving = threading.Lock()
        self._kept: deque[Any] = deque()
        self._ended = False
        self._failure: BaseException | None = None
        self._reader: Callable[[], object] = lambda: None

    def read_by(self, reader: object) -> None:
        """Keep what a writer receives for ``reader``, while that is there."""
        self._reader = weakref.ref(reader)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        with self._receiving:
            return self._kept.popleft() if self._kept else self._receive()

    def receive_rest(self) -> None:
        """Wait for the end of the call; what comes until then can still be read."""
        while True:
            with self._receiving:
                try:
                    message = self._receive()
                except StopIteration:
                    return
                if self._reader() is not None:
                    self._kept.append(message)

    def _receive(self) -> Any:
        if self._failure is not None:  # what came before is not all there is
            raise without_traceback(self._failure)
        if self._ended:
            raise StopIteration
        try:
            return next(self._call)
        except StopIteration:
            self._end()
            raise
        except Exception as error:  # noqa: BLE001 -- those of grpc become pyarrow's
            failure = as_flight_error(error)
            self._end(failure)
            raise failure from None
        except BaseException:
            # What gRPC has received meanwhile is lost, so nothing may follow it.
            self.refuse(
                flight.FlightCancelledError("the thread that read the stream was interrupted")
            )
            raise

    def metadata(self, name: str) -> list[Callable[[], Any]]:
        """What tells what the server sent before its answers and after, once a call has ended.

        ``name`` is its method. Raises ``TypeError`` before a call is read that cannot tell.
        """
        methods = ("initial_metadata", "trailing_metadata")
        return [_method_of(self._call, each, name) for each in methods]

    def _end(self, failure: BaseException | None = None) -> None:
        if self._ended:  # by another thread's failure, of which this one is the consequence
            return
        self._ended = True
        self._failure = None if failure is None else without_traceback(failure)
        self._channel = None

    def cancel(self) -> None:
        """End the call now; the next read says so."""
        _cancel(self._call)

    def refuse(self, failure: BaseException) -> None:
        """End the call now, for what an answer held; whoever reads on is told the same."""
        self._kept.clear()
        self._end(failure)
        _cancel(self._call)

    def __del__(self) -> None:
        # Nobody reads it any more; the server need not go on.
        if not self._ended and not sys.is_finalizing():
            _cancel(self._call)


def _method_of(call: Any, method: str, name: str) -> Any:
    """A method of ``call``, of the Flight method ``name``; what interceptors return may lack it."""
    found = getattr(call, method, None)
    if found is None:
        raise TypeError(
            f"an interceptor of {name} returned {type(call).__name__}, not a call: return "
            "what continuation() gave, or a wrapper with its methods"
        )
    return found


def _cancel(call: Any) -> None:
    """End ``call``, also where an interceptor made a generator of it."""
    if hasattr(call, "cancel"):
        call.cancel()
    elif hasattr(call, "close"):
        with contextlib.suppress(ValueError):  # somebody reads it just now
            call.close()


class FlightStreamReader:
    """Batches from a server, as they come. For one thread at a time, but for ``cancel()``."""

    def __init__(self, messages: _Messages, options: pa.ipc.IpcReadOptions | None) -> None:
        self._messages = messages
        self._decoder = BatchDecoder(options)
        self._read: deque[FlightStreamChunk] = deque()

    def begun(self) -> Self:
        """The reader, once the schema is there."""
        self._read_schema()
        return self

    @property
    def schema(self) -> pa.Schema:
        """The schema of the batches; waits for it."""
        self._read_schema()
        return self._decoder.schema

    def read_chunk(self) -> FlightStreamChunk:
        """The next batch, or metadata without one. Raises ``StopIteration`` at the end."""
        if self._read:
            return self._read.popleft()
        while True:
            chunk = self._decoded(next(self._messages))
            if chunk is not None:
                return chunk

    def read_all(self) -> pa.Table:
        """All batches as one table. Metadata is dropped."""
        batches = [chunk.data for chunk in self if chunk.data is not None]
        return pa.Table.from_batches(batches, self.schema)

    def read_pandas(self, **options: Any) -> Any:
        """All batches as one data frame; ``options`` are those of ``Table.to_pandas``."""
        return self.read_all().to_pandas(**options)

    def to_reader(self) -> pa.RecordBatchReader:
        """The batches as a ``RecordBatchReader``. Metadata is dropped."""
        # No generator: that would end after an error, as if what came before it were all.
        batches = filter(_is_there, map(attrgetter("data"), self))
        return pa.RecordBatchReader.from_batches(self.schema, batches)

    def cancel(self) -> None:
        """End the stream now. From any thread; a read that waits raises."""
        self._messages.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FlightStreamChunk:
        return self.read_chunk()

    def _decoded(self, data: wire.FlightData) -> FlightStreamChunk | None:
        try:
            return self._decoder.decode(data)
        except Exception as error:
            self._messages.refuse(error)
            raise

    def _read_schema(self) -> None:
        while self._decoder.schema is None:
            try:
                data = next(self._messages)
            except StopIteration:
                raise pa.ArrowInvalid("the stream ended before its schema came") from None
            chunk = self._decoded(data)
            if chunk is not None:
                self._read.append(chunk)


class FlightMetadataReader:
    """What a server says while batches are put. For one thread at a time."""

    def __init__(self, messages: _Messages) -> None:
        self._messages = messages

    def read(self) -> pa.Buffer | None:
        """The next message, ``None`` when there are no more; waits for it."""
        try:
            return pa.py_buffer(next(self._messages))
        except StopIteration:
            return None


class FlightStreamWriter:
    """Sends batches. For one thread at a time. A ``with`` block closes it at its end.

    ``close()`` waits until the server has ended the call, and raises what it said. What was
    not read by then is kept in memory for the reader, if that is still there: all of it, since
    to wait for a reader that has seen enough would be to wait for ever. For answers of any size
    read to their end between ``done_writing()`` and ``close()``; then the server is made to wait.
    """

    def __init__(
        self,
        requests: _Requests,
        messages: _Messages,
        descriptor: flight.FlightDescriptor,
        options: pa.ipc.IpcWriteOptions | None,
    ) -> None:
        self._requests = requests
        self._messages = messages
        self._descriptor: bytes = descriptor.serialize()
        self._options = options
        self._encoder: BatchEncoder | None = None
        self._given_up = False

    def begin(self, schema: pa.Schema, options: pa.ipc.IpcWriteOptions | None = None) -> None:
        """Send the schema of the batches that follow."""
        if self._encoder is not None:
            raise pa.ArrowInvalid("this writer has begun already")
        self._encoder = BatchEncoder(schema, options or self._options)
        self._send(self._encoder.begin(self._taken_descriptor()))

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Send ``batch``; waits while the server is behind."""
        self.write_with_metadata(batch, b"")

    def write_with_metadata(self, batch: pa.RecordBatch, app_metadata: Any) -> None:
        """Send ``batch`` with bytes of the application's own."""
        if self._encoder is None:
            raise pa.ArrowInvalid("begin(schema) comes before the first batch")
        try:
            for message in self._encoder.encode(batch, bytes(memoryview(app_metadata))):
                self._send(message)
        except Exception:
            raise
        except BaseException:
            self._interrupted()
            raise

    def write_metadata(self, app_metadata: Any) -> None:
        """Send bytes of the application's own without a batch."""
        self._send(metadata_only(bytes(memoryview(app_metadata)), self._taken_descriptor()))

    def write_table(self, table: pa.Table, max_chunksize: int | None = None) -> None:
        """Send the batches of ``table``."""
        for batch in table.to_batches(max_chunksize):
            self.write_batch(batch)

    write = write_table

    def done_writing(self) -> None:
        """Say that there is no more to come. Reading may go on."""
        self._requests.finish()

    def close(self) -> None:
        """End the call in order. Idempotent: what it raised, it raises again."""
        self.done_writing()
        if not self._given_up:
            self._messages.receive_rest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self.close()
            return
        self._given_up = True
        self._messages.cancel()

    def _taken_descriptor(self) -> bytes:
        """The descriptor, which goes with the first message only."""
        descriptor, self._descriptor = self._descriptor, b""
        return descriptor

    def _interrupted(self) -> None:
        """Nobody can tell what was sent of a batch, so nothing may follow it, not even the end."""
        self._messages.refuse(
            flight.FlightCancelledError("the thread that wrote the stream was interrupted")
        )

    def _send(self, message: bytes) -> None:
        try:
            is_sent = self._requests.put(message)
        except pa.ArrowInvalid:
            raise
        except BaseException:  # of a signal's handler, whatever it is
            self._interrupted()
            raise
        if not is_sent:
            # The server has ended the call: its error says why.
            self._messages.receive_rest()
            raise pa.ArrowInvalid("the server has ended the stream that is being written")


class _Requests:
    """Messages on their way to gRPC, a few at a time. ``put`` and iteration block."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._ended = False

    def put(self, message: bytes) -> bool:
        """Whether it will be sent: not after the call has ended."""
        with self._changed:
            if self._finished:
                raise pa.ArrowInvalid("this writer is closed")
            self._changed.wait_for(lambda: self._ended or len(self._waiting) < _AHEAD)
            if not self._ended:
                self._waiting.append(message)
                self._changed.notify_all()
            return not self._ended

    def finish(self) -> None:
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def end(self) -> None:
        """The call is over."""
        with self._changed:
            self._ended = True
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._finished or self._waiting)
            if self._ended or not self._waiting:
                raise StopIteration
            message = self._waiting.popleft()
            self._changed.notify_all()
            return message
