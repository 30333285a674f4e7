"""Threads for concurrency tests: started together, joined in time, never silent."""

from __future__ import annotations

import gc
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

DEADLINE = 30.0
"""Seconds after which a test that still waits has failed; nothing here takes that long."""


def run_concurrently(works: Iterable[Callable[[], T]], *, deadline: float = DEADLINE) -> list[T]:
    """Run each of `works` on a thread of its own and return what they returned, in order.

    All start at one barrier. Raises what the first of them raised, or TimeoutError when
    one has not ended after `deadline` seconds.
    """
    works = list(works)
    barrier = threading.Barrier(len(works))
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(index: int, work: Callable[[], T]) -> None:
        try:
            barrier.wait(deadline)
            results[index] = work()
        except BaseException as error:
            errors[index] = error
            barrier.abort()

    threads = [
        threading.Thread(target=run, args=each, name=f"concurrently-{each[0]}", daemon=True)
        for each in enumerate(works)
    ]
    until = time.monotonic() + deadline
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    if errors:
        causes = [e for e in errors.values() if not isinstance(e, threading.BrokenBarrierError)]
        raise (causes or list(errors.values()))[0]
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        raise TimeoutError(f"still running after {deadline:g} s: {', '.join(stuck)}")
    return [results[index] for index in range(len(works))]


def elsewhere(work: Callable[[], T]) -> T:
    """What `work` returns on a thread of its own, that has ended.

    On a free-threaded build, the end of an object is the business of the thread that made
    it while that runs; what a thread made that is gone ends where its last reference does.
    """
    (result,) = run_concurrently([work])
    return result


class Background:
    """One thread whose result is asked for later; `result` raises what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._outcome: list[tuple[object, BaseException | None]] = []

        def run() -> None:
            try:
                self._outcome.append((work(), None))
            except BaseException as error:
                self._outcome.append((None, error))

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the work returned or raised."""
        return bool(self._outcome)

    def result(self, deadline: float = DEADLINE) -> object:
        """What the work returned, once it has."""
        self._thread.join(deadline)
        if not self._outcome:
            raise TimeoutError(f"still running after {deadline:g} s")
        result, error = self._outcome[0]
        if error is not None:
            raise error
        return result


def wait_until(condition: Callable[[], object], *, deadline: float = DEADLINE) -> None:
    """Return once `condition()` is true; TimeoutError after `deadline` seconds."""
    until = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not true within {deadline:g} s: {condition}")
        time.sleep(0.001)


def wait_until_collected(condition: Callable[[], object], *, deadline: float = DEADLINE) -> None:
    """`wait_until`, with garbage collected before each look: one pass need not be all of it."""
    wait_until(lambda: gc.collect() >= 0 and condition(), deadline=deadline)
