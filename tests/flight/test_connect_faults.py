"""Whatever a peer does, a connect ends within its deadline, with an error that helps."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pytest

from resolver import (
    DefaultChannelResolver,
    FlightConnector,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)
from resolver.testing import FaultyProxy, FlightServerProcess

DEADLINE = 1.0
CONTRACT = 0.5
"""Seconds that the error may come after the deadline: the issue's own figure."""


@contextmanager
def failing_in_time(
    url: str, kind: type[WorkerConnectError], says: str
) -> Iterator[pytest.ExceptionInfo[WorkerConnectError]]:
    started = time.monotonic()
    with pytest.raises(WorkerConnectError) as caught:
        yield caught
    assert time.monotonic() - started <= DEADLINE + CONTRACT
    assert type(caught.value) is kind
    assert caught.value.url == url
    assert url in str(caught.value)
    assert says in str(caught.value)
    assert isinstance(caught.value.__cause__, pa.ArrowException)


def connector() -> FlightConnector:
    return FlightConnector(connect_timeout=DEADLINE)


def test_closed_port(closed_port: int) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    with failing_in_time(url, WorkerConnectError, "connection refused"):
        connector().connect(url)


def test_closed_port_on_ipv6(closed_port: int) -> None:
    url = f"http://[::1]:{closed_port}"
    # A machine without IPv6 says that there is no route, which is as good.
    with failing_in_time(url, WorkerConnectError, "; check"):
        connector().connect(url)


def test_no_such_unix_socket(tmp_path: object) -> None:
    url = f"grpc+unix://{tmp_path}/none.sock"
    with failing_in_time(url, WorkerConnectError, "no such socket"):
        connector().connect(url)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_name_that_does_not_resolve(scheme: str) -> None:
    url = f"{scheme}://worker.invalid:50051"
    with failing_in_time(url, WorkerConnectError, "does not resolve"):
        connector().connect(url)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_packets_that_vanish(scheme: str, dropping_port: int) -> None:
    url = f"{scheme}://127.0.0.1:{dropping_port}"
    with failing_in_time(url, WorkerConnectTimeoutError, "did not answer within 1 s"):
        connector().connect(url)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_peer_that_accepts_and_stays_silent(scheme: str, proxy: FaultyProxy) -> None:
    proxy.set_mode("silent")
    url = f"{scheme}://127.0.0.1:{proxy.port}"
    with failing_in_time(url, WorkerConnectTimeoutError, "did not answer within 1 s"):
        connector().connect(url)
    assert proxy.connections >= 1


def test_peer_that_stalls_after_the_handshake(stalling_port: int) -> None:
    url = f"http://127.0.0.1:{stalling_port}"
    with failing_in_time(url, WorkerConnectTimeoutError, "did not answer within 1 s"):
        connector().connect(url)


def test_suspended_worker(server: FlightServerProcess) -> None:
    server.suspend()
    with failing_in_time(server.url, WorkerConnectTimeoutError, "not stopped"):
        connector().connect(server.url)
    server.resume()
    assert connector().connect(server.url).list_actions()


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("refuse", "connection refused"),
        ("close", "before speaking gRPC"),
        ("reset", "before speaking gRPC"),
        ("garbage", "does not speak gRPC"),
        ("http1", "does not speak gRPC"),
    ],
)
def test_peer_that_is_no_worker(mode: str, says: str, proxy: FaultyProxy) -> None:
    proxy.set_mode(mode)  # type: ignore[arg-type]
    with failing_in_time(proxy.url, WorkerConnectError, says):
        connector().connect(proxy.url)


@pytest.mark.parametrize("mode", ["refuse", "close", "reset", "garbage", "http1"])
def test_peer_that_is_no_tls_worker(mode: str, proxy: FaultyProxy) -> None:
    proxy.set_mode(mode)  # type: ignore[arg-type]
    url = f"https://127.0.0.1:{proxy.port}"
    with failing_in_time(url, WorkerConnectError, "; "):
        connector().connect(url)


def test_slow_peer_is_waited_for(proxy: FaultyProxy) -> None:
    proxy.set_mode("delay", delay=0.05)
    assert FlightConnector(connect_timeout=20).connect(proxy.url).list_actions()


def test_probe_is_one_call_on_the_client_that_is_handed_out(server: FlightServerProcess) -> None:
    client = connector().connect(server.url)
    assert [result.body.to_pybytes() for result in client.do_action("connections")] == [b"1"]
    (calls,) = client.do_action("calls")
    assert json.loads(calls.body.to_pybytes()) == {"list_actions": 1, "do_action": 2}


def test_client_of_a_failed_connect_is_closed(proxy: FaultyProxy) -> None:
    # gRPC goes on dialling for as long as an open client lives, and an exception that
    # somebody keeps keeps the client alive.
    proxy.set_mode("close")
    with pytest.raises(WorkerConnectError) as caught:
        connector().connect(proxy.url)
    traceback = caught.tb
    while "client" not in traceback.tb_frame.f_locals:
        assert traceback.tb_next is not None
        traceback = traceback.tb_next
    client = traceback.tb_frame.f_locals["client"]
    with pytest.raises(pa.ArrowInvalid, match="closed"):
        client.list_actions()


@pytest.mark.parametrize("mode", ["refuse", "silent", "reset", "garbage"])
def test_failure_leaves_no_entry_and_the_next_lookup_tries_again(
    mode: str, proxy: FaultyProxy
) -> None:
    with DefaultChannelResolver(connector()) as resolver:
        proxy.set_mode(mode)  # type: ignore[arg-type]
        with pytest.raises(WorkerConnectError):
            resolver.get_flight_client_for_url(proxy.url)
        assert (len(resolver), resolver.stats().connect_failures) == (0, 1)
        assert proxy.url not in resolver
        proxy.set_mode("pass")
        client = resolver.get_flight_client_for_url(proxy.url)
        assert client.list_actions()
        assert resolver.get_flight_client_for_url(proxy.url) is client


def test_prefetch_reports_each_failure_within_the_deadline(
    proxy: FaultyProxy, closed_port: int, plain_server: FlightServerProcess
) -> None:
    proxy.set_mode("silent")
    refused = f"http://127.0.0.1:{closed_port}"
    with DefaultChannelResolver(connector()) as resolver:
        started = time.monotonic()
        failures = resolver.prefetch([proxy.url, refused, plain_server.url, "http://u:pw@w1:5"])
        assert time.monotonic() - started <= DEADLINE + CONTRACT
        assert set(failures) == {proxy.url, refused, "http://u:pw@w1:5"}
        assert isinstance(failures[proxy.url], WorkerConnectTimeoutError)
        assert resolver.urls() == [plain_server.url]


def test_a_dropped_client_gives_its_connection_back(proxy: FaultyProxy) -> None:
    client = connector().connect(proxy.url)
    assert proxy.active == 1
    del client
    gc.collect()
    proxy.wait_active(0)
