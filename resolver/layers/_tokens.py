"""A token that somebody else issues: asked for rarely, by one at a time, and kept until it ends.

Knows no calls and no headers; that is `_bearer`'s business. The provider runs on a thread of
its own, so nobody waits for it longer than he said he would.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, TypeAlias

from resolver._errors import ResolverError
from resolver._headers import normalize_headers
from resolver._shared_errors import drop_tracebacks, without_traceback

_FIRST_REST: Final = 0.5  # seconds after a provider's first failure until it is asked again
_LONGEST_REST: Final = 30.0
_HANGING: Final = 60.0
"""Seconds after which a provider that has not returned is asked once more beside; twice that the
next time, and so on, for each of them keeps a thread."""
_LONGEST_HANGING: Final = 3600.0
_SETTLING: Final = 1.0  # seconds for which a token that was just forced is not forced again

_log = logging.getLogger("resolver")


class Token(NamedTuple):
    """A token and when it ends, in seconds since 1970; None: it is not known."""

    value: str
    expires_at: float | None = None

    def __repr__(self) -> str:
        return f"Token('***', expires_at={self.expires_at!r})"


Asking: TypeAlias = "Future[Token | BaseException]"
"""The token that somebody waits for, or why there is none: an outcome, in both cases."""

Provider: TypeAlias = Callable[[], str | Token | Awaitable[str | Token]]


class TokenUnavailableError(ResolverError):
    """There is no valid token to send a call with. Holds no token; its cause is the provider's."""


class TokenSource:
    """The current token of one provider. Thread-safe, and for any number of event loops."""

    def __init__(self, provider: Provider, refresh_before: float) -> None:
        self._provider = provider
        self._refresh_before = refresh_before
        self._start_over()

    def _start_over(self) -> None:
        # Re-entrant: the end of a call may be a finalizer's, which runs anywhere.
        self._lock = threading.RLock()
        self._token: Token | None = None
        self._is_forced = False
        self._obtained_at = -math.inf
        self._asking: Asking | None = None
        self._forced: Asking | None = None
        """The same, if the current token was refused."""
        self._asked_at = -math.inf
        self._hanging = 0  # of those who were asked, and are waited for no more
        self._failure: BaseException | None = None
        self._failures_in_a_row = 0
        self._rest_until = -math.inf
        self._pid = os.getpid()  # last: from here on others use the rest
        self._ahead_after = -math.inf

    def current(self) -> str | None:
        """The token if it is valid now; has it renewed in the background when it soon is not."""
        token = self._token
        if token is None or self._pid != os.getpid():
            return None
        left = _left(token)
        if left <= 0:
            return None
        if left <= self._refresh_before and time.monotonic() >= self._ahead_after:
            self._ask(token.value)
        return token.value

    def get(self, patience: float, *, once: bool = False) -> str:
        """The token; waits for a new one for up to ``patience`` seconds where there is none.

        For a call that can be made only ``once``, also where the token was just refused.
        Raises ``TokenUnavailableError``.
        """
        token = self.current()
        asking = self._wanted(token, once)
        if asking is not None:
            futures.wait((asking,), max(patience, 0))
        return _value(asking, patience, token)

    async def get_async(self, patience: float, *, once: bool = False) -> str:
        """As `get`; cancelling one who waits leaves the others their token."""
        token = self.current()
        asking = self._wanted(token, once)
        if asking is not None:
            await _wait_for(asking, patience)
        return _value(asking, patience, token)

    def _wanted(self, token: str | None, once: bool) -> Asking | None:
        """What to wait for; None: nothing, the token will do."""
        if token is None:
            return self._ask(None)
        return self._forced if once else None

    def renew(self, refused: str) -> None:
        """Begin to get another token than the ``refused`` one; waits for nobody."""
        self._replacing(refused)

    def replace(self, refused: str, patience: float) -> bool:
        """Get another token than the ``refused`` one; whether there is any now."""
        asking = self._replacing(refused)
        if isinstance(asking, bool):
            return asking
        futures.wait((asking,), max(patience, 0))
        return _is_another(asking, refused)

    async def replace_async(self, refused: str, patience: float) -> bool:
        """As `replace`."""
        asking = self._replacing(refused)
        if isinstance(asking, bool):
            return asking
        await _wait_for(asking, patience)
        return _is_another(asking, refused)

    def _replacing(self, refused: str) -> bool | Asking:
        token = self._token
        if token is not None and token.value != refused:
            return True  # somebody was refused before, and has seen to it
        if self._is_forced and time.monotonic() - self._obtained_at < _SETTLING:
            return False  # it is new, and refused all the same: another will not do
        return self._ask(refused, force=True)

    def _ask(self, outdated: str | None, *, force: bool = False) -> Asking:
        """Have the provider asked, unless it is being asked, or failed a moment ago."""
        if self._pid != os.getpid():
            self._start_over()  # a thread that is not here was asking
        asking: Asking = Future()
        with self._lock:
            now = time.monotonic()
            if self._asking is not None:
                if force:
                    self._forced = self._asking
                if now - self._asked_at < min(_HANGING * 2**self._hanging, _LONGEST_HANGING):
                    return self._asking
                self._hanging += 1
                self._asking = self._forced = None
            token = self._token
            if token is not None and token.value != outdated and _is_valid(token):
                asking.set_result(token)  # it came while we were on our way here
                return asking
            if now < self._rest_until and self._failure is not None:
                asking.set_result(self._failure)
                return asking
            asking.set_running_or_notify_cancel()  # from here on nobody can cancel it
            self._asking, self._asked_at = asking, now
            self._forced = asking if force else None
        renewing = threading.Thread(
            target=self._renew, args=(asking, force), name="resolver-token", daemon=True
        )
        try:
            renewing.start()
        except RuntimeError:  # out of threads, or the interpreter ends
            self._renew(asking, force)
        return asking

    def _renew(self, asking: Asking, force: bool) -> None:
        outcome: Token | BaseException
        try:
            outcome = _checked(_called(self._provider))
        except BaseException as error:  # noqa: BLE001 -- whoever waits must hear of it
            drop_tracebacks(error)  # its frames, and those of its causes, may hold a token
            outcome = error
        is_first_failure = False
        with self._lock:
            now = time.monotonic()
            is_late = self._asking is not asking  # others have been asked since
            self._hanging = max(self._hanging - is_late, 0)
            if isinstance(outcome, Token):
                if not is_late or self._token is None or not _is_valid(self._token):
                    self._keep(outcome, now, force)
            elif not is_late:
                is_first_failure = self._failures_in_a_row == 0
                rest = min(_FIRST_REST * 2 ** min(self._failures_in_a_row, 16), _LONGEST_REST)
                self._failures_in_a_row += 1
                self._failure, self._rest_until = outcome, now + rest
            if not is_late:
                self._asking = self._forced = None
        asking.set_result(outcome)  # a log may be slow, or fail
        if is_first_failure:  # of many in a row; without its words, which may hold anything
            _log.error("The provider of a bearer token failed (%s)", type(outcome).__name__)

    def _keep(self, token: Token, now: float, force: bool) -> None:
        if self._token is not None and _left(self._token) > 0:
            # What was got ahead of time may end soon itself, or be the same as before: that
            # is no reason to ask again at each call.
            self._ahead_after = now + max(_left(token) / 2, _FIRST_REST)
        self._token, self._obtained_at, self._is_forced = token, now, force
        self._failure, self._failures_in_a_row = None, 0


