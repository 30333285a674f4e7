"""A DataFrame whose results are computed by the workers of its session.

Building a query is DataFusion's own business and unchanged; only the ways of getting
results differ. Each plans the query once more, for the workers of this moment, and
falls back to DataFusion itself for a plan that is not distributed. ``cache()``,
``write_table()`` and ``describe()`` are DataFusion's own, on a single node.
"""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import datafusion
import pyarrow as pa
from datafusion import functions, lit
from datafusion.dataframe_formatter import get_formatter

from ._picture import graphviz, svg
from ._progress import ProgressLine
from ._spool import spooled
from ._stage import DEFAULT_WIDTH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from ._executor import HeadRun
    from ._report import Progress
    from ._session import SessionContext
    from ._stage import DistributedPlan, SingleNodePlan

__all__ = ["DataFrame"]

_PICTURES: Final = {"graphviz": graphviz, "svg": svg}


class DataFrame(datafusion.DataFrame):
    """A ``datafusion.DataFrame`` in all but where its results are computed.

    Immutable, like its base, and safe to share between threads; made by the methods of
    ``SessionContext``, which says what results raise. Nothing is remembered: two results
    of one frame are two queries. A stream holds the rows that it has not given out yet on
    disk, until it has ended or is dropped.
    """

    def __init__(self, frame: datafusion.DataFrame, session: SessionContext) -> None:
        super().__init__(frame.df)
        self._session = session

    def distributed_plan(self) -> DistributedPlan | SingleNodePlan:
        """How this query would run now. ``str()`` of it is the tree of ``explain()``."""
        return self._session._staged(self)

    def explain(  # type: ignore[override]  # it has more formats, and takes a file by keyword
        self,
        verbose: bool = False,
        analyze: bool = False,
        format: Any = None,  # noqa: A002  # the base's name
        *,
        file: str | os.PathLike[str] | TextIO | None = None,
        **options: Any,
    ) -> None:
        """Print the staged plan as a tree; ``verbose`` prints its lines whole.

        ``analyze`` runs the query and shows what it did. ``format`` is ``"tree"`` (the
        default), ``"svg"`` or ``"graphviz"``; ``file`` is a path, or something open for
        writing text, instead of standard output. A ``datafusion.ExplainFormat``, and any
        other option, gives DataFusion's own single-node ``explain``, as does ``analyze``
        for a query that is not distributed. Raises ``ValueError`` for what cannot be
        combined.
        """
        own = bool(options) or isinstance(format, datafusion.ExplainFormat)
        text = None if own else self._explained(verbose, analyze, format or "tree")
        if text is None and file is not None:
            raise ValueError("this is printed by DataFusion itself, which takes no file")
        if text is None:
            super().explain(verbose, analyze, format if own else None, **options)
        elif file is None:
            print(text)  # noqa: T201  # what it is for
        elif isinstance(file, str | os.PathLike):
            Path(file).write_text(f"{text}\n", encoding="utf-8")
        else:
            file.write(f"{text}\n")

    def _explained(self, verbose: bool, analyze: bool, format_: str) -> str | None:
        """The text to print; ``None``: DataFusion's own."""
        if format_ not in ("tree", *_PICTURES):
            raise ValueError(f"no explain format {format_!r}; there are tree, svg and graphviz")
        width = None if verbose else DEFAULT_WIDTH
        if not analyze:
            plan = self.distributed_plan()
            return plan.display(width) if format_ == "tree" else _PICTURES[format_](plan).rstrip()
        if format_ != "tree":
            raise ValueError(f"what a query did is shown as a tree only, not as {format_}")
        return self._session._analyzed(self, width)

    def collect(self) -> list[pa.RecordBatch]:
        run = self._session._start(self)
        if run is None:
            return super().collect()
        try:
            return [batch.to_pyarrow() for batch in run.stream()]
        finally:
            run.close()

    def collect_partitioned(self) -> list[list[pa.RecordBatch]]:
        run = self._session._start(self)
        if run is None:
            return super().collect_partitioned()
        try:
            return run.partitions()
        finally:
            run.close()

    def collect_column(self, column_name: str) -> pa.Array | pa.ChunkedArray:
        column = self.select(column_name).to_arrow_table().column(0)
        return column.chunk(0) if column.num_chunks == 1 else column

    def execute_stream(self) -> datafusion.RecordBatchStream:
        stream = self._session._stream(self)
        return super().execute_stream() if stream is None else stream

    def execute_stream_partitioned(self) -> list[datafusion.RecordBatchStream]:
        """One stream per partition. Read them all, at the same time."""
        run = self._session._start(self)
        if run is None:
            return super().execute_stream_partitioned()
        # No stream may remove what another still reads; losing all of them does.
        return [_PartitionStream(run, stream) for stream in run.partition_streams()]

    def to_arrow_table(self) -> pa.Table:
        return self._table(self.collect())

    def _table(self, batches: list[pa.RecordBatch]) -> pa.Table:
        # The plan that ran may differ from the query's own schema in nullability and in
        # views; without a batch, that schema is all there is.
        return pa.Table.from_batches(batches, schema=None if batches else self.schema())

    def to_pandas(self) -> Any:
        return self.to_arrow_table().to_pandas()

    def to_polars(self) -> Any:
        import polars as pl  # noqa: PLC0415  # only who has it asks for it

        return pl.from_arrow(self.to_arrow_table())

    def to_pydict(self) -> dict[str, list[Any]]:
        table = self.to_arrow_table()
        return {
            name: column.to_pylist()
            for name, column in zip(table.column_names, table.columns, strict=True)
        }

    def to_pylist(self) -> list[dict[str, Any]]:
        return list(self.to_arrow_table().to_pylist())

    def count(self) -> int:
        counted = self.aggregate([], [functions.count(lit(1))]).collect()
        return int(pa.Table.from_batches(counted).column(0)[0].as_py())

    def show(self, num: int = 20, *, progress: bool | Callable[[Progress], object] = False) -> None:
        """Print the first ``num`` rows, as DataFusion prints them.

        ``progress=True`` shows on standard error how stages and tasks come along; a
        callable is told instead, with an object that has the numbers ``stage``, ``done``,
        ``tasks``, ``total_done`` and ``total_tasks``, on threads of the query's, possibly
        several at once. What it raises fails the query.
        """
        line = ProgressLine() if progress is True else None
        try:
            local = self._head(num, progress if callable(progress) else line)
        finally:
            if line is not None:
                line.close()
        if local is None:
            super().show(num)
        else:
            local.show(num)

    def _head(
        self, rows: int, progress: Callable[[Progress], object] | None = None
    ) -> datafusion.DataFrame | None:
        """The first ``rows`` rows as a frame of this process; ``None``: not distributed."""
        run = self._session._start(self.limit(rows), progress)
        if run is None:
            return None
        try:
            batches = [batch.to_pyarrow() for batch in run.stream()]
        finally:
            run.close()
        return datafusion.SessionContext().from_arrow(self._table(batches))

    def __repr__(self) -> str:
        local = self._preview()
        return super().__repr__() if local is None else repr(local)

    def _repr_html_(self) -> str:
        local = self._preview()
        html: str = super()._repr_html_() if local is None else local._repr_html_()
        return html

    def _preview(self) -> datafusion.DataFrame | None:
        """What a ``repr`` can show, and a row more, by which it tells that there is more."""
        formatter = get_formatter()
        return self._head(max(formatter.max_rows, formatter.min_rows) + 1)

    def write_parquet(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._write(datafusion.DataFrame.write_parquet, path, *args, **kwargs)

    def write_parquet_with_options(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._write(datafusion.DataFrame.write_parquet_with_options, path, *args, **kwargs)

    def write_csv(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._write(datafusion.DataFrame.write_csv, path, *args, **kwargs)

    def write_json(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._write(datafusion.DataFrame.write_json, path, *args, **kwargs)

    def _write(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """``write`` the rows that workers computed: nothing before they all are here."""
        schema = self.schema()
        # Two columns of one name can be written, and cannot be read again.
        unique = len(set(schema.names)) == len(schema.names)
        run = self._session._start(self) if unique and schema.names else None
        if run is None:
            write(datafusion.DataFrame(self.df), *args, **kwargs)
            return
        try:
            with spooled(run, self._session, schema) as frame:
                write(frame, *args, **kwargs)
        finally:
            run.close()

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        # Not DataFusion's own, for a single node either: it says the schema that a union had
        # before its types were made one, whatever the batches have.
        batches = (batch.to_pyarrow() for batch in self.execute_stream())
        first = next(batches, None)
        reader = pa.RecordBatchReader.from_batches(
            self.schema() if first is None else first.schema,
            batches if first is None else itertools.chain([first], batches),
        )
        return reader.__arrow_c_stream__(requested_schema)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.execute_stream())

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.execute_stream().__aiter__()


class _PartitionStream(datafusion.RecordBatchStream):
    def __init__(self, run: HeadRun, stream: datafusion.RecordBatchStream) -> None:
        super().__init__(stream.rbs)
        self._run = run


def returns_frame(function: object) -> bool:
    """Whether DataFusion declares that a method of its API gives a DataFrame."""
    return getattr(function, "__annotations__", {}).get("return") == "DataFrame"


def _stay_distributed() -> None:
    """Wrap every method by which one DataFrame is made from another."""
    for name, function in vars(datafusion.DataFrame).items():
        if returns_frame(function):
            setattr(DataFrame, name, _wrapped(function))


def _wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def method(self: DataFrame, *args: Any, **kwargs: Any) -> Any:
        made = function(self, *args, **kwargs)
        return made if isinstance(made, DataFrame) else DataFrame(made, self._session)

    return method


_stay_distributed()
