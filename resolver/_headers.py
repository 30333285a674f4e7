"""Headers that a Flight client sends with every call: their rules and their middleware.

A call never leaves with other headers than its connector asked for. pyarrow swallows
whatever a middleware raises and sends the call without that middleware's headers, so
a token provider that fails would turn an authenticated call into an anonymous one;
here such a call is refused before it reaches the wire. Nothing in this module puts a
header's value into a message or a log.
"""

from __future__ import annotations

import base64
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeAlias

from pyarrow import flight

from ._shared_errors import drop_tracebacks

HeaderValue: TypeAlias = str | bytes
StaticHeaders: TypeAlias = Mapping[str, HeaderValue] | Iterable[tuple[str, HeaderValue]]
Headers: TypeAlias = StaticHeaders | Callable[[], StaticHeaders]
NormalHeaders: TypeAlias = tuple[tuple[str, HeaderValue], ...]

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_TEXT_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
# gRPC and HTTP/2 set these themselves: they would be dropped silently, or refused by
# a strict server as a malformed request.
_RESERVED: Final = frozenset(
    {
        "connection",
        "content-length",
        "content-type",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    }
)
# No header name may hold a space, so gRPC refuses the call on this side of the wire.
REFUSE_CALL: Final = {"resolver could not get the headers of this call": ""}

_SHORTEST_SECRET: Final = 4

_log = logging.getLogger("resolver")

_listening: ContextVar[list[tuple[str, HeaderValue]] | None] = ContextVar(
    "resolver_sent_headers", default=None
)

_deadline: ContextVar[float] = ContextVar("resolver_deadline", default=math.inf)


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Nobody who makes the headers of this block's calls is to take longer (monotonic clock).

    Nor longer than the blocks around it allow.
    """
    token = _deadline.set(min(deadline, _deadline.get()))
    try:
        yield
    finally:
        _deadline.reset(token)


def time_left() -> float:
    """Seconds that those who make headers may take now."""
    return _deadline.get() - time.monotonic()


def normalize_headers(headers: StaticHeaders) -> NormalHeaders:
    """Return ``headers`` as pairs ordered by lower-case name; repeated names stay.

    Raises ``TypeError`` or ``ValueError``, naming the header but never its value.
    """
    given: object = headers
    if isinstance(given, (str, bytes)):
        raise TypeError("headers must be a mapping or (name, value) pairs, not text")
    if not isinstance(given, Iterable):
        raise TypeError(f"headers must be a mapping or pairs, not {type(given).__name__}")
    normal = []
    for pair in headers.items() if isinstance(headers, Mapping) else headers:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:  # noqa: PLR2004 -- a pair
            raise TypeError("headers must be a mapping or (name, value) pairs")
        normal.append((_normal_name(pair[0]), pair[1]))
    for name, value in normal:
        _check_value(name, value)
    return tuple(sorted(normal, key=lambda pair: pair[0]))


class CallHeadersFactory(flight.ClientMiddlewareFactory):  # type: ignore[misc]  # pyarrow is untyped
    """Adds headers to every call of one client; a callable is asked anew each time.

    ``failure`` and ``sent`` tell a connector about the last call; they mean something
    only while one thread has the client to itself, as it has during the probe.
    """

    def __init__(self, headers: NormalHeaders | Callable[[], StaticHeaders]) -> None:
        super().__init__()
        self._provider = headers if callable(headers) else None
        self.sent: NormalHeaders = () if callable(headers) else headers
        self.failure: BaseException | None = None
        self._static = None if callable(headers) else _CallHeaders(_grouped(headers))

    def start_call(self, info: Any) -> flight.ClientMiddleware:  # noqa: ARG002 -- pyarrow's
        """Return the middleware of one call; called by pyarrow in the caller's thread."""
        if self._provider is None:
            return self._static
        try:
            self.sent = normalize_headers(self._provider())
        # Also a KeyboardInterrupt: pyarrow would swallow it and send the call bare.
        except BaseException as error:  # noqa: BLE001
            # Once per failure, not per call; its text or its frames may hold the token.
            if type(error) is not type(self.failure):
                _log.error(
                    "The headers callable of a FlightConnector failed (%s); calls are refused "
                    "until it recovers",
                    type(error).__name__,
                )
            drop_tracebacks(error)  # they would keep the caller's frames alive, too
            self.failure = error
            return _CallHeaders(REFUSE_CALL)
        self.failure = None
        return _CallHeaders(_grouped(self.sent))

    def redact(self, text: str) -> str:
        """`redact` of this module, for the headers last sent."""
        return redact(text, self.sent)


