"""The life of a worker process: announce it, wait, stop cleanly.

A worker ends on SIGTERM or SIGINT, once the queries it serves are over or it is told
again, or, when it has an owner, together with it: the owner
holds the other end of standard input, so its end reaches us even if it is killed, and
should a copy of that end live on in some other process, we notice that our parent is
another one. Flight is not this module's business.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from ._worker import WorkerServer

__all__ = ["TOKEN_VARIABLE", "Owner", "inherited_token", "serve"]

logger = logging.getLogger("resolver")

TOKEN_VARIABLE: Final = "RESOLVER_WORKER_TOKEN"  # noqa: S105  # a name, not a token
"""The environment variable in which an owner hands its workers their token."""

_PARENT_POLL: Final = 0.5  # seconds
_SIGNAL_POLL: Final = 0.2  # seconds
# Seconds after which calls that will not end are cut off, by whether anybody may still be
# waiting for them. gRPC itself would wait for as long as a peer keeps its socket open.
_STOP_TIMEOUT: Final = 10.0
_ORPHAN_STOP_TIMEOUT: Final = 1.0
# Seconds for which a worker that is told to stop serves the queries it has begun; less
# than the 30 s after which supervisors commonly kill.
_DRAIN_TIMEOUT: Final = 20.0
_OPEN_FILES: Final = 1 << 16


class Owner:
    """The process a worker belongs to, and the directory that ends with it."""

    def __init__(self, pid: int, directory: Path | None) -> None:
        self.pid = pid
        self.directory = directory

    def watch(self, stop: threading.Event) -> None:
        """Set ``stop`` once the owner is gone. Returns at once."""

        def until_end_of_input() -> None:
            with contextlib.suppress(OSError, ValueError):
                while os.read(sys.stdin.fileno(), 4_096):
                    pass
            stop.set()

        def until_orphaned() -> None:
            while not stop.wait(_PARENT_POLL):
                if self.is_gone:
                    stop.set()

        for watch in (until_end_of_input, until_orphaned):
            threading.Thread(target=watch, name=watch.__name__, daemon=True).start()

    @property
    def is_gone(self) -> bool:
        return os.getppid() != self.pid

    def clean_up(self) -> None:
        """Remove the owner's directory if the owner can no longer do it."""
        if self.directory is not None and self.is_gone:
            shutil.rmtree(self.directory, ignore_errors=True)


def inherited_token() -> str | None:
    """The token that this process was started with; its own children do not inherit it."""
    return os.environ.pop(TOKEN_VARIABLE, None)


def serve(server: WorkerServer, owner: Owner | None = None) -> None:
    """Announce ``server`` on standard output, as a line of JSON, and serve until told to stop.

    Call it on the main thread, where signals arrive. The first signal drains the worker,
    a second one, or the end of the owner, stops it; SIGHUP renews its certificate. Raises
    ``OSError`` when the port is lost meanwhile.
    """
    _allow_open_files()
    told = _Told(server, owner)
    _announce(server, owner)
    # A signal may land on one of gRPC's threads, which does not wake this one; and only
    # this one runs the handler.
    while not (told.drain.is_set() or told.stop.wait(_SIGNAL_POLL) or server.failure):
        if told.renew.is_set():
            told.renew.clear()
            _renew(server)
    server.start_draining()
    deadline = time.monotonic() + _DRAIN_TIMEOUT
    while not server.is_idle and time.monotonic() < deadline:
        if told.stop.wait(_SIGNAL_POLL):
            break
    orphaned = owner is not None and owner.is_gone
    timeout = _ORPHAN_STOP_TIMEOUT if orphaned else _STOP_TIMEOUT
    last_resort = threading.Timer(timeout, _cut_off, (owner,))
    last_resort.daemon = True
    last_resort.start()
    server.shutdown()
    last_resort.cancel()
    if not server.is_idle:
        # A task has not noticed yet that it is over. An interpreter that ended now would
        # pull its thread out from under DataFusion's code.
        _cut_off(owner)
    if owner is not None:
        owner.clean_up()
    if server.failure is not None:
        raise server.failure


class _Told:
    """What signals and the owner have said so far."""

    def __init__(self, server: WorkerServer, owner: Owner | None) -> None:
        self.drain, self.stop, self.renew = (threading.Event() for _ in range(3))
        signal.signal(signal.SIGTERM, self._end)
        if server.has_tls and hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: self.renew.set())
        if owner is None:
            signal.signal(signal.SIGINT, self._end)
        else:
            # Ctrl-C reaches the whole process group; when we end is for the owner to decide.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            owner.watch(self.stop)

    def _end(self, *_: object) -> None:
        if self.drain.is_set():
            self.stop.set()
        self.drain.set()


def _allow_open_files() -> None:
    """As many as this user may have: each partition of a shuffle is one while it is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the system has yet another limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _announce(server: WorkerServer, owner: Owner | None) -> None:
    try:
        sys.stdout.write(json.dumps({"url": server.url, "pid": os.getpid()}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        if owner is None:
            raise
        # It has gone, which we are about to notice, and has left us its directory.
    if owner is not None:
        # The owner reads that line and no more; what a session builder prints would fill
        # the pipe and then block us.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def _renew(server: WorkerServer) -> None:
    try:
        server.renew_certificate()
    except (OSError, ValueError) as error:
        logger.warning("told to renew the certificate, but the one of before stays: %s", error)


def _cut_off(owner: Owner | None) -> None:
    """End without waiting any longer; the output has been removed by now."""
    if owner is not None:
        owner.clean_up()
    os._exit(1)
