"""What is cut, where, and what is not and why."""

from __future__ import annotations

import datafusion
import pyarrow as pa
import pytest
from datafusion import ExecutionPlan, col, udf

from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    DistributedPlan,
    SingleNodePlan,
    _planner,
)
from resolver.distributed._plan_proto import PlanNode
from resolver.distributed._settings import PLANNING
from resolver.distributed._stage import Boundary, Source
from tests.support.distributed import configured

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3"]
RULE = DistributedPhysicalOptimizerRule()


def distribute(session, query, urls=URLS):
    frame = session.sql(query) if isinstance(query, str) else query
    return RULE.distribute(frame.execution_plan(), session, urls)


def kinds(node):
    return [below.kind for below in node.walk()]


def test_a_grouped_aggregate_is_cut_at_its_shuffle(planning):
    plan = distribute(planning, "SELECT l_shipmode, count(*) FROM lineitem GROUP BY 1")
    assert isinstance(plan, DistributedPlan)
    assert plan.stage.boundary is Boundary.SHUFFLE
    assert kinds(plan.stage.plan) == ["repartition", "aggregate", "parquet_scan"]
    assert [node.kind for node in plan.head] == ["projection", "aggregate"]
    assert plan.stage.inputs == tuple(tuple(Source(task, k) for task in range(3)) for k in range(3))


def test_an_ungrouped_aggregate_is_cut_at_its_coalesce(planning):
    plan = distribute(planning, "SELECT sum(l_tax) FROM lineitem WHERE l_quantity < 3")
    assert plan.stage.boundary is Boundary.COALESCE
    assert kinds(plan.stage.plan) == ["aggregate", "filter", "parquet_scan"]
    assert [node.kind for node in plan.head] == ["aggregate", "coalesce_partitions"]
    assert plan.stage.inputs == ((Source(0, 0),), (Source(1, 0),), (Source(2, 0),))


def test_a_top_k_is_sorted_on_the_workers_and_merged_in_the_head(planning):
    plan = distribute(planning, "SELECT l_orderkey FROM lineitem ORDER BY l_tax, 1 LIMIT 5")
    assert "sort" in kinds(plan.stage.plan)
    assert plan.head[-1].kind == "sort_preserving_merge"


def test_a_plan_that_never_comes_together_is_gathered_at_its_root(planning):
    plan = distribute(planning, "SELECT l_orderkey + 1 FROM lineitem WHERE l_quantity < 3")
    assert plan.head == ()
    assert plan.stage.boundary is Boundary.COALESCE
    assert plan.partitions == 3


def test_every_group_of_a_scan_belongs_to_exactly_one_task(planning):
    for urls in (URLS, URLS[:2], URLS[:1], [*URLS, "http://127.0.0.1:4"]):
        plan = distribute(planning, "SELECT l_orderkey FROM lineitem WHERE l_quantity < 3", urls)
        assert sorted(group for task in plan.stage.tasks for group in task.groups) == [0, 1, 2]
        assert [task.url for task in plan.stage.tasks] == urls[:3]
        for task in plan.stage.tasks:
            scan = list(task.plan.walk())[-1]
            assert scan.file_groups == len(task.groups) == plan.stage.partitions_of(task)
        # Partition k of the head reads group k of the scan, whichever task has it.
        for k, (source,) in enumerate(plan.stage.inputs):
            assert plan.stage.tasks[source.task].groups[source.partition] == k


def test_a_round_robin_repartition_is_dropped_inside_a_stage(register):
    session = configured(
        {
            **PLANNING,
            "datafusion.execution.target_partitions": "7",
            "datafusion.optimizer.repartition_file_scans": "false",
        }
    )
    register(session)
    query = (
        "SELECT l_shipmode, sum(l_tax + l_discount * 2) FROM lineitem WHERE l_tax > 0 GROUP BY 1"
    )
    frame = session.sql(query)
    assert "RoundRobinBatch" in frame.execution_plan().display_indent()
    plan = distribute(session, query)
    assert "RoundRobin" not in "\n".join(plan.stage.lines)
    assert plan.stage.plan.hash_partitions == 7


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (
            "SELECT count(*) FROM orders JOIN customer ON o_custkey = c_custkey",
            "HashJoinExec: joins",
        ),
        ("SELECT * FROM orders CROSS JOIN nation", "CrossJoinExec: joins"),
        (
            "SELECT * FROM orders JOIN nation ON o_custkey < n_nationkey",
            "joins run on a single node",
        ),
        ("SELECT row_number() OVER (ORDER BY l_tax) FROM lineitem", "window functions"),
        ("SELECT l_tax FROM lineitem UNION ALL SELECT c_acctbal FROM customer", "unions"),
        ("SELECT * FROM (VALUES (1), (2))", "in-process table"),
        ("SELECT 1", "PlaceholderRowExec: it reads no files"),
        ("SELECT * FROM nation WHERE false", "EmptyExec: it reads no files"),
        ("SELECT * FROM generate_series(1, 5)", "it reads no files"),
        ("SELECT * FROM nation", "single partition"),
        ("SELECT unnest([l_tax, l_discount]) FROM lineitem", "UnnestExec"),
        ("EXPLAIN SELECT * FROM lineitem", "ExplainExec"),
        ("EXPLAIN ANALYZE SELECT * FROM lineitem", "AnalyzeExec"),
        ("COPY (SELECT * FROM lineitem) TO '{tmp}/out.parquet'", "writes files"),
        (
            "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t WHERE n < 3) SELECT * FROM t",
            "no wire encoding",
        ),
        (
            "SELECT count(*) FROM lineitem WHERE l_tax > (SELECT avg(l_tax) FROM lineitem)",
            "single node",
        ),
    ],
)
def test_what_is_not_cut_says_why(planning, tmp_path, query, reason):
    plan = distribute(planning, query.replace("{tmp}", str(tmp_path)))
    assert isinstance(plan, SingleNodePlan)
    assert reason in plan.reason
    assert reason in plan.display()


