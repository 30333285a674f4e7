"""A layer as interceptors of a ``grpc.aio`` channel. Imported only when grpcio is used."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from resolver._headers import note_headers

from ._call import Begins, Call, End, EndOnce, left

if TYPE_CHECKING:
    from collections.abc import Callable


_REFUSED = grpc.StatusCode.UNAUTHENTICATED


def interceptors(layer: Begins) -> list[Any]:
    """One for each kind of call: grpc.aio takes an interceptor for the first it fits only."""
    streams = [_StreamUnary(layer), _StreamStream(layer)]
    if hasattr(layer, "refused_async"):
        return [_RetryingUnaryUnary(layer), _RetryingUnaryStream(layer), *streams]
    return [_UnaryUnary(layer), _UnaryStream(layer), *streams]


class _Interceptor:
    def __init__(self, layer: Begins) -> None:
        self._layer = layer

    async def _begin(
        self, details: Any, since: float | None = None
    ) -> tuple[Call, Any, End | None]:
        """``since``: the monotonic time from which the call's timeout counts; else from now."""
        began = time.monotonic()
        method = details.method
        call = Call(
            method.decode("ascii") if isinstance(method, bytes) else method,
            list(details.metadata or ()),
            left(details.timeout, began if since is None else since),
        )
        end = await self._layer.begin_async(call)
        note_headers(call.headers)
        try:
            metadata = grpc.aio.Metadata(*call.headers)
        except BaseException:  # it is the headers that the layer added
            if end is not None:
                EndOnce(end)("INTERNAL")
            raise
        # The layer may have waited.
        changed = details._replace(timeout=left(call.timeout, began), metadata=metadata)
        return call, changed, end

    async def _intercept(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        _, changed, end = await self._begin(details)
        if end is None:
            return await continuation(changed, request)
        once = EndOnce(end)
        try:
            outcome = await continuation(changed, request)
        except asyncio.CancelledError:
            once("CANCELLED")
            raise
        except BaseException as error:
            once(_status_of_error(error))
            raise
        if hasattr(outcome, "add_done_callback"):
            outcome.add_done_callback(lambda call: once(_status(call)))
        else:
            once("OK")  # an inner interceptor answered by itself
        return outcome


class _UnaryUnary(_Interceptor, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await self._intercept(continuation, details, request)


class _UnaryStream(_Interceptor, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await self._intercept(continuation, details, request)


class _RetryingUnaryUnary(_Interceptor, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Of a layer that may have a remedy for refused calls. It sees no ends."""

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        since = time.monotonic()
        call, changed, _ = await self._begin(details, since)
        outcome = await continuation(changed, request)
        if await outcome.code() is _REFUSED and await self._layer.refused_async(call):  # type: ignore[attr-defined]
            return await continuation((await self._begin(details, since))[1], request)
        return outcome


class _RetryingUnaryStream(_Interceptor, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    """The same for streams: the first message tells whether it was refused."""

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        since = time.monotonic()
        call, changed, _ = await self._begin(details, since)
        outcome = await continuation(changed, request)
        try:
            return _Begun(outcome, [await outcome.read()])
        except grpc.RpcError:
            if await outcome.code() is not _REFUSED:
                return _Begun(outcome, [])
        if not await self._layer.refused_async(call):  # type: ignore[attr-defined]
            return _Begun(outcome, [])
        return await continuation((await self._begin(details, since))[1], request)


class _Begun(grpc.aio.UnaryStreamCall):  # type: ignore[misc]
    """A stream of which was read already; its reader gets the ``first`` message all the same."""

    def __init__(self, call: Any, first: list[Any]) -> None:
        self._call = call
        self._first = first

    def __aiter__(self) -> Any:
        return self._messages()

    async def _messages(self) -> Any:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    async def read(self) -> Any:
        return self._first.pop() if self._first else await self._call.read()

    def cancelled(self) -> bool:
        return bool(self._call.cancelled())

    def done(self) -> bool:
        return bool(self._call.done())

    def time_remaining(self) -> Any:
        return self._call.time_remaining()

    def cancel(self) -> bool:
        return bool(self._call.cancel())

    def add_done_callback(self, callback: Any) -> None:
        self._call.add_done_callback(callback)

    async def initial_metadata(self) -> Any:
        return await self._call.initial_metadata()

    async def trailing_metadata(self) -> Any:
        return await self._call.trailing_metadata()

    async def code(self) -> Any:
        return await self._call.code()

    async def details(self) -> Any:
        return await self._call.details()

    async def wait_for_connection(self) -> None:
        await self._call.wait_for_connection()


class _StreamUnary(_Interceptor, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc]
    async def intercept_stream_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await self._intercept(continuation, details, request)


class _StreamStream(_Interceptor, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    async def intercept_stream_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await self._intercept(continuation, details, request)


def _status(call: Any) -> str:
    """The status of a call that is done; asking for it is a coroutine that does not wait."""
    asking = call.code()
    try:
        asking.send(None)
    except StopIteration as answer:
        return answer.value.name if isinstance(answer.value, grpc.StatusCode) else "UNKNOWN"
    except grpc.RpcError as error:
        return _status_of_error(error)
    asking.close()
    return "UNKNOWN"


def _status_of_error(error: BaseException) -> str:
    code = error.code() if isinstance(error, grpc.RpcError) and hasattr(error, "code") else None
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
