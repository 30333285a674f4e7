"""Random queries give single-node DataFusion's answers, under every way to distribute them.

The workers listen on loopback in this process; every batch still crosses Flight. A failing
query is made small by hypothesis, and reported with its tables and both plans.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import datafusion
import pytest
from hypothesis import given, reject, seed, settings

from resolver import DefaultChannelResolver
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    DistributedPlan,
    SessionContext,
    SessionStateBuilder,
    StaticWorkerResolver,
    Worker,
)
from tests.support.answers import difference
from tests.support.random_sql import Query, queries
from tests.support.random_tables import SETS, TableSet

HUGE = 1 << 40


@dataclass(frozen=True)
class Way:
    """How a session distributes: DataFusion's options and the engine's own."""

    settings: dict[str, str] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


SMALL_BATCHES = {"datafusion.execution.batch_size": "7"}
EVERYWHERE = {"bytes_per_task": 0, "coordinator_threshold": 0}
WAYS = {
    "as it comes": Way(),
    "shuffles": Way(SMALL_BATCHES, {**EVERYWHERE, "broadcast_threshold": 0}),
    "broadcasts": Way(SMALL_BATCHES, {**EVERYWHERE, "broadcast_threshold": HUGE}),
    "sort-merge joins": Way(
        {
            "datafusion.optimizer.prefer_hash_join": "false",
            "datafusion.optimizer.repartition_file_min_size": "1",
        },
        {**EVERYWHERE, "compression": "lz4"},
    ),
}
QUERIES_EACH = 520
"""Different queries to compare in each way; 2,080 in all."""


@dataclass
class Engines:
    """The sessions on the tables of each set: single-node and, in each way, distributed."""

    sets: list[TableSet]
    single: list[datafusion.SessionContext]
    distributed: Callable[[str, int], SessionContext]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("random")
    sets = [TableSet(number, folder / str(number)) for number in range(len(SETS))]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker().into_flight_server(exchange_dir=tmp_path_factory.mktemp("exchange"))
            )
            for _ in range(3)
        ]
        resolver = stack.enter_context(DefaultChannelResolver())
        sessions: dict[tuple[str, int], SessionContext] = {}

        def distributed(way: str, number: int) -> SessionContext:
            if (way, number) not in sessions:
                builder = (
                    SessionStateBuilder()
                    .with_options(WAYS[way].settings)
                    .with_distributed_worker_resolver(
                        StaticWorkerResolver([worker.url for worker in workers])
                    )
                    .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
                    .with_distributed_channel_resolver(resolver)
                    .with_exchange_dir(folder)
                )
                session = SessionContext(builder.build())
                sets[number].register(session)
                sessions[way, number] = session
            return sessions[way, number]

        single = []
        for tables in sets:
            session = datafusion.SessionContext(
                datafusion.SessionConfig().with_target_partitions(2)
            )
            tables.register(session)
            single.append(session)
        yield Engines(sets, single, distributed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
def test_a_random_query_gives_datafusions_answer(engines, way):
    compared: set[tuple[int, str]] = set()
    failing = spread = 0

    @seed(list(WAYS).index(way))
    @settings(max_examples=2 * QUERIES_EACH)
    @given(queries())
    def check(query: Query) -> None:
        nonlocal failing, spread
        if (query.tables, query.text) in compared or len(compared) == QUERIES_EACH:
            return
        session = engines.distributed(way, query.tables)
        try:
            expected = engines.single[query.tables].sql(query.text).to_arrow_table()
        except Exception:
            failing += 1
            with pytest.raises(Exception):  # noqa: B017  # whatever it is
                session.sql(query.text).to_arrow_table()
            reject()
        frame = session.sql(query.text)
        try:
            found = difference(frame.to_arrow_table(), expected, ordered=query.ordered)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        assert not found, report(engines, query, frame, found)
        compared.add((query.tables, query.text))
        spread += isinstance(frame.distributed_plan(), DistributedPlan)

    check()
    assert len(compared) == QUERIES_EACH
    assert failing < len(compared) / 10
    assert spread > 0


def report(engines: Engines, query: Query, frame: datafusion.DataFrame, found: str) -> str:
    """All that is needed to look at one failing query."""
    plan = engines.single[query.tables].sql(query.text).execution_plan().display_indent()
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
