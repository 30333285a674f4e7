"""Stage output: written by a task, served by its worker, fetched, released.

A partition is a short list of Arrow IPC files in the exchange directory of the process
that holds it. Files outlive the task that wrote them and end with the query, so a
consumer may read them twice; a query ends when it is released or when nobody has asked
for it during its lease. Nothing here runs plans or knows where a plan came from.

All files are in the one directory, told apart by their names: to make a directory, and
files in a new one, takes longer than many a task.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ._directory import LockedDirectory
from ._partition import PartitionWriter, StoredPartition, read
from ._wire import UnknownOutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pyarrow as pa

    from ._wire import OutputKey, PartitionTicket

__all__ = [
    "Exchange",
    "ExchangeFullError",
    "PartitionWriter",
    "QueryReleasedError",
    "StoredPartition",
    "read",
]

_REMEMBERED_RELEASES: Final = 4_096


class QueryReleasedError(Exception):
    """The query is over: its coordinator released it, or its worker is shutting down."""


class ExchangeFullError(Exception):
    """The output of all queries together has come to ``exchange_quota``."""


@dataclass(slots=True)
class _Query:
    """What is kept for one query. ``lease`` is in seconds, ``until`` a monotonic time."""

    lease: float
    until: float
    outputs: dict[OutputKey, tuple[StoredPartition, ...]] = field(default_factory=dict)
    charged: Counter[OutputKey] = field(default_factory=Counter)
    running: set[OutputKey] = field(default_factory=set)


class Exchange:
    """The stage outputs of one process, in a directory of its own. Thread-safe.

    ``quota`` limits all of them together, in bytes; ``None``: only the disk does. A
    query that nobody released is over ``abandoned_after`` seconds after its last use,
    or after the lease that ``touch()`` gave it; ``sweep()`` is what then ends it.
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        *,
        abandoned_after: float = 3_600.0,
        quota: int | None = None,
    ) -> None:
        if quota is not None and quota < 1:
            raise ValueError(f"exchange_quota is {quota} bytes; it must be above 0, or None")
        self._owner = os.getpid()
        self._directory = LockedDirectory("exchange", base)
        self._abandoned_after = abandoned_after
        self._quota = quota
        self._bytes = 0
        self._lock = threading.Lock()
        self._queries: dict[str, _Query] = {}
        self._released: OrderedDict[str, None] = OrderedDict()
        self._closed = False
        self._quiet = threading.Condition(self._lock)

    @property
    def path(self) -> Path:
        return self._directory.path

    @property
    def bytes(self) -> int:
        """What the tasks of all queries have been charged for, in bytes."""
        return self._bytes

    @contextlib.contextmanager
    def task(self, key: OutputKey) -> Iterator[Path]:
        """How the names of the files of ``key`` begin, all of them gone again if the body raises.

        Raises ``QueryReleasedError`` when the query is already over: a request that was
        overtaken by the release must not leave anything behind.
        """
        with self._lock:
            query = self._query_locked(key.query)
            if key in query.outputs or key in query.running:
                raise FileExistsError(f"{key} has been written already, or is being written")
            query.running.add(key)
        stem = self.path / f"{key.query}-{key.stage}-{key.task}-{key.attempt}"
        try:
            yield stem
        except BaseException:
            self._remove(stem.name)
            with self._lock:
                # What it left to itself may write on, and is charged no more.
                query.running.discard(key)
                self._bytes -= query.charged.pop(key, 0)
            raise
        finally:
            with self._lock:
                query.running.discard(key)
                query.until = time.monotonic() + query.lease
                over = self._queries.get(key.query) is not query
                self._quiet.notify_all()
            if over:
                self._remove(key.query)

    def publish(self, key: OutputKey, partitions: Sequence[StoredPartition]) -> None:
        """Make a finished task's output available to ``partition()``."""
        with self._lock:
            self._refuse_released_locked(key.query)
            self._queries[key.query].outputs[key] = tuple(partitions)

    def partition(self, ticket: PartitionTicket) -> StoredPartition:
        """What ``ticket`` names; ``UnknownOutputError`` when this process does not hold it."""
        with self._lock:
            query = self._queries.get(ticket.output.query)
            partitions = () if query is None else query.outputs.get(ticket.output, ())
            if query is None or ticket.partition >= len(partitions):
                raise UnknownOutputError(ticket)
            query.until = time.monotonic() + query.lease
            return partitions[ticket.partition]

    def outputs(self) -> dict[OutputKey, tuple[StoredPartition, ...]]:
        """Everything that ``partition()`` would find now."""
        with self._lock:
            return {
                key: partitions
                for query in self._queries.values()
                for key, partitions in query.outputs.items()
            }

    def writer(
        self,
        key: OutputKey,
        stem: Path,
        partition: int,
        schema: pa.Schema,
        compression: str = "none",
    ) -> PartitionWriter:
        """A writer of files of the task ``key``, which runs and is charged for their bytes."""
        charge = functools.partial(self.charge, key)
        return PartitionWriter(stem, partition, schema, compression=compression, charge=charge)

    def charge(self, key: OutputKey, count: int) -> None:
        """Count ``count`` more bytes on disk, or fewer, for the task ``key`` while it runs.

        They are given back when the task fails and when its query ends. Raises
        ``ExchangeFullError`` when all tasks together would hold more than the quota, and
        ``QueryReleasedError`` when the task has ended.
        """
        with self._lock:
            query = self._queries.get(key.query)
            if query is None:
                raise QueryReleasedError(f"query {key.query} is over")
            if key not in query.running:
                raise QueryReleasedError(f"a task of query {key.query} is over")
            if count > 0 and self._quota is not None and self._bytes + count > self._quota:
                raise ExchangeFullError(
                    f"the exchange is full: {self._bytes:,} bytes of exchange_quota="
                    f"{self._quota:,} are in use and {count:,} more are needed; raise the quota "
                    "of the worker, add workers, or run fewer queries at once"
                )
            query.charged[key] += count
            self._bytes += count

    def touch(self, query: str, lease: float | None = None, *, ahead: float = 0.0) -> None:
        """Keep ``query`` for its lease, and ``ahead`` seconds more, from now.

        With ``lease``, in seconds, the query is kept from now on though nothing has been
        written for it, and that is its lease. Raises ``UnknownOutputError`` for a query
        that is not kept, ``QueryReleasedError`` for one that is over.
        """
        with self._lock:
            if lease is None:
                if query not in self._queries:
                    raise UnknownOutputError(query)
                entry = self._queries[query]
            else:
                entry = self._query_locked(query)
                entry.lease = lease
            entry.until = time.monotonic() + entry.lease + ahead

    def check_running(self, query: str) -> None:
        """Raise ``QueryReleasedError`` once the query is over."""
        with self._lock:
            self._refuse_released_locked(query)

    def discard(self, keys: Iterable[OutputKey]) -> None:
        """Remove these outputs of queries that go on, to be written or read no more.

        One that is still being written stays.
        """
        for key in keys:
            with self._lock:
                query = self._queries.get(key.query)
                partitions = () if query is None else query.outputs.get(key, ())
                if query is not None and partitions:
                    query.outputs[key] = ()
                    self._bytes -= query.charged.pop(key, 0)
            for partition in partitions:
                for path in partition.files:
                    path.unlink(missing_ok=True)

    def release(self, query: str) -> None:
        """End a query: remove its outputs, and stop its tasks at their next batch.

        Idempotent, and remembered, so that a task which arrives late is refused.
        """
        if os.getpid() != self._owner:
            return  # a forked child that drops what it inherited; it is the parent's
        with self._lock:
            entry = self._forget_locked(query)
        if entry is not None:
            self._remove(query)

    def sweep(self) -> list[str]:
        """Release the queries whose lease has run out, running ones too; returns them."""
        with self._lock:
            now = time.monotonic()
            over = [name for name, query in self._queries.items() if query.until < now]
            for name in over:
                self._forget_locked(name)
        for name in over:
            self._remove(name)
        return over

    def queries(self) -> int:
        """How many queries are kept here."""
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
            self._quiet.wait_for(lambda: not any(q.running for q in running), timeout)
        self._directory.close()

    def _query_locked(self, name: str) -> _Query:
        self._refuse_released_locked(name)
        query = self._queries.get(name)
        if query is None:
            lease = self._abandoned_after
            query = self._queries[name] = _Query(lease, time.monotonic() + lease)
        return query

    def _remove(self, stem: str) -> None:
        """Remove the files whose names begin so, and go on."""
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(f"{stem}-"):
                    with contextlib.suppress(OSError):
                        Path(entry.path).unlink()

    def _forget_locked(self, name: str) -> _Query | None:
        self._released[name] = None
        while len(self._released) > _REMEMBERED_RELEASES:
            self._released.popitem(last=False)
        query = self._queries.pop(name, None)
        if query is not None:
            # Cleared, so that a task which fails because of this gives nothing back twice.
            self._bytes -= query.charged.total()
            query.charged.clear()
        return query

    def _refuse_released_locked(self, query: str) -> None:
        if self._closed or query in self._released:
            raise QueryReleasedError(f"query {query} is over")
