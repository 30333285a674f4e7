"""Awaiting a hit, beside awaiting a Python coroutine that returns a `dict` entry.

``python -m benchmarks.bench_aio`` prints the ratio: the median over fresh processes of the
median of pairs that were measured right after one another.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from resolver.aio import DefaultChannelResolver

from .measure import URLS, heading, median_ratio

RESOLVER = "await resolver"
COROUTINE = "await a coroutine: dict[url]"
NAMES = (RESOLVER, COROUTINE)
AT_MOST = 0.7
"""What the resolver's may cost of the coroutine's."""

_ROUNDS = 4  # of all URLs, per measurement: about 1 ms


class _Connector:
    async def connect(self, url: str) -> object:
        return url, object()


async def lookups() -> dict[str, Callable[[str], Awaitable[Any]]]:
    """The contestants, each of which holds every URL on the running loop."""
    resolver = DefaultChannelResolver(_Connector())
    clients = {url: await resolver.get_flight_client_for_url(url) for url in URLS}

    async def from_dict(url: str) -> Any:
        return clients[url]

    found = {RESOLVER: resolver.get_flight_client_for_url, COROUTINE: from_dict}
    for name, look_up in found.items():
        for url in URLS:
            if await look_up(url) is not clients[url]:
                raise RuntimeError(f"{name} does not hold {url}")
    return found


async def await_all(look_up: Callable[[str], Awaitable[Any]], rounds: int) -> None:
    """What is timed: a plain loop over strings that the caller holds."""
    for _ in range(rounds):
        for url in URLS:
            await look_up(url)


async def measure_here(turns: int) -> float:
    """The resolver's time over the coroutine's, in this process."""
    contestants = list((await lookups()).items())
    times: dict[str, list[float]] = {name: [] for name, _ in contestants}
    for turn in range(turns + 1):
        for name, look_up in contestants:
            # Only this thread works, so its own processor time leaves other work out.
            start = time.thread_time()
            await await_all(look_up, _ROUNDS)
            if turn:
                times[name].append(time.thread_time() - start)
        contestants.reverse()
    return median_ratio(times[RESOLVER], times[COROUTINE])


def measure(*, processes: int = 5, turns: int = 201) -> float:
    """The median of as many fresh processes, each with a hash seed of its own."""
    ratios = []
    for seed in range(processes):
        command = [sys.executable, "-m", "benchmarks.bench_aio", str(turns)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        ratios.append(float(done.stdout))
    return statistics.median(ratios)


@pytest.mark.benchmark(group="512 awaited hits")
@pytest.mark.parametrize("name", NAMES)
def bench_awaited_hit(benchmark: Callable[..., object], name: str) -> None:
    with asyncio.Runner() as runner:
        look_up = runner.run(lookups())[name]
        benchmark(lambda: runner.run(await_all(look_up, 1)))


def bench_ratio(benchmark: Callable[..., object]) -> None:
    """Not judged here: `python -m benchmarks` does."""
    assert benchmark.pedantic(measure, kwargs={"processes": 1, "turns": 3}, rounds=1) > 0  # type: ignore[attr-defined]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(asyncio.run(measure_here(int(sys.argv[1]))))
    else:
        print(heading())
        print(f"{RESOLVER} / {COROUTINE}: {measure():.2f}x, at most {AT_MOST}x")
