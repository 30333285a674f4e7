"""How long a worker that could not be reached is left alone: growing, jittered, per URL.

The policy behind ``failure_ttl``. Knows no cache, no connector and no transport, starts
no thread and never sleeps: it says until when a failure is remembered, and forgets.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

GROWTH: Final = 2.0
"""Each failure in a row is remembered so many times as long as the one before."""

JITTER: Final = 0.2
"""Up to this share of a time is left out, so that callers do not come back in step."""

DEFAULT_CAP: Final = 32.0
"""The longest time, as a multiple of the first, where the user named none."""


class Failure(NamedTuple):
    """The last failure of a URL that has not been reached since."""

    error: BaseException
    in_a_row: int
    """How many; those of lanes that failed together count as one."""
    until: float
    """When to try again, on the clock of `FailureMemory.now`."""


class _Pardon(NamedTuple):
    """Stands where a failure was forgotten: what began before it has no say."""

    until: float


class FailureMemory:
    """Remembers, per URL, the failures since the last success. Thread-safe.

    ``first`` and ``longest`` are seconds: the n-th failure in a row is remembered for
    ``first * 2**(n - 1)`` seconds, at most ``longest``, less up to a fifth at random.
    A URL that nobody tried for ``longest`` seconds after that starts over. ``capacity``
    bounds the number of URLs; those to be tried again soonest go first.

    Every step is one dict operation and no lock is held, so that a finalizer may run
    in the middle and come back here. What two threads do to one URL at the same time
    may therefore be done once.
    """

    __slots__ = ("_capacity", "_failures", "_first", "_longest", "_random", "_skew")

    def __init__(
        self,
        first: float,
        longest: float,
        *,
        capacity: int,
        choose: Callable[[], float] = random.random,
    ) -> None:
        self._first = first
        self._longest = longest
        self._capacity = capacity
        self._random = choose
        self._failures: dict[str, Failure | _Pardon] = {}
        self._skew = 0.0

    def now(self) -> float:
        """The time that `Failure.until` is measured on, in seconds."""
        return time.monotonic() + self._skew

    def advance_clock(self, seconds: float) -> None:
        """Move the clock, for tests."""
        self._skew += seconds

    def failed(self, key: str, error: BaseException, began: float) -> Failure | None:
        """Remember the failure of a connect that began at `began`, on this clock.

        None when `key` was forgotten meanwhile: then the failure is old news. `error`
        must be nobody else's and without a traceback.
        """
        now = self.now()
        last = self._failures.get(key)
        count = 1
        if isinstance(last, Failure):
            if now < last.until:
                return last  # of another lane of this URL, that connected at the same time
            if now < last.until + self._longest:
                count = last.in_a_row + 1
        elif last is not None and began <= last.until:
            return None
        # As an exponent, the count of a worker that is down for a week would overflow.
        seconds = min(self._first * GROWTH ** min(count - 1, 64), self._longest)
        seconds *= 1.0 - JITTER * self._random()
        failure = Failure(error, count, now + seconds)
        self._failures[key] = failure
        if len(self._failures) > self._capacity:
            self.prune()
        return failure

    def current(self, key: str) -> Failure | None:
        """The failure that answers for `key` now, or None when it may be tried."""
        failure = self._failures.get(key)
        return failure if isinstance(failure, Failure) and self.now() < failure.until else None

    def reached(self, key: str) -> None:
        """A connect succeeded: the next failure is the first again."""
        if key in self._failures:
            self.forget(key)

    def forget(self, key: str) -> Failure | None:
        """Start `key` over, whatever is under way; returns what was remembered."""
        last = self._failures.get(key)
        self._failures[key] = _Pardon(self.now())
        return last if isinstance(last, Failure) else None

    def keys(self) -> list[str]:
        """The URLs of which anything is remembered. A snapshot."""
        return list(self._failures)

    def clear(self) -> None:
        """Forget everything."""
        self._failures = {}

    def prune(self) -> None:
        """Drop what has no say any more, and what is too much."""
        now = self.now()
        kept = []
        for key, failure in list(self._failures.items()):
            if now >= failure.until + self._longest:
                self._failures.pop(key, None)
            else:
                kept.append((failure.until, key))
        surplus = len(kept) - self._capacity
        if surplus > 0:
            # An eighth more than needed, so that not every failure has to sort.
            for _, key in sorted(kept)[: surplus + self._capacity // 8]:
                self._failures.pop(key, None)

    def __len__(self) -> int:
        return len(self._failures)
