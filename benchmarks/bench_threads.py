"""Two threads on disjoint URLs beside one thread, on the resolver and on `dict`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .measure import all_at_once
from .scaling import askers


@pytest.mark.benchmark(group="threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["resolver", "dict"])
def bench_threads(benchmark: Callable[..., object], name: str, threads: int) -> None:
    benchmark(all_at_once, threads, askers(rounds=50)[name])
