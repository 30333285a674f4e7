"""A real Flight server in a process of its own, to be killed, restarted and suspended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote

import resolver
from resolver._urls import parse_worker_url

if TYPE_CHECKING:
    from types import TracebackType

_STOP_TIMEOUT: Final = 5.0
_POLL: Final = 0.005
_SERVE: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from resolver.testing._flight_server import main; main()"
)
_KILL_WHEN_INPUT_ENDS: Final = (
    "import os, signal, sys; sys.stdin.read(); os.kill(int(sys.argv[1]), signal.SIGKILL)"
)


class FlightServerProcess:
    """A small Flight server on a loopback port or Unix socket, in another process.

    ``port`` 0 means a free one, which a restart keeps. ``unix_path`` serves a Unix
    socket instead. ``tls_certificate`` and ``tls_key`` (PEM) make it a TLS server, and
    ``client_authority`` (PEM) one that asks clients for a certificate. With ``token`` it
    refuses calls without ``authorization: Bearer <token>``. ``batch_rows`` is the number
    of rows in each batch that ``do_get`` streams: the ticket ``b"3"`` asks for three
    batches, ``b"endless"`` for batches without end. The actions ``calls``,
    ``connections``, ``echo``, ``headers``, ``identity``, ``pid`` and ``sleep`` tell what it saw.

    `start` returns when the server answers, or raises RuntimeError within
    ``ready_timeout`` seconds. Whatever happens to this process, `kill -9` included,
    the server's ends with it. A context manager. Not to be used by two threads at once.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        unix_path: str | os.PathLike[str] | None = None,
        tls_certificate: bytes | None = None,
        tls_key: bytes | None = None,
        client_authority: bytes | None = None,
        token: str | None = None,
        batch_rows: int = 1_024,
        ready_timeout: float = 30.0,
    ) -> None:
        if (tls_certificate is None) != (tls_key is None):
            raise ValueError("tls_certificate and tls_key are given together or not at all")
        if client_authority is not None and tls_certificate is None:
            raise ValueError("client_authority needs tls_certificate and tls_key")
        if unix_path is not None and tls_certificate is not None:
            raise ValueError("a Unix socket has no TLS")
        self._host = f"[{host}]" if ":" in host else host
        self._port = port
        self._unix_path = None if unix_path is None else Path(unix_path).absolute()
        self._tls = tls_certificate is not None
        self._options: dict[str, Any] = {
            "tls_certificate": _text(tls_certificate),
            "tls_key": _text(tls_key),
            "client_authority": _text(client_authority),
            "token": token,
            "batch_rows": batch_rows,
        }
        self._ready_timeout = ready_timeout
        self._process: subprocess.Popen[str] | None = None
        self._watchdog: subprocess.Popen[str] | None = None
        self._cleanup: weakref.finalize[..., FlightServerProcess] | None = None

    # -- looking at it ---------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The canonical worker URL. Raises RuntimeError before the first start."""
        return parse_worker_url(self._location()).key

    @property
    def port(self) -> int:
        """The TCP port, 0 for a Unix socket. Raises RuntimeError before the first start."""
        if self._unix_path is None and self._port == 0:
            raise RuntimeError("the server has no port yet; start it")
        return self._port

    @property
    def pid(self) -> int:
        """The process identifier. Raises RuntimeError when the server does not run."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether its process exists, suspended or not."""
        return self._process is not None and self._process.poll() is None

    # -- doing things to it ----------------------------------------------------------------

    def start(self) -> FlightServerProcess:
        """Start the server and wait until it answers."""
        if self.is_running:
            raise RuntimeError("the server runs already")
        if self._unix_path is not None:
            if not self._unix_path.parent.is_dir():
                raise FileNotFoundError(
                    f"unix_path is in a directory that does not exist: {self._unix_path.parent}"
                )
            self._unix_path.unlink(missing_ok=True)
        location = self._location(allow_unknown_port=True)
        package_root = Path(resolver.__file__).resolve().parents[1]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(  # noqa: S603 -- this interpreter, our own arguments
                [sys.executable, "-c", _SERVE, str(package_root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # A terminal's Ctrl-C is for the tests; they stop their servers.
                start_new_session=True,
            )
            self._process = process
            self._cleanup = weakref.finalize(self, _end, process, os.getpid())
            try:
                # Secrets go through the pipe: arguments are open to every local user.
                _write_line(process, json.dumps({**self._options, "location": location}))
                ready = json.loads(_read_line(process, self._ready_timeout))
            except (OSError, ValueError, TimeoutError) as error:
                self.kill()
                log.seek(0)
                raise RuntimeError(
                    f"the Flight server at {location} did not start: {log.read()[-2_000:]}"
                ) from error
        if self._unix_path is None:
            self._port = int(ready["port"])
        return self

    def stop(self) -> None:
        """End the server by closing its input; by force if it does not end. Idempotent."""
        process = self._process
        if process is None:
            return
        if self._watchdog is not None:
            self.resume()
        _close(process.stdin)
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
        self._reap()

    def kill(self) -> None:
        """Send SIGKILL and wait for the end, as a crash would look. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def restart(self) -> None:
        """Kill the server if it runs, and start it again at the same address."""
        self.kill()
        self.start()

    def suspend(self) -> None:
        """Send SIGSTOP: connections stay open and nothing answers."""
        process = self._running()
        if self._watchdog is None:
            # A stopped process does not see its input end, so somebody else must.
            self._watchdog = subprocess.Popen(  # noqa: S603 -- as above
                [sys.executable, "-I", "-S", "-c", _KILL_WHEN_INPUT_ENDS, str(process.pid)],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        os.kill(process.pid, signal.SIGSTOP)
        _wait_stopped(process.pid)

    def resume(self) -> None:
        """Send SIGCONT."""
        self._end_watchdog()
        os.kill(self._running().pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        if not self.is_running:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # -- inside ----------------------------------------------------------------------------

    def _location(self, *, allow_unknown_port: bool = False) -> str:
        if self._unix_path is not None:
            return parse_worker_url(f"grpc+unix://{quote(os.fsencode(self._unix_path))}").location
        scheme = "grpc+tls" if self._tls else "grpc+tcp"
        port = self._port if allow_unknown_port else self.port
        return f"{scheme}://{self._host}:{port}"

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("the server does not run; start it")
        return self._process

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _close(process.stdin)
            _close(process.stdout)
            process.wait()
        if self._cleanup is not None:
            self._cleanup.detach()
        self._end_watchdog()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)

    def _end_watchdog(self) -> None:
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.kill()  # before its input ends, which would make it act
            watchdog.wait()
            _close(watchdog.stdin)


def _text(pem: bytes | None) -> str | None:
    return None if pem is None else pem.decode("ascii")


def _write_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _read_line(process: subprocess.Popen[str], timeout: float) -> str:
    """Read the one line the server prints; OSError when it ends first."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout):
            raise TimeoutError(f"no answer within {timeout:g} s")
    line = process.stdout.readline()
    if not line:
        raise OSError("it ended before it was ready")
    return line


def _wait_stopped(pid: int, timeout: float = 5.0) -> None:
    """Return when the kernel has stopped the process; a signal alone is a request."""
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + timeout
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "T":
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not stop within {timeout:g} s")
        threading.Event().wait(_POLL)


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):  # a broken pipe is what a killed server leaves
            pipe.close()


def _end(process: subprocess.Popen[str], owner: int) -> None:
    """Last resort, when nobody stopped the server before its handle went away."""
    if os.getpid() != owner:
        return  # a forked child ends; the server is its parent's
    if process.poll() is None:
        process.kill()
    _close(process.stdin)
    _close(process.stdout)
    process.wait()
