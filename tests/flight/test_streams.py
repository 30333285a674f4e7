"""A stream outlives the cache entry it came from: eviction never cuts off its reader."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from resolver import DefaultChannelResolver, FlightConnector
from resolver.testing import FlightServerProcess

BATCHES = 200


class Weak:
    """Stands in for a FlightClient, which takes no weak references."""

    def __init__(self, client: flight.FlightClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


class WeakConnector:
    """Hands out clients whose end can be watched."""

    connect_timeout = 5.0

    def connect(self, url: str) -> Weak:
        return Weak(FlightConnector(connect_timeout=5.0).connect(url))


def evict(resolver: DefaultChannelResolver, other: str) -> None:
    resolver.get_flight_client_for_url(other)
    assert resolver.stats().evicted_capacity == 1


def invalidate(resolver: DefaultChannelResolver, other: str) -> None:
    (url,) = resolver.urls()
    assert resolver.invalidate(url)


def clear(resolver: DefaultChannelResolver, other: str) -> None:
    resolver.clear()


def close(resolver: DefaultChannelResolver, other: str) -> None:
    resolver.close()


@pytest.mark.parametrize("keep_client", [True, False], ids=["held", "last reference dropped"])
@pytest.mark.parametrize("drop", [evict, invalidate, clear, close])
def test_a_stream_is_read_to_its_end(
    drop: Callable[[DefaultChannelResolver, str], None],
    keep_client: bool,
    plain_server: FlightServerProcess,
    server: FlightServerProcess,
) -> None:
    resolver = DefaultChannelResolver(WeakConnector(), max_clients=1)
    client = resolver.get_flight_client_for_url(plain_server.url)
    reader = client.do_get(flight.Ticket(str(BATCHES).encode()))
    first = reader.read_chunk().data
    alive = weakref.ref(client)
    if not keep_client:
        del client
    drop(resolver, server.url)
    if not keep_client:
        _wait_until(lambda: alive() is None)
    rest = [chunk.data for chunk in reader]
    rows = pa.Table.from_batches([first, *rest])
    assert rows.column("i").to_pylist() == list(range(BATCHES * 1_024))
    if keep_client:
        assert client.list_actions(), "a client that is held stays usable"
    resolver.close()


def test_an_idle_client_in_use_is_dropped_but_not_closed(
    plain_server: FlightServerProcess,
) -> None:
    resolver = DefaultChannelResolver(FlightConnector(), idle_timeout=0.05)
    client = resolver.get_flight_client_for_url(plain_server.url)
    reader = client.do_get(flight.Ticket(str(BATCHES).encode()))
    reader.read_chunk()
    _wait_until(lambda: resolver.stats().evicted_idle == 1)
    assert sum(chunk.data.num_rows for chunk in reader) == (BATCHES - 1) * 1_024
    assert client.list_actions()
    assert resolver.get_flight_client_for_url(plain_server.url) is not client
    resolver.close()


def test_a_stream_of_a_killed_worker_ends_with_an_error(server: FlightServerProcess) -> None:
    resolver = DefaultChannelResolver(FlightConnector())
    client = resolver.get_flight_client_for_url(server.url)
    reader = client.do_get(flight.Ticket(b"endless"), flight.FlightCallOptions(timeout=30))
    reader.read_chunk()
    server.kill()
    with pytest.raises((flight.FlightUnavailableError, flight.FlightInternalError)):
        for _ in reader:
            pass
    resolver.close()


def _wait_until(condition: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.005)
