"""What a FlightConnector's options do to the calls of its clients, seen from the server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from resolver import (
    DefaultChannelResolver,
    FlightConnector,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)
from resolver._flight import _Attempt
from resolver._headers import CallHeadersFactory
from resolver._urls import parse_worker_url
from resolver.testing import FaultyProxy, FlightServerProcess

THREADS = 8


def headers_seen(client: flight.FlightClient) -> dict[str, list[str]]:
    (result,) = client.do_action("headers")
    seen: dict[str, list[str]] = json.loads(result.body.to_pybytes())
    return seen


# -- headers -------------------------------------------------------------------------------


def test_static_headers_arrive(plain_server: FlightServerProcess) -> None:
    connector = FlightConnector(
        headers=[("X-Tenant", "a"), ("x-tenant", "b"), ("x-key-bin", b"\x00\xff"), ("x-empty", "")]
    )
    client = connector.connect(plain_server.url)
    for _ in range(2):
        seen = headers_seen(client)
        assert seen["x-tenant"] == ["a", "b"]
        assert seen["x-key-bin"] == ["AP8="]
        assert seen["x-empty"] == [""]


def test_a_callable_is_asked_for_every_call(plain_server: FlightServerProcess) -> None:
    turns = iter(range(10))
    connector = FlightConnector(headers=lambda: {"x-turn": str(next(turns))})
    client = connector.connect(plain_server.url)  # the probe took turn 0
    assert [headers_seen(client)["x-turn"] for _ in range(3)] == [["1"], ["2"], ["3"]]


def test_a_token_is_refreshed_without_a_new_client() -> None:
    token = {"authorization": "Bearer stale"}
    with (
        FlightServerProcess(token="fresh") as server,
        DefaultChannelResolver(FlightConnector(headers=lambda: token)) as resolver,
    ):
        client = resolver.get_flight_client_for_url(server.url)
        with pytest.raises(flight.FlightUnauthenticatedError):
            client.list_actions()
        token["authorization"] = "Bearer fresh"
        assert client.list_actions()
        assert resolver.get_flight_client_for_url(server.url) is client
        assert resolver.stats().connects == 1


def test_a_worker_that_refuses_the_probe_is_reachable() -> None:
    with FlightServerProcess(token="right") as server:
        client = FlightConnector().connect(server.url)
        with pytest.raises(flight.FlightUnauthenticatedError):
            client.list_actions()


def test_a_call_whose_headers_fail_never_leaves(
    server: FlightServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    # pyarrow swallows what a middleware raises and would send the call without it.
    broken = False

    def provider() -> dict[str, str]:
        if broken:
            raise LookupError("no token today")
        return {"x-tenant": "a"}

    client = FlightConnector(headers=provider).connect(server.url)
    broken = True
    with pytest.raises(flight.FlightInternalError):
        client.list_actions()
    assert "LookupError" in caplog.text
    assert "no token today" not in caplog.text, "it may hold the token"
    with pytest.raises(flight.FlightInternalError):
        client.list_actions()
    assert len(caplog.records) == 1, "not on each call"
    broken = False
    assert headers_seen(client)["x-tenant"] == ["a"]
    (calls,) = client.do_action("calls")
    assert json.loads(calls.body.to_pybytes())["list_actions"] == 1, "the probe's only"


def test_a_connect_whose_headers_fail_says_so(server: FlightServerProcess) -> None:
    def provider() -> dict[str, str]:
        raise LookupError("no token today")

    with pytest.raises(WorkerConnectError, match=r"headers callable failed \(LookupError\)") as e:
        FlightConnector(headers=provider).connect(server.url)
    assert isinstance(e.value.__cause__, LookupError)
    client = FlightConnector().connect(server.url)
    (calls,) = client.do_action("calls")
    assert json.loads(calls.body.to_pybytes()) == {"list_actions": 1, "do_action": 1}


def test_an_interrupt_inside_the_callable_reaches_the_caller(
    plain_server: FlightServerProcess,
) -> None:
    def provider() -> dict[str, str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FlightConnector(headers=provider).connect(plain_server.url)


@pytest.mark.parametrize("headers", [{"authorization": "Bearer s3cret"}, None])
def test_no_secret_in_the_message_of_a_failed_connect(
    headers: dict[str, str] | None, closed_port: int
) -> None:
    connector = FlightConnector(headers=headers or (lambda: {"authorization": "Bearer s3cret"}))
    with pytest.raises(WorkerConnectError) as caught:
        connector.connect(f"http://127.0.0.1:{closed_port}")
    assert "s3cret" not in f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"


class Echoing(flight.FlightServerBase):  # type: ignore[misc]
    """A worker that is draining and, wrongly, tells what it was sent."""

    def list_actions(self, context: flight.ServerCallContext) -> None:
        sent = context.get_middleware("headers").headers["authorization"]
        raise flight.FlightUnavailableError(f"draining; you sent {sent}")


class Keeping(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    def start_call(self, info: flight.CallInfo, headers: dict[str, list[str]]) -> Any:
        kept = Kept()
        kept.headers = headers
        return kept


class Kept(flight.ServerMiddleware):  # type: ignore[misc]
    headers: dict[str, list[str]]


def test_a_live_worker_that_says_unavailable_has_answered() -> None:
    with Echoing("grpc://127.0.0.1:0", middleware={"headers": Keeping()}) as server:
        connector = FlightConnector(headers={"authorization": "Bearer s3cret"})
        client = connector.connect(f"http://127.0.0.1:{server.port}")
        with pytest.raises(flight.FlightUnavailableError, match="draining"):
            client.list_actions()


class Busy(flight.FlightServerBase):  # type: ignore[misc]
    def list_actions(self, context: flight.ServerCallContext) -> None:
        raise flight.FlightTimedOutError("busy")


def test_a_live_worker_that_says_timed_out_has_answered() -> None:
    with Busy("grpc://127.0.0.1:0") as server:
        assert FlightConnector().connect(f"http://127.0.0.1:{server.port}")


@pytest.mark.parametrize("error", [flight.FlightUnavailableError, flight.FlightTimedOutError])
def test_an_answer_that_is_nobodys_is_quoted_without_secrets(error: type[Exception]) -> None:
    sent = (("authorization", "Bearer s3cret"), ("x-env", "n"))
    factory = CallHeadersFactory(sent)
    status = error("Flight returned x error, with message: rejected token s3cret")
    connector = FlightConnector(connect_timeout=30)
    with pytest.raises(WorkerConnectError, match=r"answered .*rejected token \*\*\*") as caught:
        worker, deadline = parse_worker_url("http://w1:5"), time.monotonic() + 30
        connector._raise_unreachable(_Attempt(worker, deadline, None, factory, []), status)
    assert type(caught.value) is WorkerConnectError, "no deadline has passed"
    assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize("value", ["n", "1", "refused", "to"])
def test_header_values_do_not_garble_the_diagnosis(value: str, closed_port: int) -> None:
    with pytest.raises(WorkerConnectError, match="connection refused") as caught:
        FlightConnector(headers={"x-env": value}).connect(f"http://127.0.0.1:{closed_port}")
    assert caught.value.__context__ is caught.value.__cause__ or not caught.value.__context__


# -- middleware ----------------------------------------------------------------------------


class Adding(flight.ClientMiddlewareFactory):  # type: ignore[misc]
    """Adds headers and counts the calls it sees."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__()
        self.headers = headers
        self.calls = 0

    def start_call(self, info: flight.CallInfo) -> flight.ClientMiddleware:
        self.calls += 1
        return Added(self.headers)


