"""Worker: answers Flight calls by running the tasks of distributed queries.

Holds the session builder and turns each call's request into a session; the running
itself is ``_task``'s, the files are ``_exchange``'s, who may call is ``_listen``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Self

import pyarrow as pa
from pyarrow import flight

from . import _wire
from ._exchange import Exchange, QueryReleasedError, StoredPartition, read
from ._listen import CALL_MIDDLEWARE, Guard, ListenAddress
from ._settings import EXECUTION, check_travelled, derive_context
from ._state import SessionState, SessionStateBuilder
from ._task import InvalidPlanError, run_task

__all__ = ["Worker", "WorkerQueryContext", "WorkerServer"]

_ACTIONS: Final = [
    (_wire.EXECUTE_TASK, "Run a task; answers with its report when the output is ready."),
    (_wire.RELEASE_QUERY, "End a query: stop its tasks, remove its output."),
    (_wire.WORKER_INFO, "Process, uptime and resolver statistics, as JSON."),
]


@dataclass(frozen=True, slots=True)
class WorkerQueryContext:
    """What a worker's session builder is given for each task.

    ``builder`` is a fresh SessionStateBuilder to finish with ``build()``; ``headers``
    are the request's headers, lower-case names, without the authorization.
    """

    builder: SessionStateBuilder
    headers: Mapping[str, str]


SessionBuilder = Callable[[WorkerQueryContext], SessionState | Awaitable[SessionState]]


def _default_session(query: WorkerQueryContext) -> SessionState:
    return query.builder.build()


class Worker:
    """Runs tasks for coordinators. ``Worker()`` uses default sessions.

    ``allow_python_udfs=True`` lets plan bytes bring pickled Python functions, which is
    letting every caller run code here.
    """

    def __init__(
        self, session_builder: SessionBuilder | None = None, *, allow_python_udfs: bool = False
    ) -> None:
        self._session_builder = session_builder or _default_session
        self.allow_python_udfs: Final = allow_python_udfs

    @classmethod
    def from_session_builder(
        cls, session_builder: SessionBuilder, *, allow_python_udfs: bool = False
    ) -> Worker:
        """A worker whose sessions come from ``session_builder``.

        It is called for every task, on the thread that runs it and possibly on several
        at once, with a ``WorkerQueryContext``; it may be an ``async`` function.
        """
        return cls(session_builder, allow_python_udfs=allow_python_udfs)

    def build_session(self, headers: Mapping[str, str]) -> SessionState:
        """The session of one task. Raises what the builder raises, or ``TypeError``."""
        built = self._session_builder(WorkerQueryContext(SessionStateBuilder(), headers))
        if inspect.isawaitable(built):
            built = asyncio.run(_await(built))
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
        tls_certificate: bytes | None = None,
        tls_key: bytes | None = None,
        client_ca: bytes | None = None,
        token: str | None = None,
        insecure: bool = False,
    ) -> WorkerServer:
        """Listen on ``location`` (port 0: a free one) and return the server.

        Calls are answered from now on. Loopback by default; any other address needs
        ``tls_certificate`` and ``tls_key`` (PEM bytes) with ``token`` or ``client_ca``,
        or ``insecure=True``. Output goes to a directory of its own under
        ``exchange_dir`` (the system's temporary directory). Raises
        ``InvalidWorkerUrlError``, ``InsecureListenError``, or ``OSError`` when the
        address cannot be listened on.
        """
        guard = Guard(tls_certificate, tls_key, client_ca, token)
        address = ListenAddress.parse(location, guard, insecure=insecure)
        return WorkerServer(self, address, guard, Exchange(exchange_dir))


async def _await(built: Awaitable[SessionState]) -> SessionState:
    return await built


class WorkerServer:
    """A listening worker. ``with`` serves nothing new but shuts down at its end.

    ``url`` is the worker URL to give to sessions, ``location`` the same for pyarrow,
    ``port`` the port (0 for a Unix socket). ``serve()`` blocks until ``shutdown()``,
    which any thread may call.
    """

    def __init__(
        self, worker: Worker, address: ListenAddress, guard: Guard, exchange: Exchange
    ) -> None:
        self._exchange = exchange
        try:
            self._flight = _FlightServer(
                worker, exchange, address.flight_location(guard), guard.server_options()
            )
        except pa.ArrowException as error:
            exchange.close()
            raise OSError(
                f"cannot listen on {address.url.key}: {error}; is the port taken?"
            ) from error
        self.port: Final[int] = self._flight.port
        self.url: Final[str] = address.worker_url(self.port, guard)
        self.location: Final[str] = address.located(self.port, guard)
        self._stopping = threading.Lock()
        self._stopped = False

    def serve(self) -> None:
        """Answer calls until ``shutdown()``."""
        self._flight.wait()

    def shutdown(self) -> None:
        """Stop: end running tasks, refuse new ones, remove all output. Idempotent."""
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            self._exchange.close()
            self._flight.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"WorkerServer({self.url!r})"


class _FlightServer(flight.FlightServerBase):  # type: ignore[misc]  # pyarrow has no types
    def __init__(
        self, worker: Worker, exchange: Exchange, location: str, options: Mapping[str, Any]
    ) -> None:
        super().__init__(location, **options)
        self._worker = worker
        self._exchange = exchange
        self._started = time.monotonic()
        self._last_session: SessionState | None = None

    def list_actions(self, _context: flight.ServerCallContext) -> list[tuple[str, str]]:
        return _ACTIONS

    def do_action(
        self, context: flight.ServerCallContext, action: flight.Action
    ) -> list[flight.Result]:
        handlers: dict[str, Callable[[flight.ServerCallContext, bytes], bytes]] = {
            _wire.EXECUTE_TASK: self._execute_task,
            _wire.RELEASE_QUERY: self._release_query,
            _wire.WORKER_INFO: self._worker_info,
        }
        with _answering():
            handler = handlers.get(action.type)
            if handler is None:
                raise _wire.WireError(
                    f"no such action; this worker answers {', '.join(sorted(handlers))}"
                )
            return [flight.Result(handler(context, action.body.to_pybytes()))]

    def do_get(
        self, _context: flight.ServerCallContext, ticket: flight.Ticket
    ) -> flight.FlightDataStream:
        with _answering():
            stored = self._exchange.partition(_wire.PartitionTicket.parse(ticket.ticket))
            reader = pa.RecordBatchReader.from_batches(_stored_schema(stored), _checked(stored))
            # Not a GeneratorStream: that one sends no dictionaries.
            return flight.RecordBatchStream(reader)

    def _execute_task(self, context: flight.ServerCallContext, body: bytes) -> bytes:
        request = _wire.TaskRequest.parse(body)
        headers = context.get_middleware(CALL_MIDDLEWARE).headers
        state = self._last_session = self._worker.build_session(headers)
        try:
            check_travelled(request.settings)
            session = derive_context(
                state.new_context(), {**request.settings, **EXECUTION}, state.runtime
            )
        except ValueError as error:
            raise _wire.WireError(f"unusable settings: {error}") from error
        report = run_task(
            request,
            session,
            self._exchange,
            context.is_cancelled,
            allow_python_udfs=self._worker.allow_python_udfs,
        )
        return report.to_bytes()

    def _release_query(self, _context: flight.ServerCallContext, body: bytes) -> bytes:
        self._exchange.release(_wire.parse_query_id(body))
        return b""

    def _worker_info(self, _context: flight.ServerCallContext, _body: bytes) -> bytes:
        if self._last_session is None:
            self._last_session = self._worker.build_session({})
        resolver: Any = self._last_session.channel_resolver
        stats = resolver.stats() if hasattr(resolver, "stats") else None
        info = {
            "pid": os.getpid(),
            "uptime": time.monotonic() - self._started,
            "queries": self._exchange.queries(),
            "resolver": type(resolver).__name__,
            "resolver_stats": dataclasses.asdict(stats) if stats is not None else {},
        }
        return json.dumps(info).encode()


def _stored_schema(stored: StoredPartition) -> pa.Schema:
    if not stored.files:
        return pa.schema([])
    with pa.memory_map(str(stored.files[0])) as source, pa.ipc.open_file(source) as reader:
        return reader.schema


def _checked(stored: StoredPartition) -> Iterator[pa.RecordBatch]:
    with _answering():
        yield from read(stored)


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Turn whatever goes wrong into the Flight error that says so, and keep serving."""
    try:
        yield
    except (GeneratorExit, flight.FlightError):
        raise
    except (_wire.WireError, InvalidPlanError, FileExistsError) as error:
        raise pa.ArrowInvalid(str(error)) from None
    except KeyError:
        raise pa.ArrowKeyError("this worker does not hold that output") from None
    except QueryReleasedError as error:
        raise flight.FlightCancelledError(str(error)) from None
    except BaseException as error:  # noqa: BLE001  # a Rust panic is one
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    text = str(error) or type(error).__name__
    raise flight.FlightServerError(text) from None
