"""Awaitables run to their end by blocking code, on event loops that are kept.

Awaited, DataFusion's streams can be dropped at any time; a blocking read only between
two batches. Making a loop costs more than running a small partition, hence they stay.
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

_idle: list[asyncio.AbstractEventLoop] = []
# A forked child has none of the threads that run these.
os.register_at_fork(after_in_child=_idle.clear)


class _Call:
    """One coroutine on a loop of its own. ``done`` gets its index once it has ended."""

    def __init__(
        self, index: int, coroutine: Coroutine[Any, Any, Any], done: queue.SimpleQueue[int]
    ) -> None:
        self._index = index
        self._coroutine = coroutine
        self._done = done
        self._loop = _taken()
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
        _give_back(self._loop)
        self._done.put(self._index)

    def cancel(self) -> None:
        # Starts before this, in the order of the calls. A loop that is closed has ended it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())


def run_all(
    coroutines: Sequence[Coroutine[Any, Any, _T]], *, check: Callable[[], object]
) -> list[_T]:
    """The results of all ``coroutines``, in their order, each run by a thread of its own.

    Raises the first error, or what ``check`` raises, which is called several times a
    second; the others are cancelled first.
    """
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    calls = [_Call(index, coroutine, done) for index, coroutine in enumerate(coroutines)]
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
        loop.call_soon(loop.stop)
