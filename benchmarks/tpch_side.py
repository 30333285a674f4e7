"""One side of the TPC-H benchmark, in a process of its own so that its memory is its own.

``Side`` is the parent's handle; ``_serve`` is what the process does: it makes a session,
answers each query with its rows, its time and how it ran, and at the end tells the peak
memory of itself and of its workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

SIDES = ("distributed", "single node")


@dataclass(frozen=True)
class Run:
    """One query as it ran. ``stages`` is ``None`` if it was not distributed."""

    seconds: float
    result: bytes
    stages: int | None = None
    tasks: int = 0
    fetched_bytes: int = 0
    retries: int = 0

    def table(self) -> pa.Table:
        """The rows it gave."""
        return pa.ipc.open_stream(self.result).read_all()


@dataclass(frozen=True)
class Memory:
    """Peak resident sets, in bytes; ``workers`` by process."""

    own: int
    workers: list[int] = field(default_factory=list)


class Side:
    """A process that runs queries in turn. One thread at a time."""

    def __init__(self, name: str, folder: Path, partitions: int) -> None:
        # Spawned, for a fork would bring the parent's memory along.
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, folder, partitions, other))
        self._process.start()
        other.close()

    def run(self, query: str) -> Run:
        """Raises what the query raised over there."""
        return self._ask(query)

    def memory(self) -> Memory:
        """The peaks so far."""
        return self._ask(None)

    def close(self) -> None:
        """End the process and what it started."""
        self._connection.close()
        self._process.join()

    def _ask(self, question: str | None) -> Any:
        self._connection.send(question)
        answer = self._connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(name: str, folder: Path, partitions: int, connection: Connection) -> None:
    with contextlib.ExitStack() as stack:
        make = {"distributed": _distributed, "single node": _single_node}[name]
        run, pids = stack.enter_context(make(folder, partitions))
        while True:
            try:
                question = connection.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                answer = _memory(pids) if question is None else run(question)
            except Exception as error:  # noqa: BLE001 -- raised by whoever asked
                answer = RuntimeError(f"{name}: {type(error).__name__}: {error}")
            connection.send(answer)


_Session = tuple[Callable[[str], Run], list[int]]


@contextlib.contextmanager
def _distributed(folder: Path, workers: int) -> Iterator[_Session]:
    """As many local workers of one slot each."""
    from resolver import DefaultChannelResolver
    from resolver.distributed import LocalCluster
    from resolver.distributed._reported import start

    with DefaultChannelResolver() as resolver, LocalCluster(workers=workers) as cluster:
        session = cluster.session(resolver)
        _register(session, folder)

        def run(query: str) -> Run:
            began = time.perf_counter()
            frame = session.sql(query)
            stream, report = start(frame)
            batches = [batch.to_pyarrow() for batch in stream]
            seconds = time.perf_counter() - began
            how: Mapping[str, int] = {}
            if report is not None:
                how = {
                    "stages": len(report.stages),
                    "tasks": report.tasks,
                    "fetched_bytes": report.fetched_bytes,
                    "retries": len(report.retries),
                }
            return Run(seconds, _encoded(batches, frame.schema()), **how)

        yield run, [process.pid for process in cluster.processes]


@contextlib.contextmanager
def _single_node(folder: Path, partitions: int) -> Iterator[_Session]:
    """DataFusion by itself."""
    import datafusion

    config = datafusion.SessionConfig().with_target_partitions(partitions)
    session = datafusion.SessionContext(config)
    _register(session, folder)

    def run(query: str) -> Run:
        began = time.perf_counter()
        frame = session.sql(query)
        batches = [batch.to_pyarrow() for batch in frame.execute_stream()]
        return Run(time.perf_counter() - began, _encoded(batches, frame.schema()))

    yield run, []


def _register(session: Any, folder: Path) -> None:
    for table in sorted(folder.iterdir()):
        session.register_parquet(table.name, str(table))


def _encoded(batches: list[pa.RecordBatch], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema if batches else schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _memory(pids: list[int]) -> Memory:
    return Memory(_peak("self"), [_peak(pid) for pid in pids])


def _peak(pid: int | str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
