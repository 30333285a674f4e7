"""A layer around a blocking ``grpc.Channel``. Imported only when grpcio is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from resolver._headers import note_headers

from ._call import Begins, Call, EndOnce

if TYPE_CHECKING:
    from collections.abc import Callable


def intercept(channel: Any, layer: Begins) -> grpc.Channel:
    """A channel whose calls go through `layer` first."""
    if not isinstance(channel, grpc.Channel):
        hint = ""
        if isinstance(channel, grpc.aio.Channel):
            hint = "; give aio_interceptors() to a grpc.aio channel when it is made"
        raise TypeError(f"a layer goes around a grpc.Channel, not {type(channel).__name__}{hint}")
    return grpc.intercept_channel(channel, _Interceptor(layer))


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Interceptor(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]  # grpcio is untyped
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """One layer, for all four kinds of call: a layer does not see messages."""

    def __init__(self, layer: Begins) -> None:
        self._layer = layer

    def _intercept(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        call = Call(details.method, list(details.metadata or ()), details.timeout)
        end = self._layer.begin(call)
        note_headers(call.headers)
        changed = _Details(
            call.method,
            call.timeout,
            tuple(call.headers) or None,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
        if end is None:
            return continuation(changed, request)
        once = EndOnce(end)
        try:
            outcome = continuation(changed, request)
        except BaseException:
            once("UNKNOWN")
            raise
        if _watch(outcome, once):
            return _Watched(outcome)
        once(_status(outcome))
        return outcome

    intercept_unary_unary = _intercept
    intercept_unary_stream = _intercept
    intercept_stream_unary = _intercept
    intercept_stream_stream = _intercept


def _watch(outcome: Any, end: EndOnce) -> bool:
    """Have `end` called when the call is over; False when it already is."""
    if isinstance(outcome, grpc.RpcError) and not hasattr(outcome, "__next__"):
        return False  # the failure of a call that was waited for
    return bool(outcome.add_callback(lambda: end(_status(outcome))))


def _status(outcome: Any) -> str:
    code = outcome.code()
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"


class _Watched:
    """A call under way, as the caller has it: the call itself, behind one more reference.

    gRPC cancels a call that nobody holds. The callback that tells its status holds it, so
    what the caller holds has to be something else, which cancels it in the same way.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def __repr__(self) -> str:
        return repr(self._call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self._call)

    def __del__(self) -> None:
        self._call.cancel()


grpc.Call.register(_Watched)
grpc.Future.register(_Watched)
