"""Worker: answers Flight calls by running the tasks of distributed queries.

Holds what a worker is made with and the life of its server. The calls themselves are
``_worker_calls``'s, the port is ``_listener``'s, the files are ``_exchange``'s, who may
call is ``_listen``'s.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import pyarrow as pa

from resolver._flight import FlightConnector
from resolver._pem import Credentials
from resolver._resolver import ChannelResolver, DefaultChannelResolver

from ._exchange import Exchange
from ._listen import Guard, ListenAddress
from ._listener import Listener
from ._state import SessionState, SessionStateBuilder
from ._task_pool import TaskPool
from ._worker_calls import CallHandlers

if TYPE_CHECKING:
    from resolver._tls import TlsConfig

__all__ = ["Worker", "WorkerQueryContext", "WorkerServer"]

_DRAIN_POLL: Final = 0.05  # seconds
_CHECK_POLL: Final = 0.1  # seconds

logger = logging.getLogger("resolver")


@dataclass(frozen=True, slots=True)
class WorkerQueryContext:
    """What a worker's session builder is given, once per query.

    ``builder`` is a fresh SessionStateBuilder to finish with ``build()``; it brings the
    channel resolver with the worker's own token, if it has one. ``headers`` are those of
    the call that brought the query's first task: ``str`` values, lower-case names, the
    last value of a repeated name, without the authorization and binary headers. Immutable.
    """

    builder: SessionStateBuilder
    headers: Mapping[str, str]


SessionBuilder = Callable[[WorkerQueryContext], SessionState | Awaitable[SessionState]]


def _default_session(query: WorkerQueryContext) -> SessionState:
    return query.builder.build()


class Worker:
    """Runs tasks for coordinators. ``Worker()`` uses default sessions.

    ``allow_python_udfs=True`` lets plan bytes bring pickled Python functions, which is
    letting every caller run code here. ``exchange_quota`` limits the stage output that
    is kept, in bytes; a query that needs more fails, and the worker lives on. ``None``:
    only the disk is the limit. Raises ``ValueError`` for a quota below 1.

    Set it up on one thread; it is only read once it has become a server. Several servers
    may be made of one worker; each has slots and a quota of its own.
    """

    def __init__(
        self,
        session_builder: SessionBuilder | None = None,
        *,
        allow_python_udfs: bool = False,
        exchange_quota: int | None = None,
    ) -> None:
        if exchange_quota is not None and exchange_quota < 1:
            raise ValueError(f"exchange_quota is {exchange_quota} bytes; say None for no limit")
        self._session_builder = session_builder or _default_session
        self.allow_python_udfs: Final = allow_python_udfs
        self.exchange_quota: Final = exchange_quota
        self.version = ""
        self.slots = _usable_cpus()

    @classmethod
    def from_session_builder(
        cls,
        session_builder: SessionBuilder,
        *,
        allow_python_udfs: bool = False,
        exchange_quota: int | None = None,
    ) -> Worker:
        """A worker whose sessions come from ``session_builder``.

        It is called once per query, by the query's first task here and on a thread of its
        own, with a ``WorkerQueryContext``; for several queries possibly at once. It may be
        an ``async`` function, which then runs in an event loop of its own and is cancelled
        when the query ends meanwhile; another function's slot is given to the next task
        then, and its thread left to itself. What it raises fails that task with its
        message, and the query with ``TaskFailedError``.
        """
        return cls(
            session_builder, allow_python_udfs=allow_python_udfs, exchange_quota=exchange_quota
        )

    def with_version(self, version: str) -> Self:
        """What ``worker_info`` calls the version of this worker, such as a build's name."""
        self.version = version
        return self

    def with_slots(self, slots: int) -> Self:
        """How many tasks run at once; more wait their turn.

        A query is planned for as many partitions as all workers have slots together.
        Default: the number of CPUs that this process may use. Takes effect with the
        next ``into_flight_server()``. Raises ``ValueError`` for less than 1.
        """
        if slots < 1:
            raise ValueError(f"a worker of {slots} slots; it needs at least 1")
        self.slots = slots
        return self

    def build_session(
        self,
        headers: Mapping[str, str],
        channel_resolver: ChannelResolver | None = None,
        *,
        check: Callable[[], object] = lambda: None,
    ) -> SessionState:
        """The session of one query. Raises what the builder raises, or ``TypeError``.

        ``channel_resolver`` is the session's unless the builder registers another one.
        ``check`` is called several times a second while the builder awaits, and may raise.
        """
        builder = SessionStateBuilder()
        if channel_resolver is not None:
            builder.with_distributed_channel_resolver(channel_resolver)
        built = self._session_builder(WorkerQueryContext(builder, headers))
        if inspect.isawaitable(built):
            built = asyncio.run(_await(built, check))
        if not isinstance(built, SessionState):
            raise TypeError(
                f"the worker's session builder returned {type(built).__name__}, "
                "not the SessionState that builder.build() gives"
            )
        return built

    def into_flight_server(
        self,
        location: object = "grpc://127.0.0.1:0",
        *,
        exchange_dir: str | os.PathLike[str] | None = None,
        advertise: object = None,
        tls: TlsConfig | None = None,
        tls_certificate: bytes | None = None,
        tls_key: bytes | None = None,
        client_ca: bytes | None = None,
        token: str | None = None,
        insecure: bool = False,
    ) -> WorkerServer:
        """Listen on ``location`` (port 0: a free one) and return the server.

        ``location`` is a worker URL, as ``str`` or ``pyarrow.flight.Location``. Calls are
        answered from now on. Loopback by default; any other address needs
        ``tls_certificate`` and ``tls_key`` (PEM bytes) with ``token`` (text, expected as
        ``authorization: Bearer <token>``) or ``client_ca`` (PEM bytes; a certificate signed
        by it is demanded), or ``insecure=True``. Output goes to a directory of its own,
        for this user only, under ``exchange_dir`` (the system's temporary directory).

        ``tls`` is a `TlsConfig` instead of those three: its ``server_certificate`` and
        ``server_key`` are shown to callers, and its ``client_authorities`` are whose
        certificates are demanded. Its other part is what this worker shows and trusts when it
        calls others. All of them may change while it serves: new connections meet the new
        ones, calls under way run to their end.

        ``advertise`` is the worker URL by which others reach this worker (port 0: the
        one it listens on). It is needed for an address such as ``0.0.0.0``, which stands
        for all of this machine's and is nobody's URL.

        With a ``token`` or ``tls``, sessions of this worker use them also for the workers
        that they call, unless the session builder registers a channel resolver of its own.

        Raises ``InvalidWorkerUrlError``, ``InsecureListenError``, ``ValueError``, or
        ``OSError`` when the address cannot be listened on.
        """
        if tls is None:
            guard = Guard(tls_certificate, tls_key, client_ca, token)
        else:
            if not (tls_certificate is tls_key is client_ca is None):
                raise ValueError("give certificates and keys within tls or beside it, not both")
            guard = Guard.of(tls.credentials(), token)
        address = ListenAddress.parse(location, guard, insecure=insecure, advertise=advertise)
        exchange = Exchange(exchange_dir, quota=self.exchange_quota)
        return WorkerServer(self, address, guard, exchange, tls)


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


