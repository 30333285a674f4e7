"""FlightServerProcess: ready when it says so, killable, and gone when nobody needs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

import resolver
from resolver import FlightConnector
from resolver.testing import FlightServerProcess
from resolver.testing._flight_server import make_server

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


def test_the_server_in_this_process() -> None:
    # The same server without a process around it, for the coverage of its lines.
    options = {"location": "grpc://127.0.0.1:0", "batch_rows": 3, "token": "t"}
    absent = dict.fromkeys(("tls_certificate", "tls_key", "client_authority"))
    with make_server({**options, **absent}) as server:
        connector = FlightConnector(headers={"authorization": "Bearer t", "x-bin": b"\xff"})
        client = connector.connect(f"http://127.0.0.1:{server.port}")
        assert client.do_get(flight.Ticket(b"2")).read_all().column("i").to_pylist() == [*range(6)]
        (headers,) = client.do_action("headers")
        assert json.loads(headers.body.to_pybytes())["x-bin"] == ["/w=="]
        (pid,) = client.do_action("pid")
        assert int(pid.body.to_pybytes()) == os.getpid()
        (calls,) = client.do_action("calls")
        assert json.loads(calls.body.to_pybytes())["do_get"] == 1
        (connections,) = client.do_action("connections")
        assert connections.body.to_pybytes() == b"1"
        with pytest.raises(flight.FlightUnauthenticatedError):
            FlightConnector().connect(f"http://127.0.0.1:{server.port}").list_actions()


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
    with pytest.raises(RuntimeError, match="did not start: .+"):
        server.start()
    assert not server.is_running


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
