"""Stage output: written by a task, served by its worker, fetched, released.

A partition is a short list of Arrow IPC files in the exchange directory of the process
that holds it. Files outlive the task that wrote them and end with the query, so a
consumer may read them twice. Nothing here runs plans or knows where a plan came from.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from pyarrow import flight

from ._batches import cast_batch, has_dictionary
from ._directory import LockedDirectory
from ._wire import OutputKey, PartitionReport, PartitionTicket

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["Exchange", "PartitionWriter", "QueryReleasedError", "StoredPartition", "fetch"]

_REMEMBERED_RELEASES: Final = 4_096


class QueryReleasedError(Exception):
    """The query is over: its coordinator released it, or its worker is shutting down."""


@dataclass(frozen=True, slots=True)
class StoredPartition:
    """One partition on disk. ``files`` is empty where there was no batch."""

    files: tuple[Path, ...]
    report: PartitionReport


class PartitionWriter:
    """Writes one partition as Arrow IPC files. For one thread.

    Usually one file. An IPC file can hold only one dictionary per column, so a partition
    with dictionary-encoded columns gets one file for every batch.
    """

    def __init__(self, directory: Path, partition: int, schema: pa.Schema) -> None:
        self._stem = directory / str(partition)
        self._schema = schema
        self._one_batch_per_file = has_dictionary(schema)
        self._files: list[Path] = []
        self._writer: Any = None
        self._rows = 0
        self._batches = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Append ``batch``, cast to the writer's schema."""
        if self._writer is None or self._one_batch_per_file:
            self.close()
            path = self._stem.with_name(f"{self._stem.name}-{len(self._files)}.arrow")
            self._writer = pa.ipc.new_file(str(path), self._schema)
            self._files.append(path)
        self._writer.write_batch(cast_batch(batch, self._schema))
        self._rows += batch.num_rows
        self._batches += 1

    def finish(self) -> StoredPartition:
        self.close()
        size = sum(path.stat().st_size for path in self._files)
        return StoredPartition(tuple(self._files), PartitionReport(self._rows, self._batches, size))

    def close(self) -> None:
        """Close the open file, if any. Idempotent; needed only when not finished."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


@dataclass(slots=True)
class _Query:
    """What is kept for one query. ``touched`` is a monotonic time in seconds."""

    directory: Path
    outputs: dict[OutputKey, tuple[StoredPartition, ...]]
    running: int
    touched: float


class Exchange:
    """The stage outputs of one process, in a directory of its own. Thread-safe.

    ``abandoned_after`` seconds after the last use of a query that nobody released, its
    outputs are removed: a coordinator that vanished does not fill the disk.
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        *,
        abandoned_after: float = 3_600.0,
    ) -> None:
        self._directory = LockedDirectory("exchange", base)
        self._abandoned_after = abandoned_after
        self._lock = threading.Lock()
        self._queries: dict[str, _Query] = {}
        self._released: OrderedDict[str, None] = OrderedDict()
        self._closed = False
        self._quiet = threading.Condition(self._lock)

    @property
    def path(self) -> Path:
        return self._directory.path

    @contextlib.contextmanager
    def task(self, key: OutputKey) -> Iterator[Path]:
        """A fresh directory for the output of ``key``, gone again if the body raises.

        Raises ``QueryReleasedError`` when the query is already over: a request that was
        overtaken by the release must not leave anything behind.
        """
        self.sweep()
        with self._lock:
            self._refuse_released_locked(key.query)
            directory = self.path / key.query
            query = self._queries.setdefault(
                key.query, _Query(directory, {}, running=0, touched=time.monotonic())
            )
            if key in query.outputs:
                raise FileExistsError(f"{key} has been written already")
            output = directory / f"{key.stage}-{key.task}-{key.attempt}"
            output.mkdir(parents=True)  # fails for a replayed request that is still running
            query.running += 1
        try:
            yield output
        except BaseException:
            shutil.rmtree(output, ignore_errors=True)
            raise
        finally:
            with self._lock:
                query.running -= 1
                query.touched = time.monotonic()
                over = key.query not in self._queries
                self._quiet.notify_all()
            if over:
                shutil.rmtree(directory, ignore_errors=True)

    def publish(self, key: OutputKey, partitions: Sequence[StoredPartition]) -> None:
        """Make a finished task's output available to ``partition()``."""
        with self._lock:
            self._refuse_released_locked(key.query)
            self._queries[key.query].outputs[key] = tuple(partitions)

    def partition(self, ticket: PartitionTicket) -> StoredPartition:
        """What ``ticket`` names; ``KeyError`` when this process does not hold it."""
        with self._lock:
            query = self._queries.get(ticket.output.query)
            partitions = () if query is None else query.outputs.get(ticket.output, ())
            if query is None or ticket.partition >= len(partitions):
                raise KeyError(ticket)
            query.touched = time.monotonic()
            return partitions[ticket.partition]

    def check_running(self, query: str) -> None:
        """Raise ``QueryReleasedError`` once the query is over."""
        with self._lock:
            self._refuse_released_locked(query)

    def release(self, query: str) -> None:
        """End a query: remove its outputs, and stop its tasks at their next batch.

        Idempotent, and remembered, so that a task which arrives late is refused.
        """
        with self._lock:
            self._released[query] = None
            while len(self._released) > _REMEMBERED_RELEASES:
                self._released.popitem(last=False)
            entry = self._queries.pop(query, None)
        if entry is not None:
            shutil.rmtree(entry.directory, ignore_errors=True)

    def sweep(self) -> None:
        """Release the queries that nobody has used for ``abandoned_after`` seconds."""
        oldest = time.monotonic() - self._abandoned_after
        with self._lock:
            abandoned = [
                name
                for name, query in self._queries.items()
                if query.running == 0 and query.touched <= oldest
            ]
        for name in abandoned:
            self.release(name)

    def queries(self) -> int:
        """How many queries have output here."""
        with self._lock:
            return len(self._queries)

    def close(self, timeout: float = 5.0) -> None:
        """Release everything and remove the directory. Idempotent.

        Waits up to ``timeout`` seconds for running tasks to notice.
        """
        with self._lock:
            self._closed = True
            running = list(self._queries.values())
            names = list(self._queries)
        for name in names:
            self.release(name)
        with self._quiet:
            self._quiet.wait_for(lambda: all(q.running == 0 for q in running), timeout)
        self._directory.close()

    def _refuse_released_locked(self, query: str) -> None:
        if self._closed or query in self._released:
            raise QueryReleasedError(f"query {query} is over")


def read(partition: StoredPartition) -> Iterator[pa.RecordBatch]:
    """The batches of a stored partition, memory-mapped, one at a time."""
    for path in partition.files:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)


def fetch(
    client: flight.FlightClient,
    ticket: PartitionTicket,
    expected: PartitionReport,
    writer: PartitionWriter,
) -> None:
    """Copy a partition from the worker behind ``client`` into ``writer``.

    Raises what Flight raises, and ``EOFError`` when fewer or more rows arrive than the
    task reported: a stream that merely ended early must not become a shorter answer.
    """
    rows = 0
    reader = client.do_get(flight.Ticket(ticket.to_bytes()))
    try:
        for chunk in reader:
            rows += chunk.data.num_rows
            writer.write(chunk.data)
    except BaseException:
        reader.cancel()
        raise
    if rows != expected.rows:
        raise EOFError(f"received {rows} rows of a partition of {expected.rows}")
