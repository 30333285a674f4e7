"""The fakes of resolver.testing do what they are told; the proxy is tried without Flight."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from resolver import WorkerConnectTimeoutError
from resolver.testing import FakeClient, FakeConnector, FaultyProxy

URL = "http://w1:5"
OTHER = "http://w2:5"


# -- FakeConnector -------------------------------------------------------------------------


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_connects_are_counted_and_clients_are_distinct() -> None:
    connector = FakeConnector()
    clients = [connector.connect(URL), connector.connect(URL), connector.connect(OTHER)]
    assert [client.serial for client in clients] == [0, 1, 2]
    assert [client.url for client in clients] == [URL, URL, OTHER]
    assert repr(clients[2]) == f"FakeClient('{OTHER}', serial=2)"
    assert (connector.calls(URL), connector.calls(OTHER), connector.calls()) == (2, 1, 3)
    assert (connector.created, connector.disposed, connector.live) == (3, 0, 3)
    assert connector.most_in_flight(URL) == 1


def test_the_end_of_a_client_is_counted_on_its_thread() -> None:
    seen: list[FakeClient] = []
    connector = FakeConnector(on_dispose=lambda client: seen.append(client.serial))
    client = connector.connect(URL)
    alive = weakref.ref(client)
    del client
    gc.collect()
    connector.wait_disposed(1)
    assert alive() is None
    assert seen == [0]
    assert connector.disposal_threads == {threading.get_ident()}
    assert connector.live == 0
    with pytest.raises(TimeoutError, match="1 of 2"):
        connector.wait_disposed(2, timeout=0.01)


def test_a_gate_holds_back_one_url() -> None:
    connector = FakeConnector()
    with connector.block(URL) as gate:
        threads = [in_thread(lambda: connector.connect(URL)) for _ in range(2)]
        gate.wait_entered(2)
        assert connector.created == 0
        assert connector.most_in_flight(URL) == 2
        assert connector.connect(OTHER).serial == 0
        with pytest.raises(TimeoutError, match="2 of 3"):
            gate.wait_entered(3, timeout=0.01)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert connector.created == 3
    assert connector.connect(URL).serial == 3


def test_a_blocked_connect_ends_at_its_deadline() -> None:
    connector = FakeConnector(connect_timeout=0.05)
    connector.block()
    with pytest.raises(WorkerConnectTimeoutError, match=URL) as caught:
        connector.connect(URL)
    assert caught.value.url == URL
    assert connector.calls(URL) == 1


def test_failures_are_counted_down_per_url() -> None:
    connector = FakeConnector()
    connector.fail(LookupError("twice"), URL, times=2)
    connector.fail(ValueError("always"))
    for expected in (LookupError, LookupError, ValueError, ValueError):
        with pytest.raises(expected):
            connector.connect(URL)
    with pytest.raises(ValueError, match="always"):
        connector.connect(OTHER)
    connector.fail(None)
    assert connector.connect(URL).serial == 0


def test_delay_is_per_url() -> None:
    connector = FakeConnector()
    connector.delay(0.05, URL)
    started = time.monotonic()
    connector.connect(URL)
    assert time.monotonic() - started >= 0.05
    connector.delay(0, URL)
    assert connector.connect(URL).serial == 1


# -- FaultyProxy -----------------------------------------------------------------------------


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(1_024):
                        connection.sendall(data)
                except OSError:
                    return

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

        thread = in_thread(accept)
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.fixture
def proxy(echo_port: int) -> Iterator[FaultyProxy]:
    with FaultyProxy(echo_port) as running:
        yield running


def dial(proxy: FaultyProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def read_to_end(sock: socket.socket) -> bytes:
    data = b""
    while chunk := sock.recv(1_024):
        data += chunk
    return data


def test_pass_mode_is_transparent(proxy: FaultyProxy) -> None:
    assert proxy.url == f"http://127.0.0.1:{proxy.port}"
    with dial(proxy) as one, dial(proxy) as other:
        for sock, text in ((one, b"one"), (other, b"other"), (one, b"again")):
            sock.sendall(text)
            assert sock.recv(100) == text
        assert (proxy.connections, proxy.active) == (2, 2)
    proxy.wait_active(0)
    assert proxy.connections == 2


def test_refuse_mode_frees_and_keeps_the_port(proxy: FaultyProxy) -> None:
    with dial(proxy) as before:
        before.sendall(b"x")
        assert before.recv(1) == b"x"
        proxy.set_mode("refuse")
        with pytest.raises(ConnectionRefusedError):
            dial(proxy)
        before.sendall(b"y")
        assert before.recv(1) == b"y", "a connection that exists goes on"
    proxy.set_mode("pass")
    with dial(proxy) as again:
        again.sendall(b"z")
        assert again.recv(1) == b"z"


def test_silent_mode_holds_everything_until_it_ends(proxy: FaultyProxy) -> None:
    with dial(proxy) as before:
        before.sendall(b"a")
        assert before.recv(1) == b"a"
        proxy.set_mode("silent")
        with dial(proxy) as during:
            for sock in (before, during):
                sock.sendall(b"b")
                sock.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    sock.recv(1)
                sock.settimeout(10)
            proxy.set_mode("pass")
            for sock in (before, during):
                assert sock.recv(1) == b"b"


def test_reset_mode_resets_old_and_new(proxy: FaultyProxy) -> None:
    with dial(proxy) as before:
        before.sendall(b"a")
        assert before.recv(1) == b"a"
        proxy.set_mode("reset")
        assert ended(before)
    with pytest.raises(ConnectionResetError), dial(proxy) as after:
        after.recv(1)


def ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("mode", "begins"), [("close", b""), ("garbage", b"\x00\xff"), ("http1", b"HTTP/1.1 400")]
)
def test_canned_answers(mode: str, begins: bytes, proxy: FaultyProxy) -> None:
    proxy.set_mode(mode)  # type: ignore[arg-type]
    assert proxy.mode == mode
    with dial(proxy) as sock:
        answer = read_to_end(sock)
        assert answer.startswith(begins)
        assert bool(answer) == bool(begins)


def test_delay_mode_delays(proxy: FaultyProxy) -> None:
    proxy.set_mode("delay", delay=0.05)
    with dial(proxy) as sock:
        started = time.monotonic()
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        assert time.monotonic() - started >= 0.1, "once each way"


@pytest.mark.parametrize("target", ["closed", None])
def test_a_server_that_is_away_resets(target: str | None) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1] if target else None
        with (
            FaultyProxy(port) as proxy,
            pytest.raises(ConnectionResetError),
            dial(proxy) as sock,
        ):
            sock.recv(1)


def test_close_ends_threads_and_connections(echo_port: int) -> None:
    before = threading.active_count()
    proxy = FaultyProxy(echo_port, mode="silent")
    with dial(proxy) as sock:
        proxy.wait_connections(1)
        proxy.close()
        proxy.close()
        assert ended(sock)
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)
    with pytest.raises(RuntimeError, match="closed"):
        proxy.set_mode("pass")
    assert not [t for t in threading.enumerate() if t.name.startswith("faulty-proxy")]
    assert threading.active_count() <= before + 1  # the echo server's own


def test_unknown_mode_is_refused(proxy: FaultyProxy) -> None:
    with pytest.raises(ValueError, match="mode is one of pass, refuse"):
        proxy.set_mode("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode is one of"):
        FaultyProxy(None, mode="slow")  # type: ignore[arg-type]


def test_waits_are_bounded(proxy: FaultyProxy) -> None:
    with pytest.raises(TimeoutError, match="0 of 1"):
        proxy.wait_connections(1, timeout=0.01)
    with pytest.raises(TimeoutError, match="0 connections open"):
        proxy.wait_active(1, timeout=0.01)
