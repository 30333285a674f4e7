"""Runs a staged plan: tasks on workers, their output here, the head stage over it.

Every call resolves its client through the session's ChannelResolver. The head stage
starts only once the whole output of the stage is here, so a task that has to run again
elsewhere costs time and never a row. What is read and how it is planned was decided
before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import uuid
import weakref
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import datafusion
import pyarrow as pa
from pyarrow import flight

from resolver._errors import ResolverError, WorkerConnectError

from . import _wire
from ._errors import DistributedError, TaskFailedError, WorkerLostError
from ._exchange import Exchange, PartitionWriter, StoredPartition, fetch
from ._plan_proto import FileEntry, PlanNode
from ._settings import EXECUTION, derive_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from resolver._resolver import ChannelResolver

    from ._stage import DistributedPlan, Task

__all__ = ["HeadRun", "run", "worker_info"]

_log = logging.getLogger(__name__)

ATTEMPTS: Final = 2
"""How often a task may be started: a task that kills its worker must not kill them all."""

_RELEASE_TIMEOUT: Final = 5.0  # seconds
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _TaskOutput:
    partitions: tuple[StoredPartition, ...]
    schema: pa.Schema | None


class HeadRun:
    """The head stage of one query, ready to run once.

    ``close()`` removes the stage output it reads; so does losing the last reference.
    """

    def __init__(
        self, context: datafusion.SessionContext, node: PlanNode, exchange: Exchange, query: str
    ) -> None:
        self._context = context
        self._node = node
        self.close: Final[Callable[[], object]] = weakref.finalize(self, exchange.release, query)

    def stream(self) -> datafusion.RecordBatchStream:
        """All rows as one stream, as DataFusion's own ``execute_stream()`` gives them."""
        plan = self._decode(self._node)
        if plan.partition_count > 1:
            plan = self._decode(self._node.coalesced())
        return self._context.execute(plan, 0)

    def partition_streams(self) -> list[datafusion.RecordBatchStream]:
        """One stream per partition. Read them all, at the same time."""
        plan = self._decode(self._node)
        return [self._context.execute(plan, index) for index in range(plan.partition_count)]

    def partitions(self) -> list[list[pa.RecordBatch]]:
        """The batches of every partition."""
        streams = self.partition_streams()
        with ThreadPoolExecutor(max(1, len(streams)), thread_name_prefix="head") as pool:
            return list(pool.map(lambda s: [item.to_pyarrow() for item in s], streams))

    def _decode(self, node: PlanNode) -> datafusion.ExecutionPlan:
        return datafusion.ExecutionPlan.from_bytes(self._context, node.to_bytes())


def run(
    plan: DistributedPlan,
    *,
    resolver: ChannelResolver,
    exchange: Exchange,
    context: datafusion.SessionContext,
    runtime: datafusion.RuntimeEnvBuilder | None,
    settings: Mapping[str, str],
) -> HeadRun:
    """Run the stage of ``plan`` and return its head, ready to be read.

    Blocks until the stage's output is in ``exchange``. Raises ``TaskFailedError`` with
    DataFusion's message, ``WorkerLostError`` or ``WorkerConnectError`` naming the URL;
    then, and when interrupted, the query is ended on every worker first.
    """
    query = _Query(plan, resolver, exchange, settings)
    try:
        outputs = query.run_tasks()
        head_context = derive_context(context, EXECUTION, runtime)
        leaf = _leaf(plan, outputs, head_context, query.id, exchange)
    except BaseException:
        exchange.release(query.id)
        raise
    return HeadRun(head_context, plan.splice(leaf), exchange, query.id)


