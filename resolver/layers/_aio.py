"""A layer as interceptors of a ``grpc.aio`` channel. Imported only when grpcio is used."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from resolver._headers import note_headers

from ._call import Begins, Call, EndOnce

if TYPE_CHECKING:
    from collections.abc import Callable


def interceptors(layer: Begins) -> list[Any]:
    """One for each kind of call: grpc.aio takes an interceptor for the first it fits only."""
    return [_UnaryUnary(layer), _UnaryStream(layer), _StreamUnary(layer), _StreamStream(layer)]


class _Interceptor:
    def __init__(self, layer: Begins) -> None:
        self._layer = layer

    async def _intercept(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        method = details.method
        call = Call(
            method.decode("ascii") if isinstance(method, bytes) else method,
            list(details.metadata or ()),
            details.timeout,
        )
        end = await self._layer.begin_async(call)
        note_headers(call.headers)
        changed = details._replace(timeout=call.timeout, metadata=grpc.aio.Metadata(*call.headers))
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
