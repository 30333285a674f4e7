"""What a URL without a client costs: one look-up, many threads at once, silent peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from resolver import DefaultChannelResolver
from resolver.testing import FakeConnector, FlightServerProcess

from .scenarios import silent_peers, stampede


@pytest.mark.benchmark(group="a miss")
def bench_miss_without_a_network(benchmark: Callable[..., object]) -> None:
    """Parsing, single flight and the table: what a miss adds to its connect."""
    numbers = itertools.count()
    with DefaultChannelResolver(FakeConnector()) as resolver:
        benchmark(lambda: resolver.get_flight_client_for_url(f"http://w{next(numbers)}:50051"))
        assert resolver.stats().hits == 0


@pytest.mark.benchmark(group="a miss")
def bench_miss_on_a_real_worker(
    benchmark: Callable[..., object], worker: FlightServerProcess
) -> None:
    with DefaultChannelResolver() as resolver:

        def connect_anew() -> None:
            resolver.get_flight_client_for_url(worker.url)
            resolver.invalidate(worker.url)

        benchmark(connect_anew)
        assert resolver.stats().hits == 0


@pytest.mark.benchmark(group="many threads")
def bench_stampede(benchmark: Callable[..., object]) -> None:
    assert benchmark.pedantic(stampede, rounds=1) == 1  # type: ignore[attr-defined]


@pytest.mark.benchmark(group="many threads")
def bench_silent_peers(benchmark: Callable[..., object]) -> None:
    seconds = benchmark.pedantic(silent_peers, rounds=1)  # type: ignore[attr-defined]
    assert seconds >= 1.0  # nobody gave up before the deadline