class _Query:
    """One query's calls to workers."""

    def __init__(
        self,
        plan: DistributedPlan,
        resolver: ChannelResolver,
        exchange: Exchange,
        settings: Mapping[str, str],
    ) -> None:
        self.id: Final = uuid.uuid4().hex
        self._plan = plan
        self._resolver = resolver
        self._exchange = exchange
        self._settings = settings
        self._lock: Final = threading.Lock()
        self._called: set[str] = set()
        self._over = False

    def run_tasks(self) -> list[_TaskOutput]:
        """Run every task and bring its output here, all tasks at once."""
        tasks = self._plan.stage.tasks
        pool = ThreadPoolExecutor(len(tasks), thread_name_prefix="query")
        try:
            futures = [pool.submit(self._run_task, task) for task in tasks]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            # Also what stops the other tasks when one has failed: they end with an error
            # at their next batch, and nobody waits for them here.
            self._release()
            pool.shutdown(wait=False)

    def _run_task(self, task: Task) -> _TaskOutput:
        others = [url for url in self._plan.urls if url != task.url]
        failures: list[ResolverError] = []
        started = 0
        for attempt, url in enumerate([task.url, *others]):
            try:
                return self._attempt(task, attempt, url)
            except WorkerConnectError as error:  # it never got the task
                failures.append(error)
            except WorkerLostError as error:
                failures.append(error)
                started += 1
            if started == ATTEMPTS or self._over:
                break
            _log.warning("task %d of query %s: %s", task.index, self.id, failures[-1])
        if len(failures) == 1:
            raise failures[0]
        tried = "; ".join(str(failure) for failure in failures)
        raise WorkerLostError(
            f"task {task.index} could not be run on any of {len(failures)} workers: {tried}",
            url=failures[-1].url,
        ) from failures[-1]

    def _attempt(self, task: Task, attempt: int, url: str) -> _TaskOutput:
        key = _wire.OutputKey(self.id, self._plan.stage.number, task.index, attempt)
        request = _wire.TaskRequest(key, task.plan.to_bytes(), self._settings)
        with self._lock:
            if self._over:
                raise WorkerLostError(f"query {self.id} is over", url=url)
            self._called.add(url)
        report = self._execute(url, request)
        if len(report.partitions) != self._plan.stage.partitions_of(task):
            raise DistributedError(f"worker {url} ran another plan than it was given", url=url)
        schema = None if report.schema is None else _deserialized(report.schema)
        with self._exchange.task(key) as directory:
            partitions = tuple(
                self._fetched(url, _wire.PartitionTicket(key, index), expected, directory, schema)
                for index, expected in enumerate(report.partitions)
            )
            self._exchange.publish(key, partitions)
        return _TaskOutput(partitions, schema)

    def _execute(self, url: str, request: _wire.TaskRequest) -> _wire.TaskReport:
        def execute(client: flight.FlightClient) -> bytes:
            return _act(client, _wire.EXECUTE_TASK, request.to_bytes())

        return _wire.TaskReport.parse(self._call(url, execute))

    def _fetched(
        self,
        url: str,
        ticket: _wire.PartitionTicket,
        expected: _wire.PartitionReport,
        directory: Path,
        schema: pa.Schema | None,
    ) -> StoredPartition:
        if schema is None or not expected.batches:
            return StoredPartition((), expected)
        writer = PartitionWriter(directory, ticket.partition, schema)
        try:
            self._call(url, lambda client: fetch(client, ticket, expected, writer))
            return writer.finish()
        finally:
            writer.close()

    def _call(self, url: str, call: Callable[[flight.FlightClient], _T]) -> _T:
        """``call`` with the client for ``url``; its errors say which worker it was."""
        client = self._resolver.get_flight_client_for_url(url)
        try:
            return call(client)
        except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
            raise DistributedError(
                f"worker {url} did not let us in: {_message(error)}; "
                "check the token or the client certificate of the connector",
                url=url,
            ) from error
        except flight.FlightServerError as error:
            raise TaskFailedError(_message(error), url=url) from error
        except (flight.FlightError, pa.ArrowKeyError, EOFError) as error:
            # Gone, going, restarted and empty, or cut off half-way: not to be used now.
            # Unless it only did as it was told, which was to end this query.
            invalidate = getattr(self._resolver, "invalidate", None)
            if invalidate is not None and not self._over:
                invalidate(url, client)
            raise WorkerLostError(f"worker {url} was lost: {_message(error)}", url=url) from error
        except pa.ArrowException as error:
            raise DistributedError(f"worker {url} refused: {_message(error)}", url=url) from error

    def _release(self) -> None:
        """End the query on every worker that was called. A worker that is gone has."""

        def release(url: str) -> None:
            with contextlib.suppress(ResolverError, pa.ArrowException, OSError):
                client = self._resolver.get_flight_client_for_url(url)
                options = flight.FlightCallOptions(timeout=_RELEASE_TIMEOUT)
                _act(client, _wire.RELEASE_QUERY, self.id.encode(), options)

        with self._lock:
            self._over = True
            urls = sorted(self._called)
        if urls:
            with ThreadPoolExecutor(len(urls), thread_name_prefix="release") as pool:
                list(pool.map(release, urls))


def _act(
    client: flight.FlightClient,
    action: str,
    body: bytes,
    options: flight.FlightCallOptions | None = None,
) -> bytes:
    """The one result of an action."""
    results = list(client.do_action(flight.Action(action, body), options))
    if len(results) != 1:
        raise EOFError(f"{action} was answered with {len(results)} results, not one")
    data: bytes = results[0].body.to_pybytes()
    return data


def _deserialized(schema: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(schema))


def _message(error: BaseException) -> str:
    """What the worker said, without Flight's own additions."""
    return str(error).partition(". Detail: ")[0]


def _leaf(
    plan: DistributedPlan,
    outputs: Sequence[_TaskOutput],
    context: datafusion.SessionContext,
    query: str,
    exchange: Exchange,
) -> PlanNode:
    """The scan that stands for the stage's output, with one partition per input."""
    schemas = [output.schema for output in outputs if output.schema is not None]
    if not schemas:
        # Nobody told a schema, so there are no rows: the stage itself over no files has
        # the right schema, the right partitions, and nothing to read.
        return plan.stage.plan.without_rows()
    if any(not schema.equals(schemas[0]) for schema in schemas):
        raise DistributedError("the tasks of one stage disagree about its schema")
    template = _scan_template(schemas[0], context, query, exchange)
    return template.with_files(
        [
            [
                entry
                for source in sources
                for entry in _entries(outputs[source.task].partitions[source.partition])
            ]
            for sources in plan.stage.inputs
        ]
    )


def _scan_template(
    schema: pa.Schema, context: datafusion.SessionContext, query: str, exchange: Exchange
) -> PlanNode:
    """How DataFusion itself encodes a scan of an Arrow file with this schema."""
    path = exchange.path / query / "schema.arrow"
    with pa.ipc.new_file(str(path), schema):
        pass
    plan = context.read_arrow(str(path)).execution_plan()
    return PlanNode.parse(plan.to_bytes(context))


def _entries(partition: StoredPartition) -> Iterator[FileEntry]:
    for path in partition.files:
        status = path.stat()
        yield FileEntry(str(path), status.st_size, status.st_mtime_ns)


def worker_info(resolver: ChannelResolver, url: str, timeout: float = 5.0) -> dict[str, Any]:
    """What the worker at ``url`` says of itself, within ``timeout`` seconds."""
    client = resolver.get_flight_client_for_url(url)
    options = flight.FlightCallOptions(timeout=timeout)
    info: dict[str, Any] = json.loads(_act(client, _wire.WORKER_INFO, b"", options))
    return info