async def _await(built: Awaitable[SessionState], check: Callable[[], object]) -> SessionState:
    building = asyncio.ensure_future(built)
    while not building.done():
        check()
        await asyncio.wait([building], timeout=_CHECK_POLL)
    return building.result()


class WorkerServer:
    """A listening worker. ``with`` serves nothing new but shuts down at its end.

    Made by ``Worker.into_flight_server()``. ``url`` is the worker URL to give to
    sessions, ``location`` the same for pyarrow (both ``str``), ``port`` the port (0 for a
    Unix socket). ``serve()`` blocks until ``shutdown()``. Thread-safe.
    """

    def __init__(
        self,
        worker: Worker,
        address: ListenAddress,
        guard: Guard,
        exchange: Exchange,
        tls: TlsConfig | None = None,
    ) -> None:
        self._exchange = exchange
        self._pool: TaskPool[bytes] = TaskPool(worker.slots)
        self._own_resolver: DefaultChannelResolver | None = None
        if guard.token is not None or tls is not None:
            token = guard.token
            headers = None if token is None else {"authorization": f"Bearer {token}"}
            self._own_resolver = DefaultChannelResolver(FlightConnector(headers=headers, tls=tls))
        self._calls = CallHandlers(
            worker, exchange, self._pool, channel_resolver=self._own_resolver
        )
        try:
            self._listener = Listener(self._calls, address, guard)
        except (OSError, pa.ArrowException) as error:
            self._calls.stop()
            exchange.close()
            raise OSError(f"cannot listen on {address.asked}: {error}") from error
        self.port: Final[int] = self._listener.port
        self.url: Final[str] = address.worker_url(self.port, guard)
        self.location: Final[str] = address.located(self.port, guard)
        self._calls.announced_location = self.location
        self._stopping = threading.Lock()
        self._stopped = threading.Event()
        self._hurry = threading.Event()
        self._tls = tls
        self._token = guard.token
        if tls is not None:
            tls.subscribe(self)
            self._credentials_changed()  # between the first reading and now

    @property
    def is_idle(self) -> bool:
        """Whether no task runs or waits here and no query has output here."""
        return not (self._pool.running or self._pool.queued or self._exchange.queries())

    @property
    def has_tls(self) -> bool:
        """Whether it was given a ``TlsConfig``, whose certificates may be renewed."""
        return self._tls is not None

    @property
    def failure(self) -> OSError | None:
        """Why calls are answered no more, though nobody asked for it; ``None``: they are."""
        return self._listener.failure

    def serve(self) -> None:
        """Block until ``shutdown()``. Calls are answered without it, too.

        Raises ``OSError`` when the port is lost while its certificate is renewed.
        """
        self._listener.wait()

    def renew_certificate(self) -> None:
        """Look at once whether the sources of ``tls`` have changed, and use what is new.

        Does nothing without ``tls``. Raises what `TlsConfig.rotate` raises.
        """
        if self._tls is not None:
            self._tls.rotate()

    def start_draining(self) -> None:
        """Refuse new tasks, with an error that says to run them elsewhere. Returns at once."""
        self._calls.is_draining = True

    def shutdown(self, drain: float = 0.0) -> None:
        """Stop: end running tasks, refuse new ones, remove all output. Idempotent.

        For up to ``drain`` seconds before that, running tasks may finish and their
        output be fetched, while new tasks are refused; until no query needs this worker.
        A call from another thread with ``drain=0`` ends such a wait. Without ``drain``
        it blocks for up to 5 seconds, until running tasks have noticed, and for up to 5
        more, until the calls that are being answered have ended; then it cuts them off.
        """
        self.start_draining()
        if drain:
            deadline = time.monotonic() + drain
            while not self.is_idle and time.monotonic() < deadline:
                if self._hurry.wait(_DRAIN_POLL):
                    break
        self._hurry.set()
        with self._stopping:
            if self._stopped.is_set():
                return
            self._stopped.set()
            self._pool.close()
            self._exchange.close()
            self._calls.stop()
            self._listener.close()
            if self._own_resolver is not None:
                self._own_resolver.close()

    def _credentials_changed(self) -> None:
        """For the TlsConfig: show new connections the certificate of now."""
        try:
            self._listener.renew(self._current_guard)
        except pa.ArrowException as error:
            logger.warning(
                "%s: the new certificate cannot be used (%s); the one of before stays in use",
                self.url,
                error,
            )

    def _current_guard(self) -> Guard:
        current = None if self._tls is None else self._tls.current
        return Guard.of(current or Credentials(), self._token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"WorkerServer({self.url!r})"
