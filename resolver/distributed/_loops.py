"""Awaitables run to their end by blocking code, on event loops that are kept.

Awaited, DataFusion's streams can be dropped at any time; a blocking read only between
two batches. Making a loop costs more than running a small partition, hence they stay. A
loop is a thread and three open files, hence many awaitables share some.
What is awaited is not this module's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

__all__ = ["run_all"]

_T = TypeVar("_T")
_POLL: Final = 0.1  # seconds
_END_TIMEOUT: Final = 1.0  # seconds for what was cancelled to end
_KEPT: Final = 64
_MOST: Final = 64
"""Loops for one ``run_all()``."""

_idle: list[asyncio.AbstractEventLoop] = []
# A forked child has none of the threads that run these.
os.register_at_fork(after_in_child=_idle.clear)


class _Lane:
    """A loop, until as many calls as it was taken for have ended on it."""

    def __init__(self, calls: int) -> None:
        self.loop = _taken()
        self._calls = calls

    def ended(self) -> None:
        self._calls -= 1
        if not self._calls:
            _give_back(self.loop)


class _Call:
    """One coroutine on a loop. ``done`` gets its index once it has ended."""

    def __init__(
        self,
        index: int,
        coroutine: Coroutine[Any, Any, Any],
        done: queue.SimpleQueue[int],
        lane: _Lane,
    ) -> None:
        self._index = index
        self._coroutine = coroutine
        self._done = done
        self._lane = lane
        self._loop = lane.loop
        self._task: asyncio.Task[Any] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._coroutine)
        # Not a coroutine around it: one that is cancelled before its first step never
        # comes to tell that it has ended.
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self.error = asyncio.CancelledError()
        else:
            self.error = task.exception()
            self.result = None if self.error is not None else task.result()
        self._lane.ended()
        self._done.put(self._index)

    def cancel(self) -> None:
        # Starts before this, in the order of the calls. A loop that is closed has ended it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())


def run_all(
    coroutines: Sequence[Coroutine[Any, Any, _T]], *, check: Callable[[], object]
) -> list[_T]:
    """The results of all ``coroutines``, in their order, run at the same time.

    Each on a thread of its own, but for more than ``_MOST``. Raises the first error, or
    what ``check`` raises, which is called several times a second; the others are cancelled
    first.
    """
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    lanes = _lanes(coroutines)
    calls = [
        _Call(index, coroutine, done, lanes[index % len(lanes)])
        for index, coroutine in enumerate(coroutines)
    ]
    running = set(range(len(calls)))
    try:
        while running:
            try:
                index = done.get(timeout=_POLL)
            except queue.Empty:
                check()
                continue
            running.remove(index)
            error = calls[index].error
            if error is not None:
                raise error
    finally:
        for index in running:
            calls[index].cancel()
        _wait_for(running, done)
    return [call.result for call in calls]


def _lanes(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[_Lane]:
    """As many as ``coroutines`` need, which are closed if there are not so many to be had."""
    lanes: list[_Lane] = []
    try:
        shares = [range(first, len(coroutines), _MOST) for first in range(_MOST)]
        lanes.extend(_Lane(len(share)) for share in shares if share)
    except BaseException:
        for lane in lanes:
            _give_back(lane.loop)
        for coroutine in coroutines:
            coroutine.close()
        raise
    return lanes


def _wait_for(running: set[int], done: queue.SimpleQueue[int]) -> None:
    """Until those have ended; but not for one that computes without ever looking up."""
    try:
        while running:
            running.discard(done.get(timeout=_END_TIMEOUT))
    except queue.Empty:
        pass


def _taken() -> asyncio.AbstractEventLoop:
    try:
        return _idle.pop()
    except IndexError:
        loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(loop,), name="partition", daemon=True).start()
        return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _give_back(loop: asyncio.AbstractEventLoop) -> None:
    if len(_idle) < _KEPT:
        _idle.append(loop)
    else:
        loop.call_soon_threadsafe(loop.stop)
