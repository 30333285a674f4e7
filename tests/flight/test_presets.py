"""Presets on real channels: calls are repeated, pings are sent, servers refuse them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from resolver import FlightConnector, Keepalive, LoadBalancing, Retry, WorkerConnectError
from resolver._presets import channel_arguments
from resolver.testing import FlightServerProcess
from tests.support.http2_tap import Http2Tap
from tests.support.threads import wait_until

QUICK = Retry(initial_backoff=0.01, max_backoff=0.02)


class Failing(flight.FlightServerBase):  # type: ignore[misc]
    """Answers the first `failures` calls of each method with UNAVAILABLE."""

    def __init__(self) -> None:
        self.failures = 0
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__("grpc://127.0.0.1:0")
        self.url = f"http://127.0.0.1:{self.port}"

    def _count(self, method: str) -> None:
        with self._lock:
            self.calls[method] += 1
            if self.calls[method] <= self.failures:
                raise flight.FlightUnavailableError("overloaded")

    def do_get(self, context, ticket):
        self._count("do_get")
        return flight.RecordBatchStream(pa.table({"i": [1, 2, 3]}))

    def get_flight_info(self, context, descriptor):
        self._count("get_flight_info")
        return flight.FlightInfo(pa.schema([("i", pa.int64())]), descriptor, [], -1, -1)

    def do_action(self, context, action):
        self._count("do_action")
        return iter([b"done"])

    def do_put(self, context, descriptor, reader, writer):
        self._count("do_put")

    def list_actions(self, context):
        return []


@pytest.fixture
def failing() -> Iterator[Failing]:
    with Failing() as server:
        yield server


# -- retry -------------------------------------------------------------------------------------


def test_without_retry_an_unavailable_worker_is_heard_at_once(failing: Failing) -> None:
    client = FlightConnector().connect(failing.url)
    failing.failures = 1
    with pytest.raises(flight.FlightUnavailableError):
        client.do_get(flight.Ticket(b"")).read_all()
    assert failing.calls["do_get"] == 1


def test_retry_repeats_until_the_worker_answers(failing: Failing) -> None:
    client = FlightConnector(retry=QUICK).connect(failing.url)
    failing.failures = 2
    assert client.do_get(flight.Ticket(b"")).read_all().num_rows == 3
    assert client.get_flight_info(flight.FlightDescriptor.for_path("t")).schema.names == ["i"]
    assert failing.calls == {"do_get": 3, "get_flight_info": 3}


def test_retry_gives_up_after_its_attempts(failing: Failing) -> None:
    client = FlightConnector(retry=QUICK).connect(failing.url)
    failing.failures = 100
    with pytest.raises(flight.FlightUnavailableError, match="overloaded"):
        client.do_get(flight.Ticket(b"")).read_all()
    assert failing.calls["do_get"] == QUICK.max_attempts


def test_what_changes_something_is_not_repeated(failing: Failing) -> None:
    client = FlightConnector(retry=QUICK).connect(failing.url)
    failing.failures = 1
    with pytest.raises(flight.FlightUnavailableError):
        list(client.do_action(flight.Action("x", b"")))
    with pytest.raises(flight.FlightUnavailableError):
        writer, reader = client.do_put(
            flight.FlightDescriptor.for_path("t"), pa.schema([("i", pa.int64())])
        )
        writer.done_writing()
        reader.read()
        writer.close()
    assert failing.calls == {"do_action": 1, "do_put": 1}


def test_a_method_that_is_named_is_repeated(failing: Failing) -> None:
    retry = Retry(initial_backoff=0.01, max_backoff=0.02, methods=("DoAction",))
    client = FlightConnector(retry=retry).connect(failing.url)
    failing.failures = 1
    (result,) = client.do_action(flight.Action("x", b""))
    assert result.body.to_pybytes() == b"done"
    assert failing.calls["do_action"] == 2


def test_retries_stop_when_a_worker_only_fails(failing: Failing) -> None:
    client = FlightConnector(retry=QUICK).connect(failing.url)
    failing.failures = 10_000
    for _ in range(10):
        with pytest.raises(flight.FlightUnavailableError):
            client.do_get(flight.Ticket(b"")).read_all()
    # Unthrottled: 40. The first calls use up the tokens, the others go out once each.
    assert failing.calls["do_get"] < 20


def test_explicit_options_win_over_presets(failing: Failing) -> None:
    off = {"grpc.enable_retries": 0}
    client = FlightConnector(retry=QUICK, generic_options=off).connect(failing.url)
    failing.failures = 1
    with pytest.raises(flight.FlightUnavailableError):
        client.do_get(flight.Ticket(b"")).read_all()


# -- keepalive ---------------------------------------------------------------------------------


def test_pings_reach_the_wire_and_a_server_refuses_fast_ones(
    plain_server: FlightServerProcess,
) -> None:
    with Http2Tap(plain_server.port) as tap:
        fast = Keepalive(ping_every=1.0, while_idle=True)
        client = FlightConnector(keepalive=fast).connect(tap.url)
        tap.wait_for(lambda: tap.pings["client"] >= 3)
        tap.wait_for(lambda: tap.goodbyes)
        assert tap.goodbyes == [b"too_many_pings"]
        assert client.list_actions(), "gRPC did not connect again"


def test_an_unanswered_ping_ends_a_call_that_would_wait(server: FlightServerProcess) -> None:
    quick = Keepalive(ping_every=1.0, ping_timeout=1.0)
    client = FlightConnector(keepalive=quick).connect(server.url)
    server.suspend()
    with pytest.raises(flight.FlightUnavailableError):
        client.list_actions(flight.FlightCallOptions(timeout=60))
    server.resume()


def test_pings_that_come_too_fast_fail_the_call_under_way(
    plain_server: FlightServerProcess,
) -> None:
    client = FlightConnector(keepalive=Keepalive(ping_every=1.0)).connect(plain_server.url)
    with pytest.raises(flight.FlightUnavailableError, match="Too many pings"):
        list(client.do_action(flight.Action("sleep", b"60")))


@pytest.mark.parametrize("permitted", [False, True])
def test_idle_pings_are_for_servers_that_permit_them(permitted: bool) -> None:
    grpc = pytest.importorskip("grpc")
    options = [
        ("grpc.http2.min_ping_interval_without_data_ms", 100),
        ("grpc.keepalive_permit_without_calls", int(permitted)),
    ]
    server = grpc.server(ThreadPoolExecutor(1), options=options)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    preset = Keepalive(ping_every=1.0, while_idle=True)
    with (
        Http2Tap(port) as tap,
        grpc.insecure_channel(
            f"127.0.0.1:{tap.port}", options=list(preset.channel_arguments().items())
        ) as channel,
    ):
        grpc.channel_ready_future(channel).result(30)
        tap.wait_for(lambda: tap.pings["client"] >= 6 or tap.goodbyes)
        assert tap.goodbyes == ([] if permitted else [b"too_many_pings"])
    server.stop(0).wait(10)


# -- load balancing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset",
    [
        LoadBalancing.pick_first(),
        LoadBalancing.pick_first(shuffle=True),
        LoadBalancing.round_robin(),
    ],
    ids=str,
)
def test_pyarrow_takes_every_policy(
    plain_server: FlightServerProcess, preset: LoadBalancing
) -> None:
    client = FlightConnector(load_balancing=preset, retry=Retry()).connect(plain_server.url)
    assert client.do_get(flight.Ticket(b"1")).read_all().num_rows == 1_024


@pytest.mark.parametrize(
    ("preset", "reached"),
    [(LoadBalancing.pick_first(), 1), (LoadBalancing.round_robin(), 2)],
    ids=str,
)
def test_round_robin_uses_every_address_on_a_grpcio_channel(
    failing: Failing, preset: LoadBalancing, reached: int
) -> None:
    grpc = pytest.importorskip("grpc")
    with Failing() as other:
        target = f"ipv4:127.0.0.1:{failing.port},127.0.0.1:{other.port}"
        options = list(channel_arguments(preset, QUICK).items())
        with grpc.insecure_channel(target, options=options) as channel:
            act = channel.unary_stream("/arrow.flight.protocol.FlightService/DoAction")

            def all_asked() -> bool:
                list(act(b"", timeout=30, wait_for_ready=True))
                return bool(failing.calls["do_action"] and other.calls["do_action"])

            # A second address is used once it is connected.
            for _ in range(20):
                all_asked()
            if reached == 2:
                wait_until(all_asked)
            servers = [each for each in (failing, other) if each.calls["do_action"]]
            assert len(servers) == reached


def by_pyarrow(url: str, **options: Any) -> None:
    FlightConnector(**options).connect(url)


def by_grpcio(url: str, **options: Any) -> None:
    pytest.importorskip("grpc")
    from resolver import GrpcConnector

    GrpcConnector(**options).connect(url).close()


def by_asyncio(url: str, **options: Any) -> None:
    pytest.importorskip("grpc")
    from resolver.aio import GrpcConnector

    async def connect() -> None:
        client = await GrpcConnector(**options).connect(url)
        await client.close()

    asyncio.run(connect())


@pytest.mark.parametrize("connect", [by_pyarrow, by_grpcio, by_asyncio])
def test_a_channel_that_grpc_did_not_make_is_no_answer_of_a_worker(
    connect: Callable[..., None], closed_port: int
) -> None:
    config = json.dumps({"loadBalancingConfig": [{"nonsense": {}}]})
    with pytest.raises(WorkerConnectError, match=r"No known policies.*generic_options"):
        connect(f"http://127.0.0.1:{closed_port}", generic_options={"grpc.service_config": config})


@pytest.mark.parametrize("connect", [by_pyarrow, by_grpcio, by_asyncio])
def test_any_times_of_a_retry_make_a_channel(
    connect: Callable[..., None], failing: Failing
) -> None:
    connect(failing.url, retry=Retry(initial_backoff=1 / 30, max_backoff=1 / 3, multiplier=1 / 7))
