"""`connections_per_url` on a real server: as many TCP connections, one for each thread."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pyarrow import flight

from resolver import DefaultChannelResolver, FlightConnector
from resolver.testing import FlightServerProcess
from tests.support.threads import run_concurrently, wait_until

ESTABLISHED = "01"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts sockets in /proc/net/tcp")


def connections_to(port: int) -> int:
    """Established TCP connections whose far end is `port` of this machine."""
    tables = [Path("/proc/net", name) for name in ("tcp", "tcp6")]  # gRPC's sockets speak both
    lines = [line for each in tables if each.exists() for line in each.read_text().splitlines()]
    rows = [line.split() for line in lines if ":" in line]
    return sum(row[3] == ESTABLISHED and int(row[2].rpartition(":")[2], 16) == port for row in rows)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_as_many_sockets_as_lanes_however_many_threads(
    server: FlightServerProcess, lanes: int
) -> None:
    assert connections_to(server.port) == 0
    with DefaultChannelResolver(FlightConnector(), connections_per_url=lanes) as resolver:

        def work() -> set[int]:
            seen = set()
            for _ in range(20):
                client = resolver.get_flight_client_for_url(server.url)
                assert client.do_get(flight.Ticket(b"1")).read_all().num_rows == 1_024
                seen.add(id(client))
            return seen

        clients = run_concurrently([work] * (lanes * 3))
        assert all(len(seen) == 1 for seen in clients), "a thread changed its lane"
        assert len(set.union(*clients)) == lanes
        assert connections_to(server.port) == lanes
        assert resolver.stats().connects == lanes
    # Dropped, not closed: they end in the background once nobody holds them.
    wait_until(lambda: connections_to(server.port) == 0)


def test_prefetch_fills_every_lane(server: FlightServerProcess) -> None:
    with DefaultChannelResolver(FlightConnector(), connections_per_url=4) as resolver:
        assert resolver.prefetch([server.url]) == {}
        assert connections_to(server.port) == 4