def check_sendable(headers: Iterable[tuple[str, HeaderValue]]) -> None:
    """Refuse what pyarrow would silently leave out; names the header, never its value."""
    for name, value in headers:
        if not isinstance(name, str):
            raise TypeError(f"a header name is a str, not {type(name).__name__}")
        if not isinstance(value, (str, bytes)):
            raise TypeError(f"the value of header {name!r} is no {type(value).__name__}, but a str")
        if not (name.isascii() and (isinstance(value, bytes) or value.isascii())):
            raise ValueError(f"header {name!r} and its value must be ASCII")


@contextmanager
def listen_to_headers() -> Iterator[list[tuple[str, HeaderValue]]]:
    """A list of what layers of this package send with the calls of this block."""
    sent: list[tuple[str, HeaderValue]] = []
    token = _listening.set(sent)
    try:
        yield sent
    finally:
        _listening.reset(token)


def note_headers(headers: Iterable[tuple[str, HeaderValue]]) -> None:
    """Tell who listens, if anybody does, what a layer sends."""
    sent = _listening.get()
    if sent is not None:
        sent.extend(headers)


def redact(text: str, headers: Iterable[tuple[str, HeaderValue]]) -> str:
    """``text`` with the headers' values masked: a server may echo what it was sent.

    Each word of a value counts, and the base64 of a binary one. Words of fewer than
    four characters stay: they are no secrets, and half of any text has them in it.
    """
    secrets = {word for _, value in headers for word in _words(value)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


class _CallHeaders(flight.ClientMiddleware):  # type: ignore[misc]  # pyarrow is untyped
    def __init__(self, headers: Mapping[str, Any]) -> None:
        super().__init__()
        self._headers = headers

    def sending_headers(self) -> Mapping[str, Any]:
        return self._headers


def _words(value: HeaderValue) -> list[str]:
    if isinstance(value, str):
        words = [value, *value.split()]
    else:
        encoded = [base64.b64encode(value), base64.urlsafe_b64encode(value)]
        words = [form.decode("ascii") for form in encoded]
        words += [word.rstrip("=") for word in words]
        for text in (value.decode("latin-1"), value.decode("utf-8", "replace")):
            words += [text, *text.split()]
    return [word for word in words if len(word) >= _SHORTEST_SECRET]


def _grouped(headers: NormalHeaders) -> dict[str, list[HeaderValue]]:
    grouped: dict[str, list[HeaderValue]] = {}
    for name, value in headers:
        grouped.setdefault(name, []).append(value)
    return grouped


def _normal_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a header name is a str, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"header name {name!r} may hold letters, digits, '-', '_' and '.' only")
    lower = name.lower()
    if lower in _RESERVED or lower.startswith("grpc-"):
        raise ValueError(f"header {lower!r} belongs to gRPC itself and cannot be set")
    return lower


def _check_value(name: str, value: object) -> None:
    if name.endswith("-bin"):
        if not isinstance(value, bytes):
            raise TypeError(f"header {name!r} needs bytes, as its name ends in '-bin'")
    elif not isinstance(value, str):
        raise TypeError(f"header {name!r} needs a str; for bytes, end its name in '-bin'")
    elif not _TEXT_VALUE.fullmatch(value):
        raise ValueError(
            f"the value of header {name!r} must be printable ASCII without white space at its "
            "ends; strip it, or send bytes under a name that ends in '-bin'"
        )
