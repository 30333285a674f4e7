"""One small `do_get` on a real server: client held, resolved, or new each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from resolver import DefaultChannelResolver
from resolver.testing import FlightServerProcess

from .scenarios import request_styles


@pytest.fixture
def resolver() -> Iterator[DefaultChannelResolver]:
    with DefaultChannelResolver() as resolver:
        yield resolver


@pytest.mark.benchmark(group="one small do_get")
@pytest.mark.parametrize("style", ["held", "resolved", "new client"])
def bench_request(
    benchmark: Callable[..., object],
    worker: FlightServerProcess,
    resolver: DefaultChannelResolver,
    style: str,
) -> None:
    table = benchmark(request_styles(worker.url, resolver)[style])
    assert table.num_rows == 1
