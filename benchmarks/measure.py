"""Ratios that hold on a noisy machine, and the heading that says what was measured.

An absolute time says as much about the neighbours as about the code. So every figure
that is judged is a ratio of two measurements made right after one another, and the
median of many such pairs.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from resolver import _backend

URLS = [f"http://10.0.{number // 256}.{number % 256}:50051" for number in range(512)]
"""What is looked up: strings that the caller holds, as many as a large cluster has workers."""


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that each contestant took, turn by turn; every other turn in reverse order.

    Contestants should take about as long as one another: a long run is more likely to
    be interrupted by the machine's other work than a short one.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants.items())
    for _, run in order:
        run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for name, run in order:
                start = clock()
                run()
                times[name].append(clock() - start)
            order.reverse()
    finally:
        gc.enable()
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios turn by turn."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def all_at_once(threads: int, run: Callable[[int], object]) -> float:
    """Seconds from the moment that all threads stand ready until the last is done.

    Calls ``run(number)`` on each; raises what the first of them raised.
    """
    began: list[float] = []
    failures: list[BaseException] = []
    barrier = threading.Barrier(threads, action=lambda: began.append(time.perf_counter()))

    def start(number: int) -> None:
        try:
            barrier.wait()
            run(number)
        except BaseException as failure:  # noqa: BLE001 -- raised below, on this thread
            failures.append(failure)

    running = [threading.Thread(target=start, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    taken = time.perf_counter() - began[0]
    if failures:
        raise failures[0]
    return taken


def gil_enabled() -> bool:
    """Whether this interpreter runs one thread at a time."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def heading() -> str:
    """Interpreter, GIL state, implementation and machine, in one line."""
    return (
        f"{platform.python_implementation()} {platform.python_version()} "
        f"{'with the GIL' if gil_enabled() else 'free-threaded'}, "
        f"{_backend.IMPLEMENTATION} cache, {os.cpu_count()} cores of {_cpu_model()}"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
