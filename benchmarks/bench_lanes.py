"""Four threads that ask one worker, over one, two and four connections."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resolver import DefaultChannelResolver
from resolver.testing import FlightServerProcess

from .lanes import LANES, asker


@pytest.mark.benchmark(group="lanes")
@pytest.mark.parametrize("lanes", LANES)
def bench_lanes(benchmark: Callable[..., object], worker: FlightServerProcess, lanes: int) -> None:
    with DefaultChannelResolver(connections_per_url=lanes) as resolver:
        assert resolver.prefetch([worker.url]) == {}
        benchmark(asker(worker.url, resolver, b"1", 10))
        assert resolver.stats().clients == lanes
