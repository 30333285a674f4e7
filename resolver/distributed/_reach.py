"""One call to a worker, with the client that the resolver has for it.

Drops a client that turns out to lead nowhere, and calls once more where that is safe and
may help. What an error means for a query is not decided here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

from pyarrow import flight

if TYPE_CHECKING:
    from collections.abc import Callable

    from resolver._resolver import ChannelResolver

__all__ = ["reach"]

_T = TypeVar("_T")

_HANDOVER: Final = 0.02
"""Seconds after which a port that changes hands has changed them; see ``_listener``."""

_FROM_WORKER: Final = (
    flight.FlightUnauthenticatedError,
    flight.FlightUnauthorizedError,
    flight.FlightServerError,
)


def reach(
    resolver: ChannelResolver,
    url: str,
    call: Callable[[flight.FlightClient], _T],
    *,
    may_drop: Callable[[], bool] = lambda: True,
) -> _T:
    """What ``call`` returns or raises, given the client for ``url``.

    A refused connection has brought nothing to the worker. Its port may be empty for a
    moment only, while its certificate is renewed; so ``call`` is then made once more. A client
    whose worker did not answer is dropped, if ``may_drop()``.
    """
    try:
        return _call(resolver, url, call, may_drop)
    except flight.FlightUnavailableError as error:
        if not _was_refused(error):
            raise
    time.sleep(_HANDOVER)
    return _call(resolver, url, call, may_drop)


def _call(
    resolver: ChannelResolver,
    url: str,
    call: Callable[[flight.FlightClient], _T],
    may_drop: Callable[[], bool],
) -> _T:
    client = resolver.get_flight_client_for_url(url)
    try:
        return call(client)
    except _FROM_WORKER:
        raise
    except (flight.FlightError, EOFError) as error:
        if getattr(error, "extra_info", b""):  # the worker's own words
            raise
        # Silent, gone or going.
        invalidate = getattr(resolver, "invalidate", None)
        if invalidate is not None and may_drop():
            invalidate(url, client)
        raise


def _was_refused(error: flight.FlightUnavailableError) -> bool:
    text = str(error).lower()
    return "failed to connect to all addresses" in text and (
        "connection refused" in text or "connection reset" in text or "socket closed" in text
    )
