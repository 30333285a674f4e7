"""All 22 TPC-H queries: spread over workers, right on any number of them and while one dies.

The answers are DuckDB's, for data that DuckDB made.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import tpch_reference as reference
from resolver import DefaultChannelResolver
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    LocalCluster,
    SessionContext,
    SessionStateBuilder,
    SingleNodePlan,
)

pytestmark = pytest.mark.slow

SCALE_FACTOR = 0.01
QUERIES = list(range(1, 23))
SEED = int(os.environ.get("TPCH_KILL_SEED", "2026"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tpch") / "reference"
    reference.generate(SCALE_FACTOR, folder, parts=5)
    return folder


def with_tables(session: SessionContext, folder: Path) -> SessionContext:
    for table in reference.TABLES:
        session.register_parquet(table, str(folder / table))
    return session


@pytest.fixture(scope="module", params=[1, 2, 3, 5])
def session(request: pytest.FixtureRequest, folder: Path) -> Iterator[SessionContext]:
    builder = SessionStateBuilder()
    if request.param != 2:  # with two, as it comes; else small files too are spread
        builder.with_distributed_option("scan_bytes_per_task", 0)
        builder.with_distributed_option("bytes_per_task", 0)
    with DefaultChannelResolver() as resolver, LocalCluster(workers=request.param) as cluster:
        yield with_tables(cluster.session(resolver, builder=builder), folder)


@pytest.mark.parametrize("number", QUERIES)
def test_every_query_is_distributed_and_gives_the_reference_answer(session, number):
    frame = session.sql(reference.queries()[number])
    plan = frame.distributed_plan()
    assert not isinstance(plan, SingleNodePlan), str(plan)
    answer = reference.answers(SCALE_FACTOR)[number]
    assert reference.differences(frame.to_arrow_table(), answer) == []


class Fleet:
    """Three workers, any of which may be killed and is replaced; a WorkerResolver."""

    def __init__(self) -> None:
        self.clusters = [LocalCluster(workers=1).start() for _ in range(3)]

    def get_urls(self) -> list[str]:
        return [url for cluster in self.clusters for url in cluster.get_urls()]

    def replace(self, index: int) -> None:
        self.clusters[index].close()
        self.clusters[index] = LocalCluster(workers=1).start()

    def close(self) -> None:
        for cluster in self.clusters:
            cluster.close()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with contextlib.closing(Fleet()) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def fleet_session(fleet: Fleet, folder: Path) -> Iterator[SessionContext]:
    with DefaultChannelResolver() as resolver:
        state = (
            SessionStateBuilder()
            .with_distributed_worker_resolver(fleet)
            .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
            .with_distributed_channel_resolver(resolver)
            .with_distributed_option("scan_bytes_per_task", 0)
            .with_distributed_option("bytes_per_task", 0)
            .build()
        )
        yield with_tables(SessionContext(state), folder)


@pytest.mark.parametrize("number", QUERIES)
def test_a_worker_that_is_killed_at_any_moment_costs_no_row(fleet, fleet_session, number):
    chance = random.Random(f"{SEED}-{number}")
    frame = fleet_session.sql(reference.queries()[number])
    assert not isinstance(frame.distributed_plan(), SingleNodePlan)
    started = time.monotonic()
    frame.to_arrow_table()
    undisturbed = time.monotonic() - started
    victim = chance.randrange(3)
    delay = chance.random() * undisturbed
    print(f"seed {SEED}, query {number}: worker {victim} is killed after {delay:.4f} s")  # noqa: T201  # how to see a failure again
    (process,) = fleet.clusters[victim].processes
    killer = threading.Timer(delay, process.send_signal, [signal.SIGKILL])
    killer.start()
    try:
        table = frame.to_arrow_table()
    finally:
        killer.join()
        process.wait()
        fleet.replace(victim)
    assert process.returncode == -signal.SIGKILL
    assert reference.differences(table, reference.answers(SCALE_FACTOR)[number]) == []


REVENUES = pa.table({"name": ["a", "b", "c"], "revenue": [3.5, 2.0, 2.0]})
TEXT = "name|revenue\na|3.5\nb|2\nc|2.00\n"


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([0, 1, 2], []),
        ([0, 2, 1], []),
        ([1, 0, 2], ["the right rows in another order"]),
        ([0, 1], ["2 rows instead of 3"]),
        ([0, 1, 1], ["('b', 2.0) instead of ('c', 2.0)"]),
    ],
)
def test_a_wrong_answer_is_told_from_a_right_one(rows, found):
    got = REVENUES.take(rows)
    assert reference.differences(got, TEXT) == found
    assert reference.differences(got, REVENUES) == found


@pytest.mark.parametrize(("value", "right"), [(3.5 + 1e-10, True), (3.501, False), (None, False)])
def test_numbers_are_compared_closely(value, right):
    table = pa.table({"name": ["a", "b", "c"], "revenue": [value, 2.0, 2.0]})
    assert (reference.differences(table, TEXT) == []) is right
