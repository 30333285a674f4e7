"""Random queries give single-node DataFusion's answers, under every way to distribute them.

The workers listen on loopback in this process; every batch still crosses Flight. A failing
query is made small by hypothesis, and reported with its tables and both plans.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import datafusion
import pyarrow as pa
import pytest
from hypothesis import given, reject, seed, settings

from resolver.distributed import (
    DataFrame,
    DistributedPlan,
    SessionContext,
    WorkerLostError,
    _task,
)
from resolver.distributed._scheduler import StageRun
from resolver.distributed._stream import ResultStream
from tests.support.answers import difference
from tests.support.local_workers import BROADCASTS, DEFAULTS, SHUFFLES, LocalWorkers, Way
from tests.support.random_sql import Query, queries
from tests.support.random_tables import SETS, TableSet

WAYS = {
    "as it comes": DEFAULTS,
    "shuffles": SHUFFLES.but(execution__batch_size=7),
    "broadcasts": BROADCASTS.but(execution__batch_size=7),
    "sort-merge joins": SHUFFLES.but(
        optimizer__prefer_hash_join=False, optimizer__repartition_file_min_size=1
    ),
}
IN_PIECES = "read in pieces"
WAYS[IN_PIECES] = Way(options={**SHUFFLES.options, "stream_bytes": 2_000})
QUERIES = {**dict.fromkeys(WAYS, 520), IN_PIECES: 200}
"""How many different queries to compare in each way; 2,280 in all."""


_latest = [False]


def _noted(planned):
    _latest[0] = isinstance(planned, DistributedPlan)
    return planned


@dataclass
class Engines:
    """The sessions on the tables of each set: single-node and, in each way, distributed."""

    sets: list[TableSet]
    single: Callable[[str, int], datafusion.SessionContext]
    distributed: Callable[[str, int], SessionContext]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("random")
    sets = [TableSet(number, folder / str(number)) for number in range(len(SETS))]

    @functools.cache
    def single(way: str, number: int) -> datafusion.SessionContext:
        # With the same settings: DataFusion's joins of one kind fail where others do not.
        config = datafusion.SessionConfig().with_target_partitions(2)
        for name, value in WAYS[way].settings.items():
            config = config.set(name, value)
        session = datafusion.SessionContext(config)
        sets[number].register(session)
        return session

    with LocalWorkers(3, folder) as workers:

        @functools.cache
        def distributed(way: str, number: int) -> SessionContext:
            session = workers.session(WAYS[way])
            sets[number].register(session)
            plan = session._distribute
            # Counted as they run: planning every query once more takes as long as running it.
            session._distribute = lambda *args, **kwargs: _noted(plan(*args, **kwargs))
            return session

        yield Engines(sets, single, distributed)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("way", WAYS)
def test_a_random_query_gives_datafusions_answer(engines, way, monkeypatch):
    compared: set[tuple[int, str]] = set()
    wanted = QUERIES[way]
    failing = spread = in_pieces = again = 0
    if way == IN_PIECES:
        monkeypatch.setattr(_task, "INLINE_BYTES", -1)  # else nothing is lost with a worker

    @seed(list(WAYS).index(way))
    @settings(max_examples=2 * wanted)
    @given(queries())
    def check(query: Query) -> None:
        nonlocal failing, spread, in_pieces, again
        if (query.tables, query.text) in compared or len(compared) == wanted:
            return
        session = engines.distributed(way, query.tables)
        try:
            expected = engines.single(way, query.tables).sql(query.text).to_arrow_table()
        except Exception:
            failing += 1
            with pytest.raises(Exception):  # noqa: B017  # whatever it is
                session.sql(query.text).to_arrow_table()
            reject()
        frame = session.sql(query.text)
        try:
            table, pieces, remade = (
                read_with_losses(frame) if way == IN_PIECES else (frame.to_arrow_table(), 0, 0)
            )
            found = difference(table, expected, ordered=query.ordered)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        assert not found, report(engines, way, query, frame, found)
        compared.add((query.tables, query.text))
        spread += _latest[0]
        in_pieces += bool(pieces)
        again += bool(remade)

    check()
    assert len(compared) == wanted
    assert failing < len(compared) / 10
    assert spread > len(compared) / 2
    assert way != IN_PIECES or in_pieces > len(compared) / 10
    assert way != IN_PIECES or again > len(compared) / 20


def read_with_losses(frame: DataFrame) -> tuple[pa.Table, int, int]:
    """The rows of ``frame``, of which the first piece is read before all its workers but one
    count as lost; how many pieces came after it; and how many tasks below them ran again.
    """
    stream = frame.execute_stream()
    batches = [batch.to_pyarrow() for batch in itertools.islice(stream, 1)]
    pieces = 0
    heads: list[StageRun] = []
    if isinstance(stream, ResultStream) and stream._at.ahead is not None:
        stream._at.ahead.exception(20)
        heads = list(stream._query._heads)
        pieces = 1 + len(heads)
        for url in stream._query._plan.urls[1:] if heads else ():
            stream._query._scheduler.lose(WorkerLostError("as if killed", url=url))
    batches += [batch.to_pyarrow() for batch in stream]
    below = {id(run): run for head in heads for last in below_of(head) for run in below_of(last)}
    again = sum(task.attempts > 1 for run in below.values() for task in run.tasks)
    return pa.Table.from_batches(batches, None if batches else frame.schema()), pieces, again


def below_of(run: StageRun) -> Iterator[StageRun]:
    for below in run.inputs.values():
        yield below
        yield from below_of(below)


def report(
    engines: Engines, way: str, query: Query, frame: datafusion.DataFrame, found: str
) -> str:
    """All that is needed to look at one failing query."""
    plan = engines.single(way, query.tables).sql(query.text).execution_plan().display_indent()
    return "\n".join(
        [
            found,
            query.text,
            engines.sets[query.tables].describe(),
            "single-node:",
            plan,
            "distributed:",
            frame.distributed_plan().display(None),
        ]
    )