class Added(flight.ClientMiddleware):  # type: ignore[misc]
    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__()
        self.headers = headers

    def sending_headers(self) -> dict[str, str]:
        return self.headers


def test_middleware_runs_beside_headers(plain_server: FlightServerProcess) -> None:
    first, second = Adding({"x-one": "1"}), Adding({"x-two": "2"})
    connector = FlightConnector(middleware=[first, second], headers={"x-own": "0"})
    seen = headers_seen(connector.connect(plain_server.url))
    assert (seen["x-own"], seen["x-one"], seen["x-two"]) == (["0"], ["1"], ["2"])
    assert first.calls == second.calls == 2, "the probe and the action"


def test_middleware_with_an_illegal_header_is_no_proof_of_a_worker(closed_port: int) -> None:
    # gRPC refuses such a call before it dials, so nobody has answered it.
    connector = FlightConnector(middleware=[Adding({"not legal": "x"})])
    with pytest.raises(WorkerConnectError, match="middleware"):
        connector.connect(f"http://127.0.0.1:{closed_port}")


# -- channel options -------------------------------------------------------------------------


def test_write_size_limit(plain_server: FlightServerProcess) -> None:
    connector = FlightConnector(write_size_limit_bytes=1_000)
    client = connector.connect(plain_server.url)
    descriptor = flight.FlightDescriptor.for_path("numbers")
    schema = pa.schema([("i", pa.int64())])
    writer, _ = client.do_put(descriptor, schema)
    with pytest.raises(flight.FlightWriteSizeExceededError):
        writer.write_batch(pa.record_batch([range(10_000)], schema=schema))
    writer.write_batch(pa.record_batch([range(10)], schema=schema))
    writer.close()


