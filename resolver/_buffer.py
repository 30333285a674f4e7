"""What waits between those who fetch endpoints and who reads: bounds, order, and the end.

The state and the decisions of both `Fetch` classes, the one with threads and the one with
tasks; each has a condition that is their lock, and waits in its own way. Nothing here waits.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Any, Final

from ._errors import ForkedProcessError, ResolverError

NOT_YET: Final = object()


def interrupted() -> ResolverError:
    """What who reads on is told after a cancellation, or a signal, in the middle."""
    return ResolverError(
        "Reading was interrupted half-way, and every stream has ended: read from the start"
    )


def no_schema(*, is_closed: bool) -> ResolverError:
    """What who asks for the schema is told where there is none."""
    if is_closed:
        return ResolverError("This was closed before an endpoint told the schema: read anew")
    return ResolverError("The FlightInfo has neither a schema nor an endpoint to ask for it")


class Buffer:
    """At most ``prefetch + 1`` batches of `count` endpoints.

    The endpoint that an ordered reader waits for may always put one, so a full buffer of later
    ones is no deadlock where endpoints are begun in their order.
    """

    _changed: Any  # a condition, of threads or of asyncio

    def __init__(self, count: int, *, ordered: bool, prefetch: int) -> None:
        self._process = os.getpid()
        self._count = count
        self._ordered = ordered
        self._prefetch = prefetch
        self._queues: dict[int, deque[Any]] = {}
        self._waiting = 0
        self._peak = 0
        self._head = 0
        self._done: set[int] = set()
        self._schema: Any = None
        self._error: BaseException | None = None
        self._stopped = False

    @property
    def peak(self) -> int:
        """The most batches that ever waited at once."""
        return self._peak

    @property
    def is_stopped(self) -> bool:
        """Whether every job was ended before its time."""
        return self._stopped

    @property
    def _is_inherited(self) -> bool:
        """Whether this is a forked child, where the streams are the parent's, to leave alone."""
        return self._process != os.getpid()

    def _check_process(self) -> None:
        if self._is_inherited:
            raise ForkedProcessError(
                f"Process {self._process} was reading here when this process was forked from it, "
                "and gRPC does not survive a fork: read in one of them alone, or start processes "
                "with the 'spawn' or 'forkserver' method of multiprocessing"
            )

    def _next_locked(self) -> Any:
        """The next batch, None at the end, NOT_YET where the reader must wait."""
        while True:
            if self._error is not None:
                raise self._error
            if self._stopped:
                return None
            if queue := self._queues.get(self._head):
                self._waiting -= 1
                self._changed.notify_all()
                return queue.popleft()
            if len(self._done) == self._count and not self._waiting:
                return None
            if not self._ordered or self._head not in self._done:
                return NOT_YET
            self._queues.pop(self._head, None)
            self._head += 1
            self._changed.notify_all()  # whose turn it is may put beyond the bound

    def _first_schema_locked(self) -> Any:
        """The schema of the endpoint that answered first, None without any, or NOT_YET."""
        if self._error is not None:
            raise self._error
        if self._schema is None and not self._stopped and len(self._done) < self._count:
            return NOT_YET
        return self._schema

    def _has_room_locked(self, index: int) -> bool:
        if self._waiting < self._prefetch:
            return True
        slot = self._slot(index)
        return slot == self._head and not self._queues.get(slot)

    def _put_locked(self, index: int, batch: Any) -> None:
        self._queues.setdefault(self._slot(index), deque()).append(batch)
        self._waiting += 1
        self._peak = max(self._peak, self._waiting)
        self._changed.notify_all()

    def _slot(self, index: int) -> int:
        return index if self._ordered else 0

    def _stop_locked(self) -> None:
        self._stopped = True
        self._queues.clear()
        self._waiting = 0
