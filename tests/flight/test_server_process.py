"""FlightServerProcess: ready when it says so, killable, and gone when nobody needs it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

import resolver
from resolver import FlightConnector, WorkerConnectError
from resolver.testing import FlightServerProcess
from resolver.testing._flight_server import (
    ACTIONS,
    ENDLESS,
    NumbersServer,
    _HeadersFactory,
    main,
    make_server,
)

PACKAGE_ROOT = str(Path(resolver.__file__).resolve().parents[1])


def exists(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while exists(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_start_stop_and_restart_keep_the_address() -> None:
    with FlightServerProcess() as server:
        url, pid = server.url, server.pid
        assert FlightConnector().connect(url).list_actions()
        server.restart()
        assert server.url == url
        assert server.pid != pid
        assert not exists(pid)
        server.stop()
        assert not server.is_running
        server.stop()
        server.kill()
        server.start()
        pid = server.pid
        assert FlightConnector().connect(url).list_actions()
    assert not exists(pid)


def test_suspend_and_resume() -> None:
    with FlightServerProcess() as server:
        client = FlightConnector().connect(server.url)
        server.suspend()
        server.suspend()
        with pytest.raises(flight.FlightTimedOutError):
            client.list_actions(flight.FlightCallOptions(timeout=0.2))
        server.resume()
        assert client.list_actions()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_suspended_server_can_be_ended(end: str) -> None:
    server = FlightServerProcess().start()
    pid = server.pid
    server.suspend()
    getattr(server, end)()
    assert not exists(pid)


def test_what_it_serves(plain_server: FlightServerProcess) -> None:
    client = FlightConnector().connect(plain_server.url)
    schema = pa.schema([("i", pa.int64())])
    writer, reader = client.do_put(flight.FlightDescriptor.for_path("x"), schema)
    writer.write_batch(pa.record_batch([range(10)], schema=schema))
    writer.done_writing()
    assert reader.read().to_pybytes() == b"10"
    writer.close()
    (echo,) = client.do_action(flight.Action("echo", b"hello"))
    assert echo.body.to_pybytes() == b"hello"
    (slept,) = client.do_action(flight.Action("sleep", b"0.001"))
    assert slept.body.to_pybytes() == b"slept"
    with pytest.raises(flight.FlightServerError, match="no action"):
        list(client.do_action("none"))


class Context:
    """What a handler is told about its call."""

    def __init__(self, middleware: object = None) -> None:
        self.middleware = middleware

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def get_middleware(self, key: str) -> object:
        return self.middleware


OPTIONS = {
    "location": "grpc://127.0.0.1:0",
    "batch_rows": 3,
    "token": "t",
    "tls_certificate": None,
    "tls_key": None,
    "client_authority": None,
}


def test_its_handlers_one_by_one() -> None:
    # In the process they run on gRPC's threads, where no coverage tool looks.
    def act(kind: str, body: bytes = b"", middleware: object = None) -> bytes:
        (answer,) = server.do_action(Context(middleware), flight.Action(kind, body))
        return answer

    with make_server(OPTIONS) as server:
        assert [name for name, _ in server.list_actions(Context())] == sorted(ACTIONS)
        assert server.do_get(Context(), flight.Ticket(b"2")) is not None
        assert [batch.num_rows for batch in server._batches(2)] == [3, 3]
        endless = server._batches(None)
        assert [next(endless).column(0).to_pylist()[0] for _ in range(3)] == [0, 3, 6]
        assert server.do_get(Context(), flight.Ticket(ENDLESS)) is not None
        written: list[pa.Buffer] = []
        writer = SimpleNamespace(write=written.append)
        chunks = [SimpleNamespace(data=batch) for batch in server._batches(2)]
        server.do_put(Context(), flight.FlightDescriptor.for_path("x"), chunks, writer)
        assert written[0].to_pybytes() == b"6"
        assert act("echo", b"hello") == b"hello"
        assert int(act("pid")) == os.getpid()
        assert act("sleep", b"0") == b"slept"
        assert json.loads(act("calls"))["do_get"] == 2
        assert act("connections") == b"1"
        with pytest.raises(flight.FlightServerError, match="no action"):
            act("none")
        gate = _HeadersFactory("t")
        kept = gate.start_call(None, {"authorization": ["Bearer t"], "x-bin": [b"\xff"]})
        assert json.loads(act("headers", middleware=kept))["x-bin"] == ["/w=="]
        for given in ({}, {"authorization": ["Bearer u"]}):
            with pytest.raises(flight.FlightUnauthenticatedError):
                gate.start_call(None, given)


def test_its_main_ends_with_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    servers: list[NumbersServer] = []
    said = io.StringIO()

    def make(options: dict[str, Any]) -> NumbersServer:
        servers.append(make_server(options))
        return servers[0]

    monkeypatch.setattr("resolver.testing._flight_server.make_server", make)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({**OPTIONS, "token": None}) + "\n"))
    monkeypatch.setattr("sys.stdout", said)
    monkeypatch.setattr("os._exit", ended.append)
    main()
    servers[0].shutdown()
    assert ended == [0]
    assert json.loads(said.getvalue()) == {"port": servers[0].port}


def test_tls_options_reach_the_server(authority: Any) -> None:
    tls = {
        "location": "grpc+tls://127.0.0.1:0",
        "tls_certificate": authority.server_certificate.decode(),
        "tls_key": authority.server_key.decode(),
        "client_authority": authority.root.decode(),
    }
    with make_server({**OPTIONS, **tls}) as server:
        connector = FlightConnector(tls_root_certificates=authority.root)
        with pytest.raises(WorkerConnectError, match="client_certificate"):
            connector.connect(f"https://127.0.0.1:{server.port}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tls_certificate": b"-----BEGIN"}, "together"),
        ({"tls_key": b"-----BEGIN"}, "together"),
        ({"client_authority": b"-----BEGIN"}, "needs tls_certificate"),
        (
            {"unix_path": "w", "tls_certificate": b"-----BEGIN", "tls_key": b"-----BEGIN"},
            "no TLS",
        ),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FlightServerProcess(**options)  # type: ignore[arg-type]


def test_misuse_is_named() -> None:
    server = FlightServerProcess()
    for use in (lambda: server.port, lambda: server.url, lambda: server.pid, server.suspend):
        with pytest.raises(RuntimeError, match="start it"):
            use()
    server.start()
    with pytest.raises(RuntimeError, match="runs already"):
        server.start()
    server.stop()


def test_a_server_that_cannot_start_says_why() -> None:
    server = FlightServerProcess(tls_certificate=b"-----BEGIN no", tls_key=b"-----BEGIN no")
    with pytest.raises(RuntimeError, match=r"did not start: .+"):
        server.start()
    assert not server.is_running


def test_a_socket_without_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="directory that does not exist"):
        FlightServerProcess(unix_path=tmp_path / "none" / "w").start()


def test_a_server_that_is_too_slow_is_ended() -> None:
    server = FlightServerProcess(ready_timeout=0.001)
    with pytest.raises(RuntimeError, match="did not start"):
        server.start()
    assert not server.is_running


def test_a_server_nobody_holds_ends() -> None:
    server = FlightServerProcess().start()
    pid = server.pid
    del server
    wait_gone(pid)


def test_secrets_are_not_in_the_arguments(authority: object) -> None:
    with FlightServerProcess(token="s3cret") as server:
        assert b"s3cret" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()


PARENT = """
import sys
from resolver.testing import FlightServerProcess
server = FlightServerProcess().start()
pid = server.pid
if sys.argv[1] == "suspended":
    server.suspend()
print(pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads the process table in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
@pytest.mark.parametrize("state", ["running", "suspended"])
def test_nothing_is_left_when_the_parent_ends(how: signal.Signals | None, state: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, state],
        env={**os.environ, "PYTHONPATH": PACKAGE_ROOT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert exists(pid)
        if how is not None:
            parent.send_signal(how)
    wait_gone(pid)
