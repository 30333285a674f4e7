"""A DataFrame whose results are computed by the workers of its session.

Building a query is DataFusion's own business and unchanged; only the ways of getting
results differ. Each plans the query once more, for the workers of this moment, and
falls back to DataFusion itself for a plan that is not distributed. Writing (``write_*``)
and ``cache()`` run on a single node for now.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import datafusion
import pyarrow as pa
from datafusion import functions, lit

from ._stage import DEFAULT_WIDTH, DistributedPlan, SingleNodePlan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from ._executor import HeadRun
    from ._session import SessionContext

__all__ = ["DataFrame"]


class HeadStream(datafusion.RecordBatchStream):
    """The result of a distributed query, batch by batch.

    Holds the stage output it reads until the stream has ended or is dropped.
    """

    def __init__(self, run: HeadRun, stream: datafusion.RecordBatchStream) -> None:
        super().__init__(stream.rbs)
        self._run = run

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration:
            self._run.close()
            raise

    async def __anext__(self) -> Any:
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            self._run.close()
            raise


class DataFrame(datafusion.DataFrame):
    """A ``datafusion.DataFrame`` in all but where its results are computed.

    Immutable, like its base; made by the methods of ``SessionContext``.
    """

    def __init__(self, frame: datafusion.DataFrame, session: SessionContext) -> None:
        super().__init__(frame.df)
        self._session = session

    def distributed_plan(self) -> DistributedPlan | SingleNodePlan:
        """How this query would run now. ``str()`` of it is the tree of ``explain()``."""
        return self._session._staged(self)

    def explain(  # type: ignore[override]  # the parts it has of its own are keyword-only
        self, verbose: bool = False, analyze: bool = False, **options: Any
    ) -> None:
        """Print the staged plan as a tree; ``verbose`` prints its lines whole.

        With ``analyze`` or any other option, DataFusion's own single-node ``explain``.
        """
        if analyze or options:
            super().explain(verbose, analyze, **options)
        else:
            width = None if verbose else DEFAULT_WIDTH
            print(self.distributed_plan().display(width))  # noqa: T201  # what it is for

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
        run = self._session._start(self)
        return super().execute_stream() if run is None else HeadStream(run, run.stream())

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

    def show(self, num: int = 20) -> None:
        """Print the first ``num`` rows, as DataFusion prints them."""
        first = self.limit(num)
        run = self._session._start(first)
        if run is None:
            super().show(num)
            return
        try:
            batches = [batch.to_pyarrow() for batch in run.stream()]
        finally:
            run.close()
        table = self._table(batches)
        datafusion.SessionContext().from_arrow(table).show(num)

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        run = self._session._start(self)
        if run is None:
            return super().__arrow_c_stream__(requested_schema)
        batches = (batch.to_pyarrow() for batch in HeadStream(run, run.stream()))
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
