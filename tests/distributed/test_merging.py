"""A stage that one task would run is run by the task that reads it, if that is one task too."""

from __future__ import annotations

import dataclasses

import datafusion
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resolver.distributed._options import DistributedOptions
from resolver.distributed._report import RunReport
from resolver.distributed._runs import replaced
from resolver.distributed._scheduler import _may_be_merged, _Settled
from resolver.distributed._sizes import Measured, reads_little
from tests.distributed.test_scheduler import (
    BROADCAST,
    COALESCE,
    SHUFFLE,
    URLS,
    FakeCalls,
    Stages,
    chain,
    check,
    nodes,
    run_head,
    scheduled,
)
from tests.support.answers import difference
from tests.support.local_workers import LocalWorkers, Way

__all__ = ["nodes"]  # the fixture

NO_HEAD = {"coordinator_threshold": 0}


def stages_that_ran(calls):
    return {key.stage for key in calls.requests}


def test_a_chain_of_little_stages_is_one_task(nodes):
    calls = FakeCalls(RunReport())
    check(calls, run_head(scheduled(calls, URLS[:3], **NO_HEAD), calls, chain(nodes)))
    assert len(calls.requests) == 1
    decided = calls.report.decisions[3]
    assert [d for d in decided if "one task runs it" in d] == [
        "stage 1 reads little, so one task runs it and stage 2",
        "stage 2 reads little, so one task runs it and stage 3",
    ]


def test_what_is_more_than_a_task_is_worth_stays_a_stage(nodes):
    """Nine partitions of a thousand bytes are above 8,000, those of stage 2 are not."""
    calls = FakeCalls(RunReport(), size=1_000)
    options = {"scan_bytes_per_task": 0, "bytes_per_task": 9_500, **NO_HEAD}
    check(calls, run_head(scheduled(calls, URLS[:3], **options), calls, chain(nodes)))
    assert stages_that_ran(calls) == {1, 3}, "stage 1 scans more, 2 is merged into 3"
    calls = FakeCalls(RunReport(), size=1_000)
    options["bytes_per_task"] = 8_000
    check(calls, run_head(scheduled(calls, URLS[:3], **options), calls, chain(nodes)))
    assert stages_that_ran(calls) == {1, 2, 3}


def test_a_merged_task_is_one_whatever_else_would_be_worth_more(nodes):
    """Its build side must be made once, though its scan alone could be divided."""
    stages = Stages(nodes)
    build = stages.stage(BROADCAST)
    last = stages.stage(COALESCE, build)
    calls = FakeCalls(RunReport())
    scheduler = scheduled(calls, URLS[:3], scan_bytes_per_task=1 << 20, **NO_HEAD)
    check(calls, run_head(scheduler, calls, stages.head(last)))
    assert {(key.stage, key.task) for key in calls.requests} == {(2, 0)}


def test_a_build_side_of_several_partitions_becomes_one(nodes):
    stages = Stages(nodes)
    build = stages.stage(BROADCAST)
    assert build.tree.partitions > 1
    tree = replaced(stages.tree(build), {build.number: build.tree})
    assert tree.children[0].kind == "coalesce_partitions"
    assert tree.children[0].partitions == 1


def test_a_stage_that_takes_long_is_not_waited_for(nodes):
    stages = Stages(nodes)
    quick, slow = stages.stage(SHUFFLE), stages.stage(SHUFFLE)
    late = stages.stage(SHUFFLE, stages.stage(SHUFFLE))
    options = DistributedOptions(scan_bytes_per_task=1)
    assert _may_be_merged([quick], options) == {quick.number}
    assert _may_be_merged([quick, slow], options) == frozenset()
    assert _may_be_merged([quick, late], options) == {late.number}


def test_sizes_that_are_little(nodes):
    stages = Stages(nodes)
    first = stages.stage(SHUFFLE)
    second = stages.stage(SHUFFLE, first)
    eight = DistributedOptions(bytes_per_task=8)
    assert reads_little(second.tree, {first.number: Measured(1, 8)}, eight)
    assert not reads_little(second.tree, {first.number: Measured(1, 9)}, eight)
    assert not reads_little(first.tree, {}, DistributedOptions(scan_bytes_per_task=1))
    # One task per worker, whatever the size.
    nothing = {first.number: Measured(0, 0)}
    assert not reads_little(second.tree, nothing, DistributedOptions(bytes_per_task=0))


