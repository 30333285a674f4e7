"""How many slots each worker has: asked once, remembered for a while.

A query is planned for all slots together. A worker that does not answer is planned for
as if it had one; whether it can be used is found out when it is.
"""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from resolver._errors import ResolverError

from ._calls import worker_info
from ._threads import call_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resolver._resolver import ChannelResolver

    from ._inputs import Headers

__all__ = ["SlotCounts", "WorkerSlots"]

_REMEMBERED: Final = 30.0  # seconds
_REMEMBERED_SILENCE: Final = 2.0  # seconds
_MAX_SLOTS: Final = 4_096


@dataclass(frozen=True, slots=True)
class WorkerSlots:
    """A worker, and how many partitions it runs at a time."""

    url: str
    slots: int


class SlotCounts:
    """Answers from memory while it can. Thread-safe."""

    def __init__(self, resolver: ChannelResolver) -> None:
        self._resolver = resolver
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, int]] = {}  # until when, slots

    def of(
        self, urls: Sequence[str], *, headers: Headers, timeout: float
    ) -> tuple[WorkerSlots, ...]:
        """The slots of the workers at ``urls``, in their order."""
        now = time.monotonic()
        with self._lock:
            unknown = [url for url in urls if self._known.get(url, (0.0, 0))[0] <= now]
        ask = functools.partial(self._ask, headers=headers, timeout=timeout)
        answers = call_all([functools.partial(ask, url) for url in unknown], name="slots")
        with self._lock:
            for url, slots in zip(unknown, answers, strict=True):
                kept = _REMEMBERED if slots is not None else _REMEMBERED_SILENCE
                self._known[url] = (now + kept, slots or 1)
            return tuple(WorkerSlots(url, self._known[url][1]) for url in urls)

    def _ask(self, url: str, *, headers: Headers, timeout: float) -> int | None:
        try:
            info: dict[str, Any] = worker_info(self._resolver, url, timeout, headers=headers)
            return max(1, min(int(info["slots"]), _MAX_SLOTS))
        except (ResolverError, pa.ArrowException, OSError, EOFError, ValueError, KeyError):
            return None
