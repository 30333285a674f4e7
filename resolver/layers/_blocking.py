"""A layer around a blocking ``grpc.Channel``. Imported only when grpcio is used."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from resolver._headers import note_headers

from ._call import Begins, Call, End, EndOnce, left

if TYPE_CHECKING:
    from collections.abc import Callable


def intercept(channel: Any, layer: Begins) -> grpc.Channel:
    """A channel whose calls go through `layer` first."""
    if not isinstance(channel, grpc.Channel):
        hint = ""
        if isinstance(channel, grpc.aio.Channel):
            hint = "; give aio_interceptors() to a grpc.aio channel when it is made"
        raise TypeError(f"a layer goes around a grpc.Channel, not {type(channel).__name__}{hint}")
    kind = _Retrying if hasattr(layer, "refused") else _Interceptor
    return grpc.intercept_channel(channel, kind(layer))


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

    def _begin(self, details: Any, since: float | None = None) -> tuple[Call, _Details, End | None]:
        """``since``: the monotonic time from which the call's timeout counts; else from now."""
        began = time.monotonic()
        given = left(details.timeout, began if since is None else since)
        call = Call(details.method, list(details.metadata or ()), given)
        end = self._layer.begin(call)
        note_headers(call.headers)
        changed = _Details(
            call.method,
            left(call.timeout, began),  # the layer may have waited
            tuple(call.headers) or None,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
        return call, changed, end

    def _intercept(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        _, changed, end = self._begin(details)
        if end is None:
            return continuation(changed, request)
        once = EndOnce(end)
        try:
            outcome = continuation(changed, request)
        except BaseException:
            once("UNKNOWN")
            raise
        return _watched(outcome, once)

    intercept_unary_unary = _intercept
    intercept_unary_stream = _intercept
    intercept_stream_unary = _intercept
    intercept_stream_stream = _intercept


class _Retrying(_Interceptor):
    """Of a layer that may have a remedy for refused calls. Of those it sees no ends.

    Calls that send a stream are made once: what was sent is gone. So are those begun with
    ``future()``, which are their caller's to wait for.
    """

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        since = time.monotonic()
        call, changed, end = self._begin(details, since)
        outcome = continuation(changed, request)
        if not outcome.done():
            return outcome if end is None else _watched(outcome, EndOnce(end))
        if _is_refused(outcome) and self._layer.refused(call):  # type: ignore[attr-defined]
            return continuation(self._begin(details, since)[1], request)
        return outcome

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        since = time.monotonic()
        call, changed, _ = self._begin(details, since)

        def again() -> Any:
            if not self._layer.refused(call):  # type: ignore[attr-defined]
                return None
            return continuation(self._begin(details, since)[1], request)

        return _Retried(continuation(changed, request), again)


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
        found = getattr(self._call, name)
        if not callable(found):
            return found

        def method(*args: Any, **kwargs: Any) -> Any:  # as in stub.future(request).result()
            return getattr(self._call, name)(*args, **kwargs)

        return method

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """As grpc's own; the call goes on until then, also if nobody holds it."""
        # grpcio logs what a callback raises, if that is a partial, and else ends its thread.
        if not self.add_callback(partial(callback, self)):
            callback(self)

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self._call)

    def __del__(self) -> None:
        self.cancel()


grpc.Call.register(_Watched)
grpc.Future.register(_Watched)


class _Retried(_Watched):
    """A stream under way that is begun once more if it is refused before its first message."""

    def __init__(self, call: Any, again: Callable[[], Any]) -> None:
        super().__init__(call)
        self._again: Callable[[], Any] | None = again
        self._deciding = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []

    def __next__(self) -> Any:
        if self._again is None:
            return next(self._call)
        try:
            first = next(self._call)
        except grpc.RpcError:
            again = self._again if _is_refused(self._call) else None
            fresh = None
            try:
                fresh = None if again is None else again()
            finally:
                self._settle(fresh)
            if fresh is None:
                raise
            return next(self._call)
        except BaseException:
            self._settle(None)
            raise
        self._settle(None)
        return first

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Call it when the call has ended for good; False if it has."""
        with self._deciding:
            if self._callbacks is not None:
                self._callbacks.append(callback)
                return True
        return bool(self._call.add_callback(callback))

    def cancel(self) -> bool:
        """End the call, and begin no other."""
        self._settle(None)
        return bool(self._call.cancel())

    def _settle(self, fresh: Any) -> None:
        """From now on this is ``fresh``, or the call that it was."""
        self._again = None
        with self._deciding:
            callbacks, self._callbacks = self._callbacks, None
            if callbacks is None:  # cancelled, by another thread
                if fresh is not None:
                    fresh.cancel()
                return
            if fresh is not None:
                self._call = fresh
        for callback in callbacks:
            if not self._call.add_callback(callback):
                callback()


def _is_refused(outcome: Any) -> bool:
    return outcome.code() is grpc.StatusCode.UNAUTHENTICATED


def _watched(outcome: Any, end: EndOnce) -> Any:
    """``outcome`` as its caller gets it, so that `end` is called when it is over."""
    if _watch(outcome, end):
        return _Watched(outcome)
    end(_status(outcome))
    return outcome


def _watch(outcome: Any, end: EndOnce) -> bool:
    """Have `end` called when the call is over; False when it already is."""
    if isinstance(outcome, grpc.RpcError) and not hasattr(outcome, "__next__"):
        return False  # the failure of a call that was waited for
    return bool(outcome.add_callback(lambda: end(_status(outcome))))


def _status(outcome: Any) -> str:
    code = outcome.code()
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