def test_one_output_that_is_read_in_two_ways_stays_a_stage(nodes):
    """A plan can hold only one scan of a stage's output: its number is all that names it."""
    stages = Stages(nodes)
    build = stages.stage(SHUFFLE)
    filtering = stages.stage(SHUFFLE, dataclasses.replace(build, boundary=BROADCAST))
    joined = stages.stage(COALESCE, build, filtering)
    scheduler = scheduled(FakeCalls(RunReport()), URLS[:2])
    runs = {build.number: scheduler._complete(build)}
    settled = {filtering.number: _Settled(filtering.tree, runs)}
    alone = stages.stage(COALESCE, filtering)
    assert scheduler._merged(alone, alone.tree, [filtering], {}, settled) is not None
    assert scheduler._merged(joined, joined.tree, [filtering], runs, settled) is None


QUERIES = [
    # Groups over groups, ordered and not.
    "SELECT n, count(*) FROM (SELECT k, count(*) AS n FROM t GROUP BY k) GROUP BY n ORDER BY n",
    "SELECT DISTINCT g FROM (SELECT k % 3 AS g, sum(v) FROM t GROUP BY k % 3, k)",
    # Joins of groups, of all that emit one side or the other.
    *(
        f"SELECT a.k, a.n, b.m FROM (SELECT k, count(*) AS n FROM t GROUP BY k) a {join} JOIN "
        "(SELECT k + 2 AS k, max(v) AS m FROM t GROUP BY k) b ON a.k = b.k"
        for join in ("INNER", "LEFT", "RIGHT", "FULL")
    ),
    "SELECT k FROM t WHERE k NOT IN (SELECT k FROM t WHERE v > 50 AND k IS NOT NULL)",
    "SELECT k, v FROM t WHERE EXISTS (SELECT 1 FROM t u WHERE u.v = t.k)",
    # A window over a group, and a limit above an order.
    "SELECT k, sum(n) OVER (ORDER BY k) FROM (SELECT k, count(*) AS n FROM t GROUP BY k)",
    """SELECT k, rank() OVER (PARTITION BY n ORDER BY k)
       FROM (SELECT k, count(*) AS n FROM t GROUP BY k)""",
    "SELECT k, v FROM t ORDER BY v, k LIMIT 7 OFFSET 3",
    "SELECT k, count(*) FROM (SELECT k FROM t UNION ALL SELECT v FROM t) GROUP BY k",
    "SELECT k FROM t WHERE v > (SELECT avg(v) FROM t) GROUP BY k",
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merging")
    (folder / "t").mkdir()
    for part in range(4):
        rows = range(part * 50, part * 50 + 50)
        keys = [None if row % 17 == 0 else row % 13 for row in rows]
        pq.write_table(
            pa.table({"k": keys, "v": [row % 101 for row in rows]}),
            folder / "t" / f"{part}.parquet",
        )
    with LocalWorkers(2, folder) as workers:
        single = datafusion.SessionContext()
        single.register_parquet("t", str(folder / "t"))
        yield workers, folder, single


@pytest.fixture
def session(engines):
    workers, folder, _ = engines
    session = workers.session(Way(options=NO_HEAD))
    session.register_parquet("t", str(folder / "t"))
    return session


@pytest.mark.parametrize("query", QUERIES)
def test_merged_stages_give_single_nodes_rows(engines, session, query):
    _, _, single = engines
    expected = single.sql(query).to_arrow_table()
    assert not difference(session.sql(query).to_arrow_table(), expected)


WAITS_IN_VAIN = """
    SELECT a.k, b.v, g.n
    FROM (SELECT * FROM t WHERE v < 9) a JOIN t b ON a.k = b.k
    JOIN (SELECT k, sum(n) AS n FROM (SELECT k, v, count(*) n FROM t GROUP BY k, v) GROUP BY k) g
    ON b.k = g.k"""


def test_a_stage_that_waited_to_be_merged_is_not_settled_again(engines, capsys):
    """The groups wait for the side that turns out to be broadcast; then their stage is divided
    anew by one that the plan did not have."""
    workers, folder, single = engines
    session = workers.session(Way(options={"scan_bytes_per_task": 1_000, **NO_HEAD}))
    session.register_parquet("t", str(folder / "t"))
    frame = session.sql(WAITS_IN_VAIN)
    assert not difference(frame.to_arrow_table(), single.sql(WAITS_IN_VAIN).to_arrow_table())
    frame.explain(analyze=True)
    assert "shuffled after its joins, not before" in capsys.readouterr().out


def test_the_tree_says_what_was_merged(session, capsys):
    session.sql(QUERIES[0]).explain(analyze=True)
    shown = capsys.readouterr().out
    assert "reads little, so one task runs it and stage" in shown
    assert "1 stage, 1 task" in shown
