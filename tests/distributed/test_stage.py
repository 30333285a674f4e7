"""The tree that explain() prints."""

from __future__ import annotations

from resolver.distributed import DistributedPhysicalOptimizerRule
from resolver.distributed._stage import plan_lines
from resolver.distributed._workers import WorkerSlots

RULE = DistributedPhysicalOptimizerRule()


def test_the_tree_of_a_distributed_plan(planning):
    query = "SELECT l_shipmode AS m, count(*) AS n FROM lineitem GROUP BY 1"
    plan = RULE.distribute(
        planning.sql(query).execution_plan(),
        planning,
        [WorkerSlots("http://127.0.0.1:1", 1), WorkerSlots("http://127.0.0.1:2", 1)],
    )
    assert (
        str(plan)
        == """\
┌───── Head stage ── coordinator ── 3 partitions
│ [Stage 2] ⇐ NetworkCoalesce: 3 partitions
└─────────────────────────────────────────────────
  ┌───── Stage 2 ── up to 2 tasks ── 3 partitions
  │ ProjectionExec: expr=[l_shipmode@0 as m, count(Int64(1))@1 as n]
  │   AggregateExec: mode=FinalPartitioned, gby=[l_shipmode@0 as l_shipmode], aggr=[count(Int64(1))]
  │     [Stage 1] ⇐ NetworkShuffle: 3 partitions
  └────────────────────────────────────────────────
    ┌───── Stage 1 ── up to 2 tasks ── 3 partitions
    │ RepartitionExec: partitioning=Hash([l_shipmode@0], 3), input_partitions=3
    │   AggregateExec: mode=Partial, gby=[l_shipmode@0 as l_shipmode], aggr=[count(Int64(1))]
    │     DataSourceExec: 4 files in 3 groups, projection=[l_shipmode], file_type=parquet
    └────────────────────────────────────────────────"""
    )


def test_the_tree_of_a_single_node_plan_leads_with_the_reason(planning):
    plan = RULE.distribute(
        planning.sql("SELECT 1 AS one").execution_plan(), planning, [WorkerSlots("http://a:1", 1)]
    )
    assert (
        str(plan)
        == """\
┌───── Single node ── coordinator ── 1 partition
│ not distributed: the plan is a single partition, so there is nothing to spread
│
│ ProjectionExec: expr=[1 as one]
│   PlaceholderRowExec
└─────────────────────────────────────────────────"""
    )


def test_long_lines_are_clipped_and_the_reason_is_not(planning):
    session = planning
    long = "SELECT " + ", ".join(f"l_tax + {n} AS column_{n}" for n in range(40)) + " FROM lineitem"
    plan = RULE.distribute(
        session.sql(long).execution_plan(), session, [WorkerSlots("http://a:1", 1)]
    )
    assert max(map(len, plan.display(60).splitlines())) == 60
    assert "column_39" in plan.display(None)
    assert "column_39" not in plan.display()
    single = RULE.distribute(session.sql(long).execution_plan(), session, [])
    assert "the worker resolver names no workers" in single.display(20)


def test_a_gathered_plan_has_an_empty_head(planning):
    plan = RULE.distribute(
        planning.sql("SELECT l_tax FROM lineitem").execution_plan(),
        planning,
        [WorkerSlots("http://a:1", 1)],
    )
    assert plan.display().splitlines()[1] == ("│ [Stage 1] ⇐ NetworkCoalesce: 3 partitions")


def test_a_list_of_files_becomes_a_count():
    line = (
        "  DataSourceExec: file_groups={2 groups: [[a/x.parquet:0..5, a/y.parquet:0..9], "
        "[a/y.parquet:9..12]]}, projection=[a], file_type=parquet\n"
    )
    assert plan_lines(line) == (
        "  DataSourceExec: 2 files in 2 groups, projection=[a], file_type=parquet",
    )
