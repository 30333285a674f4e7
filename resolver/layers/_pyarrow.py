"""A layer as pyarrow client middleware.

pyarrow swallows what a middleware raises and sends the call all the same. So a call that a
layer refuses is given a header that gRPC refuses in turn, before it reaches the wire.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from pyarrow import flight

from resolver._headers import REFUSE_CALL, check_sendable, redact
from resolver._shared_errors import drop_tracebacks

from ._call import FLIGHT_SERVICE, Begins, Call, End, EndOnce

if TYPE_CHECKING:
    from collections.abc import Mapping

_STATUS: Final = (  # the most specific class first
    (flight.FlightUnavailableError, "UNAVAILABLE"),
    (flight.FlightTimedOutError, "DEADLINE_EXCEEDED"),
    (flight.FlightCancelledError, "CANCELLED"),
    (flight.FlightUnauthenticatedError, "UNAUTHENTICATED"),
    (flight.FlightUnauthorizedError, "PERMISSION_DENIED"),
    (flight.FlightInternalError, "INTERNAL"),
    (pa.ArrowNotImplementedError, "UNIMPLEMENTED"),
    (pa.ArrowKeyError, "NOT_FOUND"),
    (pa.ArrowInvalid, "INVALID_ARGUMENT"),
)

_log = logging.getLogger("resolver")


class LayerFactory(flight.ClientMiddlewareFactory):  # type: ignore[misc]  # pyarrow is untyped
    """One layer, around the calls of one client."""

    def __init__(self, layer: Begins) -> None:
        super().__init__()
        self._layer = layer
        self.failure: BaseException | None = None
        """What the layer raised at the last call, if it did."""
        self._sent: tuple[tuple[str, str | bytes], ...] = ()
        self._of_thread = threading.local()
        self.has_remedy = hasattr(layer, "refused")

    def last_call(self) -> Call | None:
        """What the layer was shown last on this thread."""
        return getattr(self._of_thread, "call", None)

    def refused(self, call: Call | None) -> bool:
        """Ask the layer, after that call was refused, whether to make it once more."""
        return call is not None and bool(self._layer.refused(call))  # type: ignore[attr-defined]

    def start_call(self, info: Any) -> flight.ClientMiddleware:
        """Return the middleware of one call; called by pyarrow in the caller's thread."""
        name = info.method.name.title().replace("_", "")
        call = Call(f"/{FLIGHT_SERVICE}/{name}")
        end = None
        try:
            end = self._layer.begin(call)
            check_sendable(call.headers)
            grouped: dict[str, list[str | bytes]] = {}
            for header, value in call.headers:
                grouped.setdefault(header, []).append(value)
        # Also a KeyboardInterrupt: pyarrow would swallow it and send the call regardless.
        except BaseException as error:  # noqa: BLE001
            if type(error) is not type(self.failure):  # once per kind of failure; no secrets
                _log.error(
                    "A %s layer refused a call (%s); pyarrow reports such calls as "
                    "FlightInternalError",
                    type(self._layer).__name__,
                    type(error).__name__,
                )
            drop_tracebacks(error)
            self.failure = error
            if end is not None:  # it is the headers that it added
                EndOnce(end)("INTERNAL")
            return _OneCall(REFUSE_CALL, None)
        self.failure = None
        self._of_thread.call = call
        self._sent = tuple(call.headers)
        return _OneCall(grouped, end)

    def redact(self, text: str) -> str:
        """``text`` without the values of the headers last sent. For the connector's probe."""
        return redact(text, self._sent)


class _OneCall(flight.ClientMiddleware):  # type: ignore[misc]  # pyarrow is untyped
    def __init__(self, headers: Mapping[str, Any], end: End | None) -> None:
        super().__init__()
        self._headers = headers
        self._end = None if end is None else EndOnce(end)

    def sending_headers(self) -> Mapping[str, Any]:
        return self._headers

    def call_completed(self, exception: BaseException | None) -> None:
        if self._end is not None:
            self._end("OK" if exception is None else _status(exception))

    def __del__(self) -> None:
        # A stream that is dropped before its end is cancelled, and pyarrow does not say so.
        if self._end is not None:
            self._end("CANCELLED")


def _status(error: BaseException) -> str:
    return next((name for kind, name in _STATUS if isinstance(error, kind)), "UNKNOWN")
