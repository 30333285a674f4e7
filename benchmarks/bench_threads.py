"""Two threads on disjoint URLs beside one thread, on the resolver and on `dict`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .measure import all_at_once
from .scaling import askers, askers_of_one_url


@pytest.mark.benchmark(group="threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["resolver", "dict"])
def bench_threads(benchmark: Callable[..., object], name: str, threads: int) -> None:
    benchmark(all_at_once, threads, askers(rounds=50)[name])


@pytest.mark.benchmark(group="threads on one URL")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["1 lane", "2 lanes", "dict, one URL", "a dict each"])
def bench_threads_on_one_url(benchmark: Callable[..., object], name: str, threads: int) -> None:
    benchmark(all_at_once, threads, askers_of_one_url(rounds=10_000)[name])