def _called(provider: Provider) -> Any:
    given = provider()
    return asyncio.run(_awaited(given)) if inspect.isawaitable(given) else given


async def _awaited(given: Awaitable[str | Token]) -> str | Token:
    return await given


def _checked(given: Any) -> Token:
    """A token that can be sent and is valid; errors hold none of it."""
    token = Token(given) if isinstance(given, str) else given
    if not isinstance(token, Token) or not isinstance(token.value, str):
        raise TypeError(f"the provider gives a str or a Token, not {type(given).__name__}")
    end: object = token.expires_at
    if end is not None and (isinstance(end, bool) or not isinstance(end, (int, float))):
        raise TypeError(f"expires_at is in seconds since 1970 or None, not {type(end).__name__}")
    if not token.value or " " in token.value:
        raise ValueError("the provider gave an empty token, or one with blanks; leave 'Bearer' out")
    normalize_headers({"authorization": f"Bearer {token.value}"})
    if not _is_valid(token):
        raise ValueError("the provider gave a token that has expired")
    return token


def _is_valid(token: Token) -> bool:
    return _left(token) > 0


def _left(token: Token) -> float:
    """Seconds until it ends."""
    return math.inf if token.expires_at is None else token.expires_at - time.time()


async def _wait_for(asking: Asking, patience: float) -> None:
    waiting = asyncio.wrap_future(asking)
    try:
        await asyncio.wait((waiting,), timeout=max(patience, 0))
    finally:
        waiting.cancel()  # the wrapper: what runs cannot be cancelled


def _value(asking: Asking | None, patience: float, token: str | None) -> str:
    """What the provider gave, if it did in time, or the ``token`` there was."""
    outcome = asking.result() if asking is not None and asking.done() else None
    if isinstance(outcome, Token):
        return outcome.value
    if token is not None:
        return token
    if outcome is None:
        raise TokenUnavailableError(
            f"the provider of the bearer token did not answer within {max(patience, 0):.3g} s, and "
            "no call is sent without a token; raise timeout, or mend the provider"
        )
    raise TokenUnavailableError(
        f"the provider of the bearer token failed ({type(outcome).__name__}), and no call is sent "
        "without a token"
    ) from without_traceback(outcome)


def _is_another(asking: Asking, refused: str) -> bool:
    if not asking.done():
        return False
    outcome = asking.result()
    return isinstance(outcome, Token) and outcome.value != refused
