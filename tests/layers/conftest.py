"""One real Flight server and two ways to call it through layers: grpcio, and pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from pyarrow import flight

from resolver import FlightConnector
from resolver.layers import apply_layers
from resolver.testing import FlightServerProcess

SERVICE = "/arrow.flight.protocol.FlightService/"


@pytest.fixture(scope="session")
def worker() -> Iterator[FlightServerProcess]:
    """A server for tests that do it no harm."""
    with FlightServerProcess(batch_rows=8) as running:
        yield running


@pytest.fixture
def channel_with(worker: FlightServerProcess) -> Iterator[Callable[..., grpc.Channel]]:
    """Makes a grpcio channel to `worker` inside layers."""
    with contextlib.ExitStack() as stack:

        def make(*layers: Any) -> grpc.Channel:
            raw = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{worker.port}"))
            return apply_layers(raw, layers)

        yield make


@pytest.fixture
def client_with(worker: FlightServerProcess) -> Callable[..., flight.FlightClient]:
    """Makes a pyarrow client of `worker` inside layers."""

    def make(*layers: Any) -> flight.FlightClient:
        return FlightConnector(layers=layers).connect(worker.url)

    return make
