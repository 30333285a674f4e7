"""``python -m resolver sql``: SQL statements over named files, on workers.

Makes the session, runs the statements in order, and writes what they give. How a query
is distributed, what a table is made of and how a result is written are other modules'.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
import weakref
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

from datafusion.expr import EmptyRelation

from resolver import DefaultChannelResolver, FlightConnector
from resolver._errors import ResolverError

from ._cluster import LocalCluster
from ._named_tables import NamedTable
from ._output import FORMATS, format_of, table_text, write
from ._planner import DistributedPhysicalOptimizerRule
from ._progress import ProgressLine
from ._reported import stream
from ._session import SessionContext
from ._stage import SingleNodePlan
from ._state import SessionStateBuilder
from ._statements import split
from ._worker_resolver import StaticWorkerResolver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa

    from ._dataframe import DataFrame

__all__ = ["QueryError", "Request", "run"]

_TEXT: Final = ("", ".txt")
_ONE_FILE: Final = ("parquet", "arrow")
# Without a handler Python prints warnings to stderr. A worker that was lost is told by
# the sentence of the error, or did not matter; a handler that somebody set still gets it.
_UNSHOWN: Final = logging.NullHandler()
_NO_TABLE: Final = re.compile(r"table '(?:datafusion\.public\.)?([^']+)' not found")


class QueryError(RuntimeError):
    """A statement failed; says which if there were several, and what to do if known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the command line asked for.

    ``workers``: how many to start, or the URLs of running ones, which ``connector``
    reaches. ``output``: one of ``_output.FORMATS``, or ``None`` for a printed table of
    at most ``max_rows`` rows. ``output_file``: ``None`` for stdout. ``mode``: "run",
    "explain" (print how it would run) or "analyze" (run it, print how it ran).
    ``progress``: whether stderr tells which stages and tasks have finished.
    """

    query: str
    tables: Sequence[str] = ()
    workers: int | Sequence[str] | None = None
    connector: FlightConnector | None = None
    mode: str = "run"
    output: str | None = None
    output_file: Path | None = None
    max_rows: int = 100
    progress: bool = False


def run(request: Request) -> None:
    """Run the statements of ``request``.

    Raises ``ValueError`` for a request that cannot be meant, ``QueryError`` for a
    statement that failed, ``ResolverError`` for workers that did not start.
    """
    logging.getLogger("resolver").addHandler(_UNSHOWN)  # once, however often
    statements = split(request.query)
    if not statements:
        raise ValueError('there is no SQL to run; give it in quotes, such as "SELECT 1"')
    kind = request.output
    if request.output_file is not None:
        if not request.output_file.parent.is_dir():
            raise ValueError(f"there is no folder for --output-file {request.output_file}")
        kind = kind or _kind_of(request.output_file)
    if kind in _ONE_FILE and request.output_file is None and sys.stdout.isatty():
        raise ValueError(f"{kind} is not for a terminal; give --output-file, or redirect stdout")
    tables = [NamedTable.parse(text) for text in request.tables]
    with contextlib.ExitStack() as stack:
        session = _session(request, stack)
        for table in tables:
            with _failure_of(f"table {table.name}: "):
                table.register(session)
        runner = _Runner(session, request, kind, len(statements))
        for number, statement in enumerate(statements, 1):
            with _failure_of(f"statement {number}: " if len(statements) > 1 else ""):
                runner.run(statement)


def _kind_of(file: Path) -> str | None:
    """The format that the name of a file asks for; ``None``: a printed table."""
    kind = format_of(file.suffix)
    if kind is None and file.suffix not in _TEXT:
        known = ", ".join(FORMATS)
        raise ValueError(f"--output-file {file} ends in no known format; say --output {known}")
    return kind


def _session(request: Request, stack: contextlib.ExitStack) -> SessionContext:
    workers = request.workers
    if workers is None:
        workers = _cores()
    resolver = stack.enter_context(DefaultChannelResolver(request.connector))
    if isinstance(workers, int):
        cluster = stack.enter_context(LocalCluster(workers=workers))
        return cluster.session(resolver)
    return SessionContext(
        SessionStateBuilder()
        .with_distributed_worker_resolver(StaticWorkerResolver(workers))
        .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
        .with_distributed_channel_resolver(resolver)
        .build()
    )


def _why_alone(frame: DataFrame) -> str:
    plan = frame.distributed_plan()
    reason = f": {plan.reason}" if isinstance(plan, SingleNodePlan) else ""
    return f"not distributed{reason}"


def _cores() -> int:
    """Those this process may use, where the system tells."""
    usable = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if usable is None else len(usable(0))


class _Runner:
    """Runs statements one after another and writes their results."""

    def __init__(
        self, session: SessionContext, request: Request, kind: str | None, statements: int
    ) -> None:
        self._session = session
        self._request = request
        self._kind = kind
        self._several = statements > 1
        self._written = 0

    def run(self, statement: str) -> None:
        started = time.perf_counter()
        frame = self._session.sql(statement)
        if not frame.schema().names:
            if isinstance(frame.logical_plan().to_variant(), EmptyRelation):
                return  # such as CREATE VIEW or SET, and already done
            raise ValueError(
                "the result has no columns; a table has none when its file is empty, and a .csv "
                "file begins with a heading"
            )
        if self._request.mode != "run":
            frame.explain(analyze=self._request.mode == "analyze")
            return
        one_file = self._request.output_file is not None or self._kind in _ONE_FILE
        if one_file and self._written:
            raise ValueError(
                "this is the second statement with a result, and one file holds one result; "
                "run it on its own"
            )
        self._written += 1
        if self._kind is None:
            self._write_table(frame, started)
        else:
            seekable = self._request.output_file is not None
            with self._sink() as sink:
                batches, _ = self._start(frame)
                write(self._kind, sink, frame.schema(), batches, seekable=seekable)

    def _write_table(self, frame: DataFrame, started: float) -> None:
        most = self._request.max_rows
        batches, is_distributed = self._start(frame)
        text, rows = table_text(frame.schema(), batches, most)
        seconds = f"{time.perf_counter() - started:.3f} s"
        count = "1 row" if rows == 1 else f"{rows:,} rows"
        clipped = f", the first {most:,} shown" if rows > most else ""
        where = "" if is_distributed else f"; {_why_alone(frame)}"
        with self._sink() as sink:
            sink.write(f"{text}\n{count}{clipped} in {seconds}{where}\n".encode())

    def _start(self, frame: DataFrame) -> tuple[Iterator[pa.RecordBatch], bool]:
        """The rows of ``frame`` as they come, and whether they come from workers."""
        if self._request.progress:
            with contextlib.closing(ProgressLine(sys.stderr)) as line:
                rows, is_distributed = stream(frame, line)
        else:
            rows, is_distributed = stream(frame)
        return (batch.to_pyarrow() for batch in rows), is_distributed

    @contextlib.contextmanager
    def _sink(self) -> Iterator[IO[bytes]]:
        """Where a result goes. A file gets its name only once it is whole."""
        path = self._request.output_file
        if path is None:
            sys.stdout.flush()
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        elif path.exists() and not path.is_file():  # a pipe or a device, which stays one
            with path.open("wb") as sink:
                yield sink
        else:
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            # A finalizer, for it also runs where a signal ends the process from elsewhere.
            clean_up = weakref.finalize(self, partial.unlink, missing_ok=True)
            try:
                with partial.open("wb") as sink:
                    yield sink
                partial.replace(path)
            finally:
                clean_up()


@contextlib.contextmanager
def _failure_of(what: str) -> Iterator[None]:
    """Raise what fails as a ``QueryError`` that says ``what`` failed."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has had enough
        raise
    except (ResolverError, OSError) as error:
        raise QueryError(f"{what}{error}") from error
    except Exception as error:  # DataFusion raises nothing more special
        raise QueryError(f"{what}{_with_remedy(str(error))}") from error


def _with_remedy(message: str) -> str:
    missing = _NO_TABLE.search(message)
    if missing is None:
        return message
    return f"there is no table {missing[1]}; give it with --table {missing[1]}=PATH"
