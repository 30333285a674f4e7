"""The layer that counts calls and their time, per method."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._layer import Layer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._call import Call, End


@dataclass(frozen=True, slots=True)
class MethodMetrics:
    """What became of the calls of one method. Times are in seconds."""

    started: int
    """Calls begun."""
    in_flight: int
    """Calls that have not ended."""
    statuses: Mapping[str, int]
    """Calls that ended, by the name of their gRPC status."""
    seconds: float
    """Sum of the times of calls that ended; a stream's is until its end."""
    longest: float
    """The longest of these times."""


class CallMetrics(Layer):
    """Counts calls, their statuses and times per method; for all channels it is used for.

    `snapshot` has them by the method's name. ``on_end(method, status, seconds)`` is called
    at each end, on whichever thread it came, for a metrics library of yours; it should be
    quick, and what it raises is only logged. Thread-safe.

    Put it first to count what callers see (waiting for an `InFlightLimit` included), last
    to count what was sent.
    """

    def __init__(self, on_end: Callable[[str, str, float], object] | None = None) -> None:
        if on_end is not None and not callable(on_end):
            raise TypeError("on_end is a callable of method, status and seconds")
        self._on_end = on_end
        # Re-entrant: the end of a call may be a finalizer's, which runs anywhere.
        self._lock = threading.RLock()
        self._methods: dict[str, _Counts] = {}

    def begin(self, call: Call) -> End:
        """Count the call."""
        name = call.name
        with self._lock:
            counts = self._methods.setdefault(name, _Counts())
            counts.started += 1
        began = time.perf_counter()

        def end(status: str) -> None:
            seconds = time.perf_counter() - began
            with self._lock:
                counts.statuses[status] += 1
                counts.seconds += seconds
                counts.longest = max(counts.longest, seconds)
            if self._on_end is not None:
                self._on_end(name, status, seconds)

        return end

    def snapshot(self) -> dict[str, MethodMetrics]:
        """The figures so far, by method; those of one method belong together."""
        with self._lock:
            return {name: counts.snapshot() for name, counts in sorted(self._methods.items())}

    def __repr__(self) -> str:
        return f"CallMetrics({', '.join(sorted(self._methods))})"


class _Counts:
    def __init__(self) -> None:
        self.started = 0
        self.statuses: Counter[str] = Counter()
        self.seconds = 0.0
        self.longest = 0.0

    def snapshot(self) -> MethodMetrics:
        statuses = dict(self.statuses)
        ended = sum(statuses.values())
        return MethodMetrics(
            self.started, self.started - ended, statuses, self.seconds, self.longest
        )
