"""A worker that dies, hangs or comes back at the same URL."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from pyarrow import flight

from resolver import DefaultChannelResolver, FlightConnector, WorkerConnectError
from resolver.testing import FaultyProxy, FlightServerProcess

USABLE_AGAIN = 1.0
"""Seconds after its start in which a worker must be usable: the issue's own figure."""


def answers(client: Any) -> bool:
    try:
        return bool(client.list_actions(flight.FlightCallOptions(timeout=5)))
    except flight.FlightUnavailableError:
        return False


def assert_usable_in_time(client: Any) -> None:
    started = time.monotonic()
    while not answers(client):
        assert time.monotonic() - started <= USABLE_AGAIN
        time.sleep(0.01)


@pytest.fixture
def resolver() -> Any:
    with DefaultChannelResolver(FlightConnector(connect_timeout=5.0)) as running:
        yield running


def test_restarted_worker_is_usable_through_the_cached_client(
    resolver: DefaultChannelResolver, server: FlightServerProcess
) -> None:
    client = resolver.get_flight_client_for_url(server.url)
    server.kill()
    assert not answers(client)
    server.start()
    assert_usable_in_time(client)
    assert resolver.get_flight_client_for_url(server.url) is client
    assert resolver.stats().connects == 1


def test_backoff_does_not_grow_while_a_worker_is_down_and_polled(
    resolver: DefaultChannelResolver, server: FlightServerProcess
) -> None:
    # gRPC's own backoff doubles from 1 s up to 2 min; failed dials are counted, not seconds.
    with FaultyProxy(server.port) as proxy:
        client = resolver.get_flight_client_for_url(proxy.url)
        proxy.set_mode("reset")
        stop = threading.Event()

        def poll() -> None:
            while not stop.is_set():
                answers(client)
                stop.wait(0.02)

        poller = threading.Thread(target=poll)
        poller.start()
        try:
            proxy.wait_connections(7, timeout=20)
            proxy.set_mode("pass")
            assert_usable_in_time(client)
        finally:
            stop.set()
            poller.join(10)
        assert not poller.is_alive()


def test_restarted_worker_is_usable_through_a_replacement(
    resolver: DefaultChannelResolver, server: FlightServerProcess
) -> None:
    client = resolver.get_flight_client_for_url(server.url)
    server.kill()
    assert not answers(client)
    assert resolver.invalidate(server.url, client)
    with pytest.raises(WorkerConnectError, match="connection refused"):
        resolver.get_flight_client_for_url(server.url)
    server.start()
    replacement = resolver.get_flight_client_for_url(server.url)
    assert replacement is not client
    assert answers(replacement)


def test_late_failure_keeps_the_replacement(
    resolver: DefaultChannelResolver, server: FlightServerProcess
) -> None:
    client = resolver.get_flight_client_for_url(server.url)
    server.restart()
    assert resolver.invalidate(server.url, client)
    replacement = resolver.get_flight_client_for_url(server.url)
    assert not resolver.invalidate(server.url, client)
    assert resolver.get_flight_client_for_url(server.url) is replacement


def test_a_client_is_used_again_after_its_worker_was_suspended(
    resolver: DefaultChannelResolver, server: FlightServerProcess
) -> None:
    client = resolver.get_flight_client_for_url(server.url)
    server.suspend()
    with pytest.raises(flight.FlightTimedOutError):
        client.list_actions(flight.FlightCallOptions(timeout=0.2))
    server.resume()
    assert_usable_in_time(client)


def test_a_connection_that_went_silent_is_replaced_by_invalidating(
    resolver: DefaultChannelResolver, proxy: FaultyProxy
) -> None:
    client = resolver.get_flight_client_for_url(proxy.url)
    proxy.set_mode("silent")
    with pytest.raises(flight.FlightTimedOutError):
        client.list_actions(flight.FlightCallOptions(timeout=0.2))
    # Only the silent connection is broken: the port answers newcomers again.
    proxy.drop_connections()
    proxy.set_mode("pass")
    assert resolver.invalidate(proxy.url, client)
    assert answers(resolver.get_flight_client_for_url(proxy.url))


def test_a_server_on_another_port_is_another_worker(
    resolver: DefaultChannelResolver, server: FlightServerProcess
) -> None:
    with FlightServerProcess() as other:
        pids = {
            bytes(next(resolver.get_flight_client_for_url(url).do_action("pid")).body)
            for url in (server.url, other.url)
        }
        assert pids == {str(server.pid).encode(), str(other.pid).encode()}


def test_a_worker_that_moved_to_tls_is_not_spoken_to_in_plaintext(
    server: FlightServerProcess, authority: Any
) -> None:
    port = server.port
    plain = DefaultChannelResolver(FlightConnector(connect_timeout=5))
    plain.get_flight_client_for_url(server.url)
    server.stop()
    with FlightServerProcess(
        port=port, tls_certificate=authority.server_certificate, tls_key=authority.server_key
    ) as replacement:
        assert replacement.url == f"https://127.0.0.1:{port}"
        plain.clear()
        with pytest.raises(WorkerConnectError, match="https://"):
            plain.get_flight_client_for_url(f"http://127.0.0.1:{port}")
        secure = FlightConnector(tls_root_certificates=authority.root)
        assert answers(secure.connect(replacement.url))
    plain.close()
