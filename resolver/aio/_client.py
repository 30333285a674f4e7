"""The Flight service over a grpc.aio channel, with pyarrow's types at its edge.

How a channel is made is ``_connector.py``'s business; grpc is not imported here but by
whoever made the channel. A client belongs to the event loop of its channel.
"""
# ruff: noqa: ASYNC109 -- a timeout here is the deadline of a call, which the server learns

from __future__ import annotations

import asyncio
import contextlib
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self

import pyarrow as pa
from pyarrow import flight

from resolver import _flight_wire as wire
from resolver._flight_batches import BatchDecoder, BatchEncoder, FlightStreamChunk, metadata_only
from resolver._flight_calls import (
    METHODS,
    as_flight_error,
    as_metadata,
    bearer_of,
    decoded,
    stub,
    with_basic_authorization,
)
from resolver._grpc_options import import_grpc
from resolver._shared_errors import without_traceback

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = [
    "FlightMetadataReader",
    "FlightServiceClient",
    "FlightStreamReader",
    "FlightStreamWriter",
]

_CLOSED: Final = "this FlightServiceClient is closed"
_ELSEWHERE: Final = (
    "this FlightServiceClient belongs to another event loop; get one within this loop, which a "
    "resolver.aio.DefaultChannelResolver has for each"
)

_STREAM_ELSEWHERE: Final = (
    "this stream belongs to the event loop in which its call was made; read and write it there, "
    "with asyncio.run_coroutine_threadsafe() from elsewhere"
)


