"""The Flight calls of a worker: tasks, their output, and questions about the worker.

Whatever a call brings, it is answered or refused with a Flight error, and the worker
stays up. The running of a task is ``_task``'s business, the port ``_listener``'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pyarrow as pa
from pyarrow import flight

from . import _wire
from ._exchange import Exchange, QueryReleasedError
from ._listen import CALL_MIDDLEWARE, CallHeaders
from ._partition import PIECE_BYTES, StoredPartition, ipc_options, read
from ._settings import EXECUTION, check_travelled
from ._task import InvalidPlanError, run_task
from ._task_pool import TaskCancelledError, TaskPool, TaskPoolFullError
from ._threads import call_interruptibly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import datafusion

    from resolver._resolver import ChannelResolver

    from ._state import SessionState
    from ._worker import Worker

__all__ = ["CallHandlers"]

_ACTIONS: Final = [
    (_wire.EXECUTE_TASK, "Start a task; answers with its report, or nothing while it runs."),
    (_wire.AWAIT_TASK, "Wait for a started task; answers as execute_task does."),
    (_wire.RELEASE_OUTPUTS, "Remove some output of a query that goes on."),
    (_wire.RELEASE_QUERY, "End a query: stop its tasks, remove its output."),
    (_wire.RENEW_LEASE, "Keep a query for its lease from now."),
    (_wire.WORKER_INFO, "Version, slots, load, uptime and resolver statistics, as JSON."),
    (_wire.HEALTH, "Whether the worker takes tasks, as JSON: serving or draining."),
]
_MOST_TEXT: Final = 2_500
"""Bytes of an error. It is sent twice over in headers, of which a client takes 8 KB."""
_SWEEP_INTERVAL: Final = 0.5  # seconds between looks for leases that have run out
_CHECK_POLL: Final = 0.1  # seconds
_MAX_HANGING: Final = 32
"""Session builders that nobody waits for any more; each is a thread of its own."""


class CallHandlers:
    """Answers the calls of one worker, on whichever thread they come, until ``stop()``."""

    def __init__(  # the parts of one worker
        self,
        worker: Worker,
        exchange: Exchange,
        pool: TaskPool[bytes],
        *,
        channel_resolver: ChannelResolver | None = None,
    ) -> None:
        self.is_draining = False
        self.announced_location = ""  # the worker's, once it listens
        self._worker = worker
        self._exchange = exchange
        self._pool = pool
        self._sessions = _Sessions(worker, channel_resolver)
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._handlers: dict[str, Callable[[flight.ServerCallContext, bytes], bytes]] = {
            _wire.EXECUTE_TASK: self._execute_task,
            _wire.AWAIT_TASK: self._await_task,
            _wire.RELEASE_OUTPUTS: self._release_outputs,
            _wire.RELEASE_QUERY: self._release_query,
            _wire.RENEW_LEASE: self._renew_lease,
            _wire.WORKER_INFO: self._worker_info,
            _wire.HEALTH: self._health,
        }
        threading.Thread(
            target=_sweep, args=(weakref.ref(self), self._stop), name="lease", daemon=True
        ).start()

    def stop(self) -> None:
        """Look for abandoned queries no more."""
        self._stop.set()

    def list_actions(self) -> list[tuple[str, str]]:
        return _ACTIONS

    def do_action(
        self, context: flight.ServerCallContext, action: flight.Action
    ) -> list[flight.Result]:
        with _answering():
            handler = self._handlers.get(action.type)
            if handler is None:
                raise _wire.WireError(
                    f"no such action; this worker answers {', '.join(sorted(self._handlers))}"
                )
            return [flight.Result(handler(context, action.body.to_pybytes()))]

    def do_get(self, ticket: flight.Ticket) -> flight.FlightDataStream:
        """A piece of a partition: of ``PIECE_BYTES``, or one batch if that is larger."""
        with _answering():
            asked = _wire.PartitionTicket.parse(ticket.ticket)
            stored = self._exchange.partition(asked)
            if asked.first_batch > stored.report.batches:
                raise _wire.WireError(f"first_batch is above {stored.report.batches}")
            batches = self._piece(asked, stored)
            reader = pa.RecordBatchReader.from_batches(stored.schema, batches)
            # Not a GeneratorStream: that one sends no dictionaries.
            return flight.RecordBatchStream(reader, options=ipc_options(stored.compression))

    def list_flights(self) -> Iterator[flight.FlightInfo]:
        """One flight for every stored partition."""
        with _answering():
            for output, partitions in self._exchange.outputs().items():
                for index, stored in enumerate(partitions):
                    yield self._flight_info(_wire.PartitionTicket(output, index), stored)

    def _flight_info(
        self, ticket: _wire.PartitionTicket, stored: StoredPartition
    ) -> flight.FlightInfo:
        path = [*map(str, dataclasses.astuple(ticket.output)), str(ticket.partition)]
        endpoint = flight.FlightEndpoint(ticket.to_bytes(), [self.announced_location])
        return flight.FlightInfo(
            stored.schema,
            flight.FlightDescriptor.for_path(*path),
            [endpoint],
            stored.report.rows,
            stored.report.bytes,
        )

    def _piece(
        self, asked: _wire.PartitionTicket, stored: StoredPartition
    ) -> Iterator[pa.RecordBatch]:
        with _answering():
            for batch in read(stored, asked.first_batch, limit=PIECE_BYTES):
                yield batch
                # Whoever reads it slowly is still there.
                with contextlib.suppress(_wire.UnknownOutputError):
                    self._exchange.touch(asked.output.query)

    def _execute_task(self, context: flight.ServerCallContext, body: bytes) -> bytes:
        request = _wire.TaskRequest.parse(body)
        if self.is_draining:
            raise _refusal(
                "this worker is shutting down and takes no more tasks; run it on another one"
            )
        call: CallHeaders = context.get_middleware(CALL_MIDDLEWARE)
        headers = call.named(request.passthrough)
        query = request.output.query

        def run(is_cancelled: Callable[[], bool]) -> bytes:
            def check() -> None:
                self._exchange.check_running(query)
                if is_cancelled():
                    raise TaskCancelledError("the coordinator has gone away")

            try:
                state = self._sessions.of(query, call.headers, check)
                self._exchange.check_running(query)
            except QueryReleasedError:  # while the session was built
                self._sessions.forget(query)
                raise
            try:
                report = run_task(
                    request,
                    _context_of(state, request),
                    self._exchange,
                    is_cancelled,
                    resolver=state.channel_resolver,
                    headers=headers,
                    allow_python_udfs=self._worker.allow_python_udfs,
                )
            except BaseException:
                # With the query's files gone, a plan fails in words that blame the plan.
                self._exchange.check_running(query)
                raise
            return report.to_bytes()

        self._exchange.touch(query, request.lease, ahead=request.wait)
        self._pool.start(request.output, run)
        try:
            self._exchange.check_running(query)
        except QueryReleasedError:  # between those two
            self._forget(query)
            raise
        return self._answer(context, request.output, request.wait)

    def _await_task(self, context: flight.ServerCallContext, body: bytes) -> bytes:
        request = _wire.AwaitRequest.parse(body)
        self._exchange.touch(request.output.query, ahead=request.wait)
        return self._answer(context, request.output, request.wait)

    def _answer(
        self, context: flight.ServerCallContext, key: _wire.OutputKey, seconds: float
    ) -> bytes:
        try:
            return self._pool.wait(key, seconds, context.is_cancelled) or b""
        finally:
            with contextlib.suppress(_wire.UnknownOutputError):
                self._exchange.touch(key.query)

    def _release_query(self, _context: flight.ServerCallContext, body: bytes) -> bytes:
        query = _wire.parse_query_id(body)
        self._exchange.release(query)
        self._forget(query)
        return b""

    def _release_outputs(self, _context: flight.ServerCallContext, body: bytes) -> bytes:
        self._exchange.discard(_wire.ReleaseRequest.parse(body).outputs)
        return b""

    def _renew_lease(self, _context: flight.ServerCallContext, body: bytes) -> bytes:
        self._exchange.touch(_wire.parse_query_id(body))
        return b""

    def end_abandoned_queries(self) -> None:
        """Release the queries whose lease has run out."""
        for query in self._exchange.sweep():
            self._forget(query)

    def _forget(self, query: str) -> None:
        """What the exchange does not know of a query that is over."""
        self._pool.release(query)
        self._sessions.forget(query)

    def _worker_info(self, _context: flight.ServerCallContext, _body: bytes) -> bytes:
        latest = self._sessions.latest
        resolver: Any = None if latest is None else latest.channel_resolver
        info = {
            "pid": os.getpid(),
            "version": self._worker.version,
            "slots": self._pool.slots,
            "running": self._pool.running,
            "queued": self._pool.queued,
            "load": os.getloadavg()[0],
            "uptime": time.monotonic() - self._started,
            "queries": self._exchange.queries(),
            "exchange_bytes": self._exchange.bytes,
            "resolver": None if resolver is None else type(resolver).__name__,
            "resolver_stats": _stats_of(resolver),
        }
        return json.dumps(info).encode()

    def _health(self, _context: flight.ServerCallContext, _body: bytes) -> bytes:
        return json.dumps({"status": "draining" if self.is_draining else "serving"}).encode()


def _stats_of(resolver: Any) -> dict[str, Any]:
    """What a resolver tells of itself as ours does; nothing of one that does otherwise."""
    try:
        stats: dict[str, Any] = dataclasses.asdict(resolver.stats())
        json.dumps(stats)
    except Exception:  # noqa: BLE001  # whatever it is, the worker has more to tell
        return {}
    return stats


class _Sessions:
    """The session of every query that runs here: built once, by its first task. Thread-safe.

    ``latest`` is the one that was built last. A task does not wait for a builder that hangs
    any longer than for its query; the builder's thread cannot be ended, so there is a limit
    to how many of these there may be.
    """

    def __init__(self, worker: Worker, channel_resolver: ChannelResolver | None) -> None:
        self._worker = worker
        self._channel_resolver = channel_resolver
        self._lock = threading.Lock()
        self._building: dict[str, threading.Lock] = {}
        self._builders = threading.Semaphore(worker.slots + _MAX_HANGING)
        self._built: dict[str, SessionState] = {}
        self.latest: SessionState | None = None

    def of(
        self, query: str, headers: Mapping[str, str], check: Callable[[], object]
    ) -> SessionState:
        """Raises if the session builder does, saying so; then the next task tries again.

        Or what ``check`` raises, which tells whether there is still somebody who waits.
        """
        with self._lock:
            building = self._building.setdefault(query, threading.Lock())
        while not building.acquire(timeout=_CHECK_POLL):
            check()
        try:
            state = self._built.get(query)
            if state is None:
                state = self._new(headers, check)
                with self._lock:
                    if query in self._building:  # else it is over meanwhile
                        self._built[query] = state
                    self.latest = state
        finally:
            building.release()
        return state

    def _new(self, headers: Mapping[str, str], check: Callable[[], object]) -> SessionState:
        def build() -> SessionState:
            if not self._builders.acquire(blocking=False):
                raise TaskPoolFullError("too many session builders have not returned")
            try:
                return self._worker.build_session(headers, self._channel_resolver, check=check)
            finally:
                self._builders.release()

        try:
            return call_interruptibly(build, name="session", check=check)
        except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError):
            raise  # it turns the caller away
        except (QueryReleasedError, TaskCancelledError, TaskPoolFullError):
            raise
        except Exception as error:
            # Of its own type it could mean something else here: FileExistsError, a replay.
            raise RuntimeError(
                f"the worker's session builder raised {type(error).__name__}: {error}"
            ) from error

    def forget(self, query: str) -> None:
        with self._lock:
            self._building.pop(query, None)
            self._built.pop(query, None)


def _context_of(state: SessionState, request: _wire.TaskRequest) -> datafusion.SessionContext:
    try:
        check_travelled(request.settings)
        return state.new_context({**request.settings, **EXECUTION})
    except ValueError as error:
        raise _wire.WireError(f"unusable settings: {error}") from error


def _sweep(calls_of: Callable[[], CallHandlers | None], stop: threading.Event) -> None:
    """Look for leases that have run out until ``stop``, or until the worker has gone."""
    while not stop.wait(_SWEEP_INTERVAL):
        calls = calls_of()
        if calls is None:
            return
        calls.end_abandoned_queries()
        del calls


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Turn whatever goes wrong into the Flight error that says so, and keep serving."""
    try:
        yield
    except (GeneratorExit, flight.FlightError):
        raise
    except (_wire.WireError, InvalidPlanError, FileExistsError) as error:
        raise pa.ArrowInvalid(_text_of(error)) from None
    except _wire.UnknownOutputError:
        raise pa.ArrowKeyError("this worker does not hold that output") from None
    except (QueryReleasedError, TaskCancelledError) as error:
        raise flight.FlightCancelledError(_text_of(error)) from None
    except TaskPoolFullError as error:
        raise _refusal(
            f"this worker takes no more tasks now: {error}; run it on another one, or later"
        ) from None
    except BaseException as error:  # noqa: BLE001  # a Rust panic is one
        _fail(error)


def _refusal(text: str) -> flight.FlightUnavailableError:
    """No task is taken, but what is here stays: nothing is lost."""
    return flight.FlightUnavailableError(text, json.dumps({"refused": True}).encode())


def _fail(error: BaseException) -> NoReturn:
    text = _text_of(error)
    if isinstance(error, KeyError):  # which says its key and no more
        text = f"KeyError: {text}"
    raise flight.FlightServerError(text) from None


def _text_of(error: BaseException) -> str:
    """What ``error`` says, or else what it is. Not every ``str`` is text that can be sent.

    Nor text of any length: a value in an error may have megabytes.
    """
    data = str(error).encode(errors="backslashreplace")
    most = _MOST_TEXT if data.isascii() else _MOST_TEXT // 2  # others are sent as %XX
    if len(data) <= most:
        return data.decode() or type(error).__name__
    return f"{data[:most].decode(errors='ignore')} … ({len(data):,} bytes)"