def test_generic_options_arrive(plain_server: FlightServerProcess) -> None:
    connector = FlightConnector(generic_options={"grpc.primary_user_agent": "resolver-tests"})
    (agent,) = headers_seen(connector.connect(plain_server.url))["user-agent"]
    assert "resolver-tests" in agent


def test_generic_options_override_our_defaults(proxy: FaultyProxy) -> None:
    # With a shorter attempt it is gRPC's attempt that ends, not the call's deadline.
    proxy.set_mode("silent")
    ours = FlightConnector(connect_timeout=0.5)
    theirs = FlightConnector(
        connect_timeout=5, generic_options={"grpc.min_reconnect_backoff_ms": 200}
    )
    for connector, cause in ((ours, flight.FlightTimedOutError),
                             (theirs, flight.FlightUnavailableError)):  # fmt: skip
        with pytest.raises(WorkerConnectTimeoutError) as caught:
            connector.connect(proxy.url)
        assert isinstance(caught.value.__cause__, cause)


def test_large_batches_are_not_limited() -> None:
    # gRPC's own limit for a received message is 4 MB; this batch has 8.
    with FlightServerProcess(batch_rows=1_000_000) as server:
        client = FlightConnector().connect(server.url)
        assert client.do_get(flight.Ticket(b"1")).read_all().nbytes == 8_000_000


# -- many callers ------------------------------------------------------------------------------


def in_threads(work: Callable[[int], None]) -> None:
    """Run `work` in THREADS threads that start together; raise what one of them raised."""
    barrier = threading.Barrier(THREADS)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            barrier.wait(10)
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_many_threads_share_one_client_and_one_connection(server: FlightServerProcess) -> None:
    clients: list[Any] = []
    with DefaultChannelResolver(FlightConnector()) as resolver:

        def work(_: int) -> None:
            for count in range(1, 41):
                client = resolver.get_flight_client_for_url(server.url)
                rows = client.do_get(flight.Ticket(str(count % 3).encode())).read_all()
                assert rows.num_rows == count % 3 * 1_024
            clients.append(client)

        in_threads(work)
        assert len({id(client) for client in clients}) == 1
        assert resolver.stats().connects == 1
        (connections,) = clients[0].do_action("connections")
        assert connections.body.to_pybytes() == b"1"


def test_connections_per_url_opens_that_many(server: FlightServerProcess) -> None:
    with DefaultChannelResolver(FlightConnector(), connections_per_url=3) as resolver:
        assert resolver.prefetch([server.url]) == {}
        client = resolver.get_flight_client_for_url(server.url)
        (connections,) = client.do_action("connections")
        assert connections.body.to_pybytes() == b"3"


def test_a_unix_socket_is_a_worker() -> None:
    # pytest's own directories can be too long for a socket's address.
    with (
        TemporaryDirectory(prefix="w") as folder,
        FlightServerProcess(unix_path=f"{folder}/a worker.sock") as server,
        DefaultChannelResolver(FlightConnector()) as resolver,
    ):
        assert server.url == f"grpc+unix://{folder}/a%20worker.sock"
        client = resolver.get_flight_client_for_url(server.url)
        assert client.do_get(flight.Ticket(b"2")).read_all().num_rows == 2_048