class FlightServiceClient:
    """The calls of the Flight service, for the tasks of one event loop.

    Every call takes ``timeout``, in seconds for the whole call (``None``: no limit), and
    ``headers``, a mapping or pairs. Errors are those of pyarrow's own client. Cancelling
    the task that waits for an answer cancels the call. Raises ``RuntimeError`` on another
    event loop than its own.

    A stream keeps its channel open, so it lives on when the client is closed or dropped.
    """

    def __init__(self, channel: Any) -> None:
        self._channel: Any = channel
        # Of an answer that cannot be decoded, grpc.aio itself makes a silent None.
        self._stubs: dict[str, Any] = {name: stub(channel, name, decode=False) for name in METHODS}
        self._loop = _running_loop()

    async def handshake(
        self, payload: bytes = b"", *, timeout: float | None = None, headers: Any = None
    ) -> list[bytes]:
        """What the server answers to one message of a handshake."""
        messages = self._stream("handshake", None, timeout, headers)
        await messages.write(payload)
        await messages.done_writing()
        return [answer async for answer in messages]

    async def authenticate_basic_token(
        self, username: str, password: str, *, timeout: float | None = None, headers: Any = None
    ) -> tuple[bytes, bytes]:
        """The header, name and value, with the token that the server gives for a password.

        For the ``headers`` of later calls. Raises ``FlightUnauthenticatedError`` when the
        server gives none.
        """
        self._method("handshake")  # closed, or of another loop
        # As a call with one answer: of a stream that ends at once, grpc.aio mostly forgets
        # what the server sent first.
        method = self._channel.unary_unary(
            wire.SERVICE + METHODS["handshake"].name,
            request_serializer=wire.encode_handshake,
        )
        given = with_basic_authorization(headers, username, password)
        call = method(b"", timeout=timeout, metadata=tuple(given))
        try:
            await call
        except BaseException as error:  # noqa: BLE001 -- those of grpc become pyarrow's
            raise _as_told(error) from None
        return bearer_of(await call.initial_metadata(), await call.trailing_metadata())

    def list_flights(
        self, criteria: bytes = b"", *, timeout: float | None = None, headers: Any = None
    ) -> AsyncIterator[flight.FlightInfo]:
        """The flights that the server has for ``criteria``, as they come."""
        return self._stream("list_flights", criteria, timeout, headers)

    async def get_flight_info(
        self,
        descriptor: flight.FlightDescriptor,
        *,
        timeout: float | None = None,
        headers: Any = None,
    ) -> flight.FlightInfo:
        """Where the data of ``descriptor`` is."""
        return await self._unary("get_flight_info", descriptor, timeout, headers)

    async def poll_flight_info(
        self,
        descriptor: flight.FlightDescriptor,
        *,
        timeout: float | None = None,
        headers: Any = None,
    ) -> wire.PollInfo:
        """Where the data is so far, of a query that may still run."""
        info: wire.PollInfo = await self._unary("poll_flight_info", descriptor, timeout, headers)
        return info

    async def get_schema(
        self,
        descriptor: flight.FlightDescriptor,
        *,
        timeout: float | None = None,
        headers: Any = None,
    ) -> flight.SchemaResult:
        """The schema of the data of ``descriptor``."""
        return await self._unary("get_schema", descriptor, timeout, headers)

    async def do_get(
        self,
        ticket: flight.Ticket,
        *,
        timeout: float | None = None,
        headers: Any = None,
        read_options: pa.ipc.IpcReadOptions | None = None,
    ) -> FlightStreamReader:
        """The batches of ``ticket``. Fails here if the server refuses at once."""
        reader = FlightStreamReader(self._stream("do_get", ticket, timeout, headers), read_options)
        await reader.read_schema()
        return reader

    async def do_put(
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
        messages = self._stream("do_put", None, timeout, headers)
        reader = FlightMetadataReader(messages)
        messages.read_by(reader)
        writer = FlightStreamWriter(messages, descriptor, write_options)
        await writer.begin(schema)
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
        messages = self._stream("do_exchange", None, timeout, headers)
        reader = FlightStreamReader(messages, read_options)
        messages.read_by(reader)
        return FlightStreamWriter(messages, descriptor, write_options), reader

    def do_action(
        self,
        action: flight.Action | str | tuple[str, Any],
        *,
        timeout: float | None = None,
        headers: Any = None,
    ) -> AsyncIterator[flight.Result]:
        """The results of ``action``, as they come. The call begins now."""
        return self._stream("do_action", action, timeout, headers)

    async def list_actions(
        self, *, timeout: float | None = None, headers: Any = None
    ) -> list[flight.ActionType]:
        """The actions that the server knows."""
        return [each async for each in self._stream("list_actions", b"", timeout, headers)]

    async def close(self) -> None:
        """Make no more calls. Idempotent; streams go on, and the channel ends with the last."""
        # A channel ends when nobody holds it; its own close() would cancel the streams.
        self._channel, self._stubs = None, {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def _unary(self, name: str, request: Any, timeout: float | None, headers: Any) -> Any:
        try:
            message = await self._method(name)(
                request, timeout=timeout, metadata=as_metadata(headers)
            )
        except BaseException as error:  # noqa: BLE001 -- those of grpc become pyarrow's
            raise _as_told(error) from None
        return decoded(METHODS[name], message)

    def _stream(self, name: str, request: Any, timeout: float | None, headers: Any) -> _Messages:
        method, channel = self._method(name), self._channel
        requests = () if request is None else (request,)
        call = method(*requests, timeout=timeout, metadata=as_metadata(headers))
        return _Messages(call, channel, name, self._loop)

    def _method(self, name: str) -> Any:
        method = self._stubs.get(name)
        if method is None:
            raise pa.ArrowInvalid(_CLOSED)
        running = _running_loop()
        if self._loop is None:
            self._loop = running
        elif running is not self._loop and running is not None:
            raise RuntimeError(_ELSEWHERE)
        return method


class _Messages:
    """The answers of a call, with pyarrow's errors, and its requests. Holds on to the channel.

    A reader takes them one by one; a writer that ends the call takes the rest, which is kept
    for the reader as long as there is one.
    """

    def __init__(
        self, call: Any, channel: Any, name: str, loop: asyncio.AbstractEventLoop | None
    ) -> None:
        self._call = call
        self._method = METHODS[name]
        self._channel = channel
        self._eof = import_grpc().aio.EOF
        self._ended = False
        self._failure: BaseException | None = None
        self._receiving = asyncio.Lock()
        self._kept: deque[Any] = deque()
        self._reader: Callable[[], object] = lambda: None
        self._loop = loop

    def read_by(self, reader: object) -> None:
        """Keep what a writer receives for ``reader``, while that is there."""
        self._reader = weakref.ref(reader)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        self._check_loop()
        async with self._receiving:
            return self._kept.popleft() if self._kept else await self._receive()

    async def receive_rest(self) -> None:
        """Wait for the end of the call; what comes until then can still be read."""
        self._check_loop()
        while True:
            async with self._receiving:
                try:
                    message = await self._receive()
                except StopAsyncIteration:
                    return
                if self._reader() is not None:
                    self._kept.append(message)

    async def _receive(self) -> Any:
        if self._ended:
            if self._failure is not None:  # what came before is not all there is
                raise without_traceback(self._failure)
            raise StopAsyncIteration
        try:
            message = await self._call.read()
        except BaseException as error:
            failure = _as_told(error)
            if isinstance(failure, Exception):
                self._end(failure)
                try:
                    raise failure from None
                finally:
                    del failure  # or the traceback and this frame form a cycle
            # The task was cancelled. Not always the call with it: one that was just about to
            # begin goes on.
            self._call.cancel()
            self._end(flight.FlightCancelledError("a task that read the stream was cancelled"))
            raise
        if message is self._eof:
            self._end()
            raise StopAsyncIteration
        try:
            return decoded(self._method, message)
        except flight.FlightInternalError as error:
            self.refuse(error)
            raise

    async def write(self, message: Any) -> bool:
        """Whether it was sent: not after the call has ended; reading then says why."""
        self._check_loop()
        if self._ended:
            return False
        try:
            await self._send(message)
        except asyncio.InvalidStateError:
            return False
        except asyncio.CancelledError as error:
            if isinstance(_as_told(error), Exception):
                return False
            # Nobody can tell whether the message was sent, so none may follow it.
            self.refuse(flight.FlightCancelledError("a task that wrote the stream was cancelled"))
            raise
        except Exception as error:
            if callable(getattr(error, "code", None)):
                return False
            raise
        return True

    async def _send(self, message: Any) -> None:
        core = getattr(self._call, "_cython_call", None)
        if core is None:  # an interceptor's
            await self._call.write(message)
            return
        # The call's own write() turns a call that the server has ended into one with an
        # INTERNAL error, and what the server said is lost.
        await self._call.wait_for_connection()
        if self._call.done():
            raise asyncio.InvalidStateError
        try:
            await core.send_serialized_message(self._method.encode(message))
        except import_grpc()._cython.cygrpc.InternalError:  # noqa: SLF001 -- it has no public name
            raise asyncio.InvalidStateError from None

    async def done_writing(self) -> None:
        self._check_loop()
        # A call that the server has ended; reading says why.
        with contextlib.suppress(import_grpc()._cython.cygrpc.InternalError):  # noqa: SLF001
            try:
                await self._call.done_writing()
            except asyncio.CancelledError as error:
                if not isinstance(_as_told(error), Exception):
                    self.refuse(flight.FlightCancelledError("a task that ended it was cancelled"))
                    raise

    def cancel(self) -> None:
        """End the call now; the next read says so."""
        self._call.cancel()

    def refuse(self, failure: Exception) -> None:
        """End the call now, for what an answer held; whoever reads on is told the same."""
        self._kept.clear()
        self._call.cancel()
        self._end(failure)

    def _check_loop(self) -> None:
        if self._loop is not None and _running_loop() is not self._loop:
            raise RuntimeError(_STREAM_ELSEWHERE)

    def _end(self, failure: Exception | None = None) -> None:
        if self._ended:  # by another task's failure, of which this one is the consequence
            return
        self._ended = True
        self._failure = None if failure is None else without_traceback(failure)
        self._channel = None

    def __del__(self) -> None:
        # Nobody reads it any more; the server need not go on.
        if self._ended or sys.is_finalizing():
            return
        if self._loop is None or self._loop is _running_loop():
            self._call.cancel()
            return
        with contextlib.suppress(RuntimeError):  # a loop that is closed has ended its calls
            self._loop.call_soon_threadsafe(self._call.cancel)


class FlightStreamReader:
    """Batches from a server, as they come: ``async for chunk in reader``. For one task."""

    def __init__(self, messages: _Messages, options: pa.ipc.IpcReadOptions | None) -> None:
        self._messages = messages
        self._decoder = BatchDecoder(options)
        self._read: deque[FlightStreamChunk] = deque()

    @property
    def schema(self) -> pa.Schema:
        """The schema of the batches. Of an exchange, await ``read_schema()`` first."""
        if self._decoder.schema is None:
            raise pa.ArrowInvalid("the schema has not come yet; await read_schema()")
        return self._decoder.schema

    async def read_schema(self) -> pa.Schema:
        """The schema of the batches, once it has come."""
        while self._decoder.schema is None:
            try:
                data = await anext(self._messages)
            except StopAsyncIteration:
                raise pa.ArrowInvalid("the stream ended before its schema came") from None
            chunk = self._decoded(data)
            if chunk is not None:
                self._read.append(chunk)
        return self._decoder.schema

    async def read_chunk(self) -> FlightStreamChunk:
        """The next batch, or metadata without one. Raises ``StopAsyncIteration`` at the end."""
        if self._read:
            return self._read.popleft()
        while True:
            chunk = self._decoded(await anext(self._messages))
            if chunk is not None:
                return chunk

    async def read_all(self) -> pa.Table:
        """All batches as one table. Metadata is dropped."""
        await self.read_schema()
        batches = [chunk.data async for chunk in self if chunk.data is not None]
        return pa.Table.from_batches(batches, self.schema)

    def cancel(self) -> None:
        """End the stream now; a read that waits raises."""
        self._messages.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FlightStreamChunk:
        return await self.read_chunk()

    def _decoded(self, data: wire.FlightData) -> FlightStreamChunk | None:
        try:
            return self._decoder.decode(data)
        except Exception as error:
            self._messages.refuse(error)
            raise


class FlightMetadataReader:
    """What a server says while batches are put. For one task."""

    def __init__(self, messages: _Messages) -> None:
        self._messages = messages

    async def read(self) -> pa.Buffer | None:
        """The next message, ``None`` when there are no more; waits for it."""
        try:
            return pa.py_buffer(await anext(self._messages))
        except StopAsyncIteration:
            return None


class FlightStreamWriter:
    """Sends batches. For one task. An ``async with`` block closes it at its end.

    ``close()`` waits until the server has ended the call, and raises what it said. What was
    not read by then is kept in memory for the reader, if that is still there: all of it, since
    to wait for a reader that has seen enough would be to wait for ever. For answers of any size
    read to their end between ``done_writing()`` and ``close()``; then the server is made to wait.
    """

    def __init__(
        self,
        messages: _Messages,
        descriptor: flight.FlightDescriptor,
        options: pa.ipc.IpcWriteOptions | None,
    ) -> None:
        self._messages = messages
        self._descriptor: bytes = descriptor.serialize()
        self._options = options
        self._encoder: BatchEncoder | None = None
        self._closed = False
        self._given_up = False
        self._done = False

    async def begin(self, schema: pa.Schema, options: pa.ipc.IpcWriteOptions | None = None) -> None:
        """Send the schema of the batches that follow."""
        if self._encoder is not None:
            raise pa.ArrowInvalid("this writer has begun already")
        self._encoder = BatchEncoder(schema, options or self._options)
        await self._send(self._encoder.begin(self._taken_descriptor()))

    async def write_batch(self, batch: pa.RecordBatch) -> None:
        """Send ``batch``; waits while the server is behind."""
        await self.write_with_metadata(batch, b"")

    async def write_with_metadata(self, batch: pa.RecordBatch, app_metadata: Any) -> None:
        """Send ``batch`` with bytes of the application's own."""
        if self._encoder is None:
            raise pa.ArrowInvalid("begin(schema) comes before the first batch")
        for message in self._encoder.encode(batch, bytes(memoryview(app_metadata))):
            await self._send(message)

    async def write_metadata(self, app_metadata: Any) -> None:
        """Send bytes of the application's own without a batch."""
        metadata = bytes(memoryview(app_metadata))
        await self._send(metadata_only(metadata, self._taken_descriptor()))

    async def write_table(self, table: pa.Table, max_chunksize: int | None = None) -> None:
        """Send the batches of ``table``."""
        for batch in table.to_batches(max_chunksize):
            await self.write_batch(batch)

    async def done_writing(self) -> None:
        """Say that there is no more to come. Reading may go on."""
        self._done = True
        await self._messages.done_writing()

    async def close(self) -> None:
        """End the call in order. Idempotent: what it raised, it raises again."""
        if not self._closed:
            self._closed = True
            await self.done_writing()
        if not self._given_up:
            await self._messages.receive_rest()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            await self.close()
        else:
            self._closed = self._given_up = True
            self._messages.cancel()

    def _taken_descriptor(self) -> bytes:
        """The descriptor, which goes with the first message only."""
        descriptor, self._descriptor = self._descriptor, b""
        return descriptor

    async def _send(self, message: bytes) -> None:
        if self._closed or self._done:
            raise pa.ArrowInvalid("this writer is closed")
        if not await self._messages.write(message):
            # The server has ended the call: its error says why.
            await self._messages.receive_rest()
            raise pa.ArrowInvalid("the server has ended the stream that is being written")


def _as_told(error: BaseException) -> BaseException:
    """What the caller is told: of grpc's errors pyarrow's.

    A call that was cancelled, by whoever holds it or its channel, cancels no task.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is None or task.cancelling():
            return error
        return flight.FlightCancelledError("the call was cancelled")  # type: ignore[no-any-return]
    return as_flight_error(error) if isinstance(error, Exception) else error


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
