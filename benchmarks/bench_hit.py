"""One look-up of each of 512 held URLs, on the resolver and on every peer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .measure import URLS
from .peers import NAMES, Loop, hit_peers


@pytest.fixture(scope="module")
def loops() -> dict[str, Loop]:
    return hit_peers()


@pytest.mark.benchmark(group="512 hits")
@pytest.mark.parametrize("name", NAMES)
def bench_hit(benchmark: Callable[..., object], loops: dict[str, Loop], name: str) -> None:
    benchmark(loops[name], 1, URLS)
