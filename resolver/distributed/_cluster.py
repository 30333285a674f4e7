"""LocalCluster: workers in processes of their own, on this machine.

Owns processes and one directory, and leaves neither behind: not on exit, not on error,
and not when this process is killed. For the last, every worker holds the reading end of
a pipe whose other end only this process has; when it closes, for whatever reason, the
worker stops and removes the cluster's directory. Queries are not this module's business.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from resolver._flight import FlightConnector
from resolver._resolver import DefaultChannelResolver

from ._directory import LockedDirectory
from ._errors import ClusterStartError
from ._planner import DistributedPhysicalOptimizerRule
from ._serve import TOKEN_VARIABLE
from ._session import SessionContext
from ._state import SessionStateBuilder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from resolver._resolver import ChannelResolver

__all__ = ["LocalCluster"]

_STOP_TIMEOUT: Final = 5.0  # seconds for a worker to stop by itself before it is killed
_SHOWN: Final = 4_000  # characters of what a worker that failed had printed
_PACKAGE_PARENT: Final = Path(__file__).resolve().parents[2]


class LocalCluster:
    """``workers`` worker processes on free loopback ports; itself a WorkerResolver.

    Starts on ``start()`` or ``with``; returns once every worker answers, or raises
    ``ClusterStartError`` with the worker's stderr after ``start_timeout`` seconds.
    ``session_builder`` names a function for ``Worker.from_session_builder`` as
    ``"module:function"``, found on this process' ``sys.path``; ``environment`` is added to
    the workers' own. ``processes`` are their ``subprocess.Popen`` objects. Start and close
    it on one thread; sessions may be made and used on any. Raises ``ValueError`` for
    numbers below 1.

    ``slots`` is how many tasks a worker runs at once, ``exchange_quota`` how many bytes of
    stage output it keeps (``None``: no limit), ``version`` what it says its version is.

    With ``token=True`` the workers answer only calls with a random token of this cluster,
    which no other user of this machine can know. Sessions of ``session()`` send it, and
    so do the workers to one another; a channel resolver of your own must send ``token``
    as the header ``authorization: Bearer <token>``.
    """

    def __init__(
        self,
        workers: int = 3,
        *,
        start_timeout: float = 60.0,
        session_builder: str | None = None,
        environment: Mapping[str, str] | None = None,
        slots: int = 1,
        exchange_quota: int | None = None,
        version: str | None = None,
        token: bool = False,
    ) -> None:
        if workers < 1:
            raise ValueError(f"a cluster of {workers} workers; it needs at least 1")
        if slots < 1:
            raise ValueError(f"workers of {slots} slots; each needs at least 1")
        self.processes: list[subprocess.Popen[str]] = []
        self._workers = workers
        self._start_timeout = start_timeout
        self._session_builder = session_builder
        self._environment = dict(environment or {})
        self._arguments = ["--slots", str(slots)]
        if exchange_quota is not None:
            self._arguments += ["--exchange-quota", str(exchange_quota)]
        if version is not None:
            self._arguments += ["--worker-version", version]
        self._token = secrets.token_urlsafe(32) if token else None
        self._own_resolver: DefaultChannelResolver | None = None
        self._urls: tuple[str, ...] = ()
        self._directory: LockedDirectory | None = None
        self._finalizer: weakref.finalize[..., LocalCluster] | None = None

    def start(self) -> Self:
        """Start the workers and wait until they are ready. Once per cluster.

        Raises ``ClusterStartError``, or ``RuntimeError`` the second time.
        """
        if self._finalizer is not None:
            raise RuntimeError("a LocalCluster starts once; make another one")
        self._directory = LockedDirectory("cluster")
        self._finalizer = weakref.finalize(
            self, _stop, self.processes, self._directory, os.getpid()
        )
        if self._token is not None:
            headers = {"authorization": f"Bearer {self._token}"}
            self._own_resolver = DefaultChannelResolver(FlightConnector(headers=headers))
        try:
            for index in range(self._workers):
                self.processes.append(self._spawn(index))
            self._urls = self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def get_urls(self) -> Sequence[str]:
        """The workers' URLs, none before the start; a worker that died keeps its place.

        Thread-safe.
        """
        return self._urls

    @property
    def token(self) -> str | None:
        """What the workers want to be shown; ``None`` if anybody may call them."""
        return self._token

    def session(
        self,
        channel_resolver: ChannelResolver | None = None,
        *,
        builder: SessionStateBuilder | None = None,
    ) -> SessionContext:
        """A session on this cluster, its fetched output in the cluster's directory.

        ``builder`` brings further settings; the cluster adds its workers and the rule. A
        channel resolver is given here and not to the builder if the cluster has a token.
        """
        if self._directory is None:
            raise RuntimeError("the cluster has not been started")
        builder = SessionStateBuilder() if builder is None else builder
        if channel_resolver is not None:
            builder.with_distributed_channel_resolver(channel_resolver)
        elif self._own_resolver is not None:
            builder.with_distributed_channel_resolver(self._own_resolver)
        return SessionContext(
            builder.with_distributed_worker_resolver(self)
            .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
            .with_exchange_dir(self._directory.path)
            .build()
        )

    def close(self) -> None:
        """Stop the workers and remove the cluster's directory. Idempotent.

        A worker that has not stopped after 5 seconds is killed.
        """
        if self._finalizer is not None:
            self._finalizer()
        if self._own_resolver is not None:
            self._own_resolver.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LocalCluster(workers={self._workers}, urls={list(self._urls)!r})"

    def _stderr_path(self, index: int) -> Path:
        assert self._directory is not None
        return self._directory.path / f"worker-{index}.log"

    def _spawn(self, index: int) -> subprocess.Popen[str]:
        assert self._directory is not None
        # -P: what lies about in the current directory is no part of a worker.
        command = [sys.executable, "-P", "-m", "resolver", "worker"]
        command += ["--listen", "grpc://127.0.0.1:0"]
        command += ["--exchange-dir", str(self._directory.path)]
        command += ["--owner", str(os.getpid()), "--owner-dir", str(self._directory.path)]
        command += self._arguments
        if self._session_builder is not None:
            command += ["--session-builder", self._session_builder]
        with self._stderr_path(index).open("w") as stderr:
            return subprocess.Popen(  # noqa: S603  # our own module, and no shell
                command,
                stdin=subprocess.PIPE,  # the pipe whose end means that we are gone
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=self._child_environment(),
            )

    def _child_environment(self) -> dict[str, str]:
        environment = {**os.environ, **self._environment}
        # The workers must find the very package that started them, and what it could import.
        path = [str(_PACKAGE_PARENT), *sys.path, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        if self._token is not None:  # not an argument: those are for everybody to see
            environment[TOKEN_VARIABLE] = self._token
        else:
            environment.pop(TOKEN_VARIABLE, None)
        return environment

    def _wait_until_ready(self) -> tuple[str, ...]:
        deadline = time.monotonic() + self._start_timeout
        urls: dict[int, str] = {}
        said: dict[int, list[str]] = {index: [] for index in range(self._workers)}

        def listen(index: int, process: subprocess.Popen[str]) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                url = _announced_url(line)
                if url is not None:
                    urls[index] = url
                    return
                # A session builder's module may print while it is imported.
                said[index].append(line)

        threads = [
            threading.Thread(target=listen, args=item, daemon=True)
            for item in enumerate(self.processes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for index, thread in enumerate(threads):
            if index not in urls:
                what = "ended before it was ready"
                if thread.is_alive():
                    what = f"was not ready within {self._start_timeout:g} s"
                raise self._failed(index, what, "".join(said[index]))
        return tuple(urls[index] for index in range(self._workers))

    def _failed(self, index: int, what: str, stdout: str) -> ClusterStartError:
        stderr = self._stderr_path(index).read_text(errors="replace").strip()[-_SHOWN:]
        printed = f"\nIts stdout: {stdout.strip()[-_SHOWN:]}" if stdout.strip() else ""
        return ClusterStartError(
            f"worker {index} {what}; its stderr: {stderr or '(empty)'}{printed}\n"
            "To see it fail by itself: python -m resolver worker"
        )


def _announced_url(line: str) -> str | None:
    """The URL in the line with which a worker announces itself; else ``None``."""
    try:
        ready: Any = json.loads(line)
    except ValueError:
        return None
    if isinstance(ready, dict) and isinstance(ready.get("url"), str) and "pid" in ready:
        return str(ready["url"])
    return None


def _stop(processes: list[subprocess.Popen[str]], directory: LockedDirectory, owner: int) -> None:
    if os.getpid() != owner:  # a forked child owns neither the workers nor the directory
        return
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    deadline = time.monotonic() + _STOP_TIMEOUT
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
    directory.close()
