"""Runs a worker's tasks, a few at a time, on threads that nobody has to wait for.

A call that starts a task and the calls that wait for it are different ones, each with a
short deadline; what they have in common is kept here, until the query is over. What a
task does is not this module's business.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from ._wire import UnknownOutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ._wire import OutputKey

__all__ = ["TaskCancelledError", "TaskPool", "TaskPoolFullError"]

_CANCEL_POLL: Final = 0.1  # seconds between looks at whether a waiting caller is still there

_MAX_QUEUED: Final = 1_024
"""Tasks that may wait for a slot, each with the bytes of its plan.

A query has at most as many here as it has stages; so many wait only when something is
wrong, and then a refusal that says so is better than memory that runs out.
"""

_T = TypeVar("_T")


class TaskPoolFullError(Exception):
    """So many tasks wait already that one more should run elsewhere, or later."""


class TaskCancelledError(Exception):
    """The task was stopped before its end: nobody waits for it, or its query is over."""


@dataclass(slots=True, eq=False)
class _Task(Generic[_T]):
    """One task. ``result`` and ``error`` are written once, before ``done`` is set.

    ``run`` is given up as soon as it is not needed: it holds the bytes of a plan.
    """

    run: Callable[[Callable[[], bool]], _T] | None
    result: _T | None = None
    error: BaseException | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def fail(self, error: BaseException) -> None:
        # Kept for as long as the query: without the frames, and all they hold.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        self.error = error


class TaskPool(Generic[_T]):
    """At most ``slots`` tasks at once, the others queued in the order they came. Thread-safe.

    ``max_queued`` limits how many wait. The threads are daemons: an interpreter that exits
    does not wait for a task.
    """

    def __init__(self, slots: int, *, max_queued: int = _MAX_QUEUED) -> None:
        if slots < 1:
            raise ValueError(f"a pool of {slots} slots; it needs at least 1")
        self.slots: Final = slots
        self._max_queued = max_queued
        self._lock = threading.Lock()
        self._queries: dict[str, dict[OutputKey, _Task[_T]]] = {}
        self._queue: OrderedDict[_Task[_T], None] = OrderedDict()
        self._running = 0
        self._closed = False

    @property
    def running(self) -> int:
        """How many tasks run now, those included that were cancelled and have not noticed."""
        return self._running

    @property
    def queued(self) -> int:
        """How many tasks wait for a slot."""
        return len(self._queue)

    def start(self, key: OutputKey, run: Callable[[Callable[[], bool]], _T]) -> None:
        """Run ``run(is_cancelled)`` as the task ``key``, now or when a slot is free.

        ``is_cancelled()`` tells the task, from any thread, that its result is not wanted
        any more. Raises ``FileExistsError`` for a key that has been started before,
        ``TaskPoolFullError`` when no more may wait, and ``TaskCancelledError`` after
        ``close()``.
        """
        task = _Task(run)
        with self._lock:
            if self._closed:
                raise TaskCancelledError("the worker is shutting down")
            if key in self._queries.get(key.query, ()):
                raise FileExistsError(f"{key} has been started already")
            has_slot = self._running < self.slots
            if not has_slot and len(self._queue) >= self._max_queued:
                raise TaskPoolFullError(f"{len(self._queue):,} tasks wait here already")
            self._queries.setdefault(key.query, {})[key] = task
            self._queue[task] = None
            self._running += has_slot
        if has_slot:
            try:
                threading.Thread(target=self._run_queued, name="task", daemon=True).start()
            except BaseException:
                self._thread_failed(key, task)
                raise

    def wait(
        self, key: OutputKey, seconds: float, is_cancelled: Callable[[], bool] = lambda: False
    ) -> _T | None:
        """The result of the task ``key``, or ``None`` if it still runs after ``seconds``.

        Raises what the task raised, to everyone who asks; ``UnknownOutputError`` for a key
        that is not known, or no longer. When ``is_cancelled()``, asked several times a second,
        becomes true, cancels the task and raises ``TaskCancelledError``.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            task = self._queries.get(key.query, {}).get(key)
        if task is None:
            raise UnknownOutputError(key)
        while not task.done.wait(max(0.0, min(_CANCEL_POLL, deadline - time.monotonic()))):
            if is_cancelled():
                self._cancel([task])
                raise TaskCancelledError("the caller has gone away")
            if time.monotonic() >= deadline:
                return None
        if task.error is not None:
            raise task.error.with_traceback(None)  # or it would grow with every asking
        return task.result

    def release(self, query: str) -> None:
        """Cancel the tasks of ``query`` and forget them. Idempotent."""
        with self._lock:
            tasks = self._queries.pop(query, {})
        self._cancel(tasks.values())

    def close(self) -> None:
        """Cancel all tasks and start no more. Idempotent; does not wait for them."""
        with self._lock:
            self._closed = True
            queries = list(self._queries)
        for query in queries:
            self.release(query)

    def _cancel(self, tasks: Iterable[_Task[_T]]) -> None:
        """Tell running tasks, and end queued ones here and now."""
        with self._lock:
            for task in tasks:
                task.cancelled.set()
                if task in self._queue:
                    del self._queue[task]
                    task.run = None
                    task.fail(TaskCancelledError("the task was cancelled before it began"))
                    task.done.set()

    def _thread_failed(self, key: OutputKey, task: _Task[_T]) -> None:
        with self._lock:
            self._running -= 1
            self._queries.get(key.query, {}).pop(key, None)
        self._cancel([task])

    def _run_queued(self) -> None:
        """Run queued tasks until there are none: the life of a thread."""
        while True:
            with self._lock:
                if not self._queue:
                    self._running -= 1
                    return
                task, _ = self._queue.popitem(last=False)
                run, task.run = task.run, None
            assert run is not None
            try:
                task.result = run(task.cancelled.is_set)
            except BaseException as error:  # noqa: BLE001  # a Rust panic is one
                task.fail(error)
            del run
            task.done.set()
            del task
