"""Joins within groups within windows, divided into many partitions, give single-node's answers."""

from __future__ import annotations

import random
from types import SimpleNamespace

import datafusion
import pytest

from tests.support.answers import difference
from tests.support.local_workers import LocalWorkers, Way
from tests.support.nested_sql import TABLES, nested_query, partner_query, write_tables

QUERIES = 160
MOST_ROWS = 20_000
SMALL = {"bytes_per_task": 0, "scan_bytes_per_task": 0, "coordinator_threshold": 0}
WAYS = [
    # Some build sides below the threshold, some above; many and few partitions and tasks.
    Way(options={**SMALL, "broadcast_threshold": 1 << 40}, partitions_per_slot=3),
    Way(options={**SMALL, "broadcast_threshold": 500}, partitions_per_slot=2),
    Way(options={**SMALL, "broadcast_threshold": 2_000}, partitions_per_slot=3),
    Way(options={**SMALL, "broadcast_threshold": 0}, partitions_per_slot=2),
    # Small tables are read by every task, the largest is not.
    Way(options={**SMALL, "scan_bytes_per_task": 4_000}, partitions_per_slot=3),
    Way(options={"bytes_per_task": 4_000, "coordinator_threshold": 3_000}, partitions_per_slot=2),
    Way(
        options={"files_per_task": 2, "scan_bytes_per_task": 0, "broadcast_threshold": 1_000},
        partitions_per_slot=1,
    ),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joins")
    write_tables(folder)
    with LocalWorkers(3, folder) as workers:
        single = datafusion.SessionContext()
        ways = [workers.session(way) for way in WAYS]
        for session in (single, *ways):
            for name in TABLES:
                session.register_parquet(name, str(folder / name))
        yield SimpleNamespace(single=single, ways=ways)


def compared(engines, query, ways):
    """Whether ``query`` has an answer of a size that is worth comparing; fails if it differs."""
    counted = engines.single.sql(f"SELECT count(*) FROM ({query})").to_arrow_table()
    if counted.column(0)[0].as_py() > MOST_ROWS:
        return False
    expected = engines.single.sql(query).to_arrow_table()
    for way in ways:
        frame = engines.ways[way].sql(query)
        try:
            found = difference(frame.to_arrow_table(), expected)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        assert not found, f"{WAYS[way]}\n{query}\n{found}\n{frame.distributed_plan().display(None)}"
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_nested_joins_and_groups_give_datafusions_answer(engines, seed):
    rng = random.Random(seed)
    done = 0
    while done < QUERIES // 4:
        done += compared(engines, nested_query(rng), rng.sample(range(len(WAYS)), 3))


@pytest.mark.slow
def test_a_selective_side_finds_its_partners(engines):
    """Those of which the keys are shuffled instead of the rows, mostly."""
    rng = random.Random(4)
    for _ in range(80):
        assert compared(engines, partner_query(rng), [rng.choice([0, 4])])


GROUPED = "SELECT t.a, t.b, count(*) AS n FROM u JOIN t ON t.a = u.a GROUP BY t.a, t.b"
FOUND = {
    # Divided by (a, b) after a broadcast, though (a) was what the node above relied on.
    "groups over groups": f"SELECT a, count(*), sum(n) FROM ({GROUPED}) GROUP BY a",
    "a window over groups": f"SELECT a, n, sum(n) OVER (PARTITION BY a) FROM ({GROUPED})",
    "a join over groups": f"SELECT x.a, n, v.c FROM v JOIN ({GROUPED}) x ON v.a = x.a",
    "a full join over groups": f"SELECT x.a, n, v.c FROM v FULL JOIN ({GROUPED}) x ON v.a = x.a",
    # A stage made while the query runs read another that was.
    "joins over joins": """
        SELECT y.* FROM t x RIGHT SEMI JOIN (
            SELECT y.a, x.b, x.c
            FROM (SELECT y.* FROM w x RIGHT ANTI JOIN t y ON x.b = y.b AND x.a = y.a) x
            JOIN (SELECT x.a, x.b, y.c FROM w x LEFT JOIN t y ON x.a = y.a AND x.b = y.b) y
            ON x.b = y.b AND x.a = y.a
        ) y ON x.a = y.b""",
    # A side that a sort had put in order was divided anew, and the order was lost.
    "a window over joins": """
        SELECT a, b, sum(c) OVER (PARTITION BY a) FROM (
            SELECT x.a, x.b, y.c FROM v x
            JOIN (SELECT x.a, x.c + y.c AS c FROM w x JOIN w y ON x.a = y.a) y ON x.a = y.a
        )""",
    # The join's own limit also cut short the rows with a partner that it was to look at.
    "a limit over an anti join": """
        SELECT count(*) FROM (
            SELECT x.c FROM (SELECT * FROM u WHERE c = 0 AND a IS NOT NULL) x
            LEFT ANTI JOIN t y ON x.a = y.a AND x.b <> y.b AND y.c = 5 LIMIT 3
        )""",
    # Read by every task, each row had as many values as there were tasks.
    "a build side of random values": """
        SELECT count(*) <= 90 AND sum(c) > 0 FROM (
            SELECT x.r, sum(y.c) AS c FROM (SELECT a, random() AS r FROM v) x
            JOIN t y ON x.a = y.a GROUP BY x.r
        )""",
    # A scan of nothing declares no order, on which a window insists.
    "a window over a join of nothing": """
        SELECT b, sum(c) OVER (PARTITION BY a ORDER BY b, c) FROM (
            SELECT y.* FROM (SELECT * FROM u WHERE c < 0) x JOIN t y ON x.a = y.a
        )""",
    # DataFusion's InterleaveExec needs inputs that say how they are divided.
    "a union of joins": """
        SELECT x.c, y.a FROM (SELECT DISTINCT y.a, x.b FROM t x JOIN w y ON x.a = y.a) z
        FULL JOIN (
            SELECT y.* FROM w x RIGHT ANTI JOIN v y ON x.a = y.a
            UNION ALL SELECT y.* FROM e x RIGHT ANTI JOIN u y ON x.a = y.a
        ) y ON z.a = y.b JOIN t x ON x.a = y.a""",
}


@pytest.mark.parametrize("query", FOUND.values(), ids=FOUND)
def test_what_was_wrong_once_is_right(engines, query):
    assert compared(engines, query, range(len(WAYS)))