def test_without_workers_nothing_is_cut(planning):
    plan = distribute(planning, "SELECT count(l_tax) FROM lineitem WHERE l_tax > 0", [])
    assert "names no workers" in plan.reason


def test_a_dynamic_filter_keeps_a_plan_in_one_piece(register):
    settings = {**PLANNING, "datafusion.optimizer.enable_dynamic_filter_pushdown": "true"}
    session = configured({**settings, "datafusion.execution.target_partitions": "3"})
    register(session)
    plan = distribute(session, "SELECT l_tax FROM lineitem ORDER BY l_tax, l_orderkey LIMIT 3")
    assert "dynamic filter" in plan.reason


def test_a_python_function_keeps_a_plan_on_a_single_node(planning):
    double = udf(lambda a: a, [pa.int64()], pa.int64(), "volatile", name="my_python_function")
    frame = planning.table("lineitem").select(double(col("l_orderkey")))
    assert "Python function" in distribute(planning, frame).reason


def test_a_python_function_with_the_name_of_a_builtin_does_too(planning):
    """A worker would find the builtin by that name, and answer something else."""
    absolute = udf(lambda a: a, [pa.int64()], pa.int64(), "volatile", name="abs")
    frame = planning.table("lineitem").select(absolute(col("l_orderkey")))
    assert "Python function" in distribute(planning, frame).reason


def test_an_in_process_table_is_named_as_the_reason(planning):
    planning.register_record_batches(
        "in_process", [[pa.record_batch({"a": [1]})], [pa.record_batch({"a": [2]})]]
    )
    try:
        assert "in-process table" in distribute(planning, "SELECT sum(a) FROM in_process").reason
    finally:
        planning.deregister_table("in_process")


def edited(
    monkeypatch, planning, change, query="SELECT count(l_tax) FROM lineitem WHERE l_tax > 0"
):
    """What becomes of a plan whose nodes look as ``change`` says."""
    for name, value in change.items():
        monkeypatch.setattr(PlanNode, name, property(value))
    return distribute(planning, query)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"declares_partitioning": lambda node: True}, "promises a partitioning"),
        ({"object_store_url": lambda node: "s3://bucket"}, "s3://bucket, which workers"),
        ({"preserves_order": lambda node: node.kind == "aggregate"}, "merges sorted partitions"),
        ({"children": lambda node: (node, node)}, "not distributed"),
        ({"kind": lambda node: "unknown"}, "not distributed"),
        ({"is_partial_aggregate": lambda node: False}, "no boundary"),
    ],
)
def test_what_is_not_fully_understood_is_left_alone(monkeypatch, planning, change, reason):
    assert reason in edited(monkeypatch, planning, change).reason


def test_a_plan_that_changes_on_the_wire_is_left_alone(monkeypatch, planning):
    other = planning.sql("SELECT 1").execution_plan()
    monkeypatch.setattr(_planner, "decode_plan", lambda *_: other)
    plan = distribute(planning, "SELECT count(l_tax) FROM lineitem WHERE l_tax > 0")
    assert "changes on the wire" in plan.reason


def test_a_plan_that_a_bare_session_cannot_decode_is_left_alone(monkeypatch, planning):
    def refuse(*_):
        raise _planner.InvalidPlanError("no such function\nand more")

    monkeypatch.setattr(_planner, "decode_plan", refuse)
    plan = distribute(planning, "SELECT count(l_tax) FROM lineitem WHERE l_tax > 0")
    assert "could not decode the plan (no such function)" in plan.reason


def test_a_plan_nested_too_deeply_to_read_is_left_alone(planning):
    query = "SELECT l_orderkey FROM lineitem"
    frame = planning.sql(query)
    for _ in range(60):
        frame = frame.limit(1_000_000).filter(col("l_orderkey") > 0)
    plan = distribute(planning, frame)
    assert isinstance(plan, SingleNodePlan)


def test_hive_partitions_travel_with_their_files(tmp_path, planning):
    for year in (1994, 1995, 1996):
        planning.sql(f"SELECT l_orderkey FROM lineitem LIMIT {year - 1990}").write_parquet(
            str(tmp_path / f"year={year}")
        )
    planning.register_parquet("hive", str(tmp_path), table_partition_cols=[("year", pa.int32())])
    try:
        plan = distribute(planning, "SELECT year, count(l_orderkey) FROM hive GROUP BY 1")
    finally:
        planning.deregister_table("hive")
    assert isinstance(plan, DistributedPlan), plan
    stage = ExecutionPlan.from_bytes(datafusion.SessionContext(), plan.stage.plan.to_bytes())
    assert "year=1994" in stage.display_indent()


def test_the_rule_checks_and_shows_its_option():
    assert DistributedPhysicalOptimizerRule(partitions_per_worker=4).target_partitions(3) == 12
    assert RULE.target_partitions(1) == RULE.target_partitions(0) == 2
    assert repr(RULE) == "DistributedPhysicalOptimizerRule(partitions_per_worker=1)"
    with pytest.raises(ValueError, match="at least 1"):
        DistributedPhysicalOptimizerRule(partitions_per_worker=0)


def test_a_reason_from_an_empty_error_is_its_type():
    assert _planner.first_line(KeyError()) == "KeyError"
    assert _planner.first_line(ValueError("\n  first \nsecond")) == "first"
