"""Forks in a process of its own, since a test runner with threads must not; prints "ok".

Run as ``fork_script.py SCENARIO URL [exit]``: SCENARIO is one of the functions below,
URL a plaintext Flight server. With ``exit`` the child ends by ``sys.exit``, finalizers
and all, else by ``os._exit``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pyarrow import flight

from resolver import (
    DefaultChannelResolver,
    FlightConnector,
    ForkedProcessError,
    _fork,
    read_batches,
)
from resolver.testing import FakeConnector

AT_ONCE = 1.0
"""Seconds in which a forked child must be refused: the issue's own figure."""

OTHER = "http://127.0.0.1:1"


def in_child(work: Callable[[], None], *, finalize: bool) -> None:
    """Fork, run `work` in the child, and fail unless it ends well within 10 s."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        if finalize:
            sys.exit(status)
        os._exit(status)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hung")


def refused(use: Callable[[], object]) -> None:
    started = time.monotonic()
    try:
        answer = use()
    except ForkedProcessError as error:
        elapsed, message = time.monotonic() - started, str(error)
    else:
        raise AssertionError(f"a forked child got {answer!r}")
    assert elapsed < AT_ONCE
    assert "spawn" in message
    assert "forkserver" in message


def live_connection(url: str, finalize: bool) -> None:
    """Every use in the child is refused, and the parent's stream and client go on."""
    resolver = DefaultChannelResolver()
    client = resolver.get_flight_client_for_url(url)
    reader = client.do_get(flight.Ticket(b"500"))
    rows = reader.read_chunk().data.num_rows

    # A stream that the caller holds is the caller's own to leave alone in a child.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(reader))

    def child() -> None:
        refused(lambda: resolver.get_flight_client_for_url(url))
        refused(lambda: resolver.get_flight_client_for_url(OTHER))
        refused(lambda: resolver.prefetch([url]))
        refused(lambda: resolver.invalidate(url, client))
        refused(lambda: FlightConnector().connect(url))
        refused(lambda: DefaultChannelResolver().get_flight_client_for_url(url))
        resolver.close()  # must leave the parent's clients alone

    in_child(child, finalize=finalize)
    assert resolver.get_flight_client_for_url(url) is client
    rows += sum(chunk.data.num_rows for chunk in reader)
    assert rows == 500 * 1_024
    (connections,) = client.do_action("connections")
    assert connections.body.to_pybytes() == b"1", "nothing was closed and opened again"


def half_read(url: str, finalize: bool) -> None:
    """The child reads no further, and ends or closes nothing that its parent reads."""
    location = flight.Location(url.replace("http", "grpc+tcp"))
    endpoints = [flight.FlightEndpoint(b"2000", [location])]
    info = flight.FlightInfo(None, flight.FlightDescriptor.for_path("a"), endpoints, -1, -1)
    batches = read_batches(info, DefaultChannelResolver())
    rows = next(batches).num_rows

    def child() -> None:
        for _ in range(2):
            refused(lambda: next(batches))
        refused(lambda: batches.schema)
        batches.close()

    in_child(child, finalize=finalize)
    assert rows + sum(batch.num_rows for batch in batches) == 2000 * 1_024


def constructed_only(url: str, finalize: bool) -> None:
    """A connect that failed has started gRPC's threads just as well."""
    with contextlib.suppress(ConnectionError):
        FlightConnector(connect_timeout=1).connect(OTHER)
    in_child(lambda: refused(lambda: FlightConnector().connect(url)), finalize=finalize)


def own_client(url: str, finalize: bool) -> None:
    """A client that no connector made; in a child it is its owner's to leave alone."""
    client = flight.FlightClient(url.replace("http", "grpc+tcp"))
    assert client.list_actions()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))
    in_child(lambda: refused(lambda: FlightConnector().connect(url)), finalize=finalize)
    assert FlightConnector().connect(url).list_actions(), "only the child is refused"


def bare_client(url: str, finalize: bool) -> None:
    """A client that was made and never used."""
    client = flight.FlightClient(url.replace("http", "grpc+tcp"))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))
    in_child(lambda: refused(lambda: FlightConnector().connect(url)), finalize=finalize)


def own_server(url: str, finalize: bool) -> None:
    """A parent that is a worker itself."""
    server = flight.FlightServerBase("grpc+tcp://127.0.0.1:0")
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))
    # Finalizers of a child would run into the server, which is its owner's matter.
    in_child(lambda: refused(lambda: FlightConnector().connect(url)), finalize=False)
    server.shutdown()
    if finalize:
        server.wait()


def unseen(url: str, finalize: bool) -> None:
    """Where a fork shows no threads, as on other systems, a hang ends as a refusal."""
    _fork._TASKS = "/nowhere"  # type: ignore[misc]
    client = flight.FlightClient(url.replace("http", "grpc+tcp"))
    assert client.list_actions()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))

    def child() -> None:
        started = time.monotonic()
        try:
            FlightConnector(connect_timeout=0.5).connect(url)
        except ForkedProcessError:
            assert time.monotonic() - started <= 0.5 + 0.5
        else:
            raise AssertionError("a child whose gRPC is dead connected")
        refused(lambda: FlightConnector().connect(url))  # and nobody waits twice

    # The thread that tried hangs inside gRPC, whose own finalizers cannot end then.
    in_child(child, finalize=False)
    del finalize


def late_import(url: str, finalize: bool) -> None:
    """A child that imports this package only after its parent used Flight."""
    client = flight.FlightClient(url.replace("http", "grpc+tcp"))
    assert client.list_actions()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))

    def child() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "resolver"]:
            del sys.modules[name]
        import resolver as fresh

        assert fresh.ForkedProcessError is not ForkedProcessError
        try:
            fresh.FlightConnector(connect_timeout=0.5).connect(url)
        except fresh.ForkedProcessError:
            return
        raise AssertionError("a child whose gRPC is dead connected")

    in_child(child, finalize=False)
    del finalize


def credentials_being_read(url: str, finalize: bool) -> None:
    """The parent's threads were reading certificates, and held the locks for it."""
    import tempfile

    import trustme

    from resolver import TlsConfig

    class Told:
        changed = threading.Event()

        def _credentials_changed(self) -> None:
            self.changed.set()

    parent, begun, done = os.getpid(), threading.Event(), threading.Event()
    root = trustme.CA().cert_pem.bytes()
    file = Path(tempfile.mkdtemp()) / "ca.pem"
    file.write_bytes(root)
    told = Told()
    watched = TlsConfig(root_certificates=file, check_interval=0.05)
    watched.credentials()
    watched.subscribe(told)  # a thread of the parent watches from here on

    def read() -> bytes:
        if os.getpid() == parent:
            begun.set()
            assert done.wait(30)
        return root

    unread = TlsConfig(root_certificates=read)
    threading.Thread(target=unread.credentials, daemon=True).start()
    assert begun.wait(10)

    def child() -> None:
        assert unread.credentials(0.0).root_certificates == root
        file.write_bytes(trustme.CA().cert_pem.bytes())
        watched.subscribe(told)  # as a resolver does that the child makes
        assert told.changed.wait(5), "nobody watches in the child"

    in_child(child, finalize=finalize)
    done.set()
    del url


def token_being_asked_for(url: str, finalize: bool) -> None:
    """The parent's thread was asking for a token; the child's is asked for by the child."""
    from resolver.layers._tokens import TokenSource

    parent, begun, done = os.getpid(), threading.Event(), threading.Event()

    def provide() -> str:
        if os.getpid() == parent:
            begun.set()
            assert done.wait(30)
        return f"token-of-{os.getpid()}"

    source = TokenSource(provide, 1.0)
    waiting = threading.Thread(target=source.get, args=(30,), daemon=True)
    waiting.start()
    assert begun.wait(10)

    def child() -> None:
        assert source.get(5) == f"token-of-{os.getpid()}"

    in_child(child, finalize=finalize)
    done.set()
    waiting.join(10)
    assert source.get(5) == f"token-of-{parent}"
    del url


def other_grpc_name(url: str, finalize: bool) -> None:
    """Threads of grpcio, which look alike, are no reason to refuse."""
    sys.modules[_fork._OTHER_GRPC] = sys
    started = threading.Event()
    done = threading.Event()

    def look_alike() -> None:
        Path("/proc/self/task", str(threading.get_native_id()), "comm").write_text("event_engine")
        started.set()
        done.wait()

    thread = threading.Thread(target=look_alike, daemon=True)
    thread.start()
    assert started.wait(10)
    assert _fork._has_grpc_threads()

    def child() -> None:
        assert FlightConnector().connect(url).list_actions()

    in_child(child, finalize=finalize)
    done.set()
    thread.join()


def grandchild(url: str, finalize: bool) -> None:
    """The refusal is inherited."""
    FlightConnector().connect(url)

    def child() -> None:
        in_child(lambda: refused(lambda: FlightConnector().connect(url)), finalize=finalize)

    in_child(child, finalize=finalize)


def nothing_constructed(url: str, finalize: bool) -> None:
    """Importing and configuring starts nothing, so a child may connect; so may the parent."""
    resolver = DefaultChannelResolver()

    def child() -> None:
        assert resolver.get_flight_client_for_url(url).list_actions()

    in_child(child, finalize=finalize)
    assert resolver.get_flight_client_for_url(url).list_actions()


def connector_without_grpc(url: str, finalize: bool) -> None:
    """Clients that are not the parent's are none of the child's business either."""
    resolver = DefaultChannelResolver(FakeConnector())
    fake = resolver.get_flight_client_for_url(url)
    in_child(lambda: refused(lambda: resolver.get_flight_client_for_url(url)), finalize=finalize)
    assert resolver.get_flight_client_for_url(url) is fake


if __name__ == "__main__":
    scenario: Callable[[str, bool], None] = globals()[sys.argv[1]]
    parent = os.getpid()
    scenario(sys.argv[2], sys.argv[3:] == ["exit"])
    if os.getpid() == parent:
        sys.stdout.write("ok\n")
