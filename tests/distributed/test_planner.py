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
from resolver.distributed._options import DistributedOptions
from resolver.distributed._plan_proto import PlanNode
from resolver.distributed._settings import PLANNING
from resolver.distributed._tree import Boundary, Share
from resolver.distributed._workers import WorkerSlots
from tests.support.distributed import configured

WORKERS = [WorkerSlots(f"http://127.0.0.1:{port}", 1) for port in (1, 2, 3)]
RULE = DistributedPhysicalOptimizerRule()


def distribute(session, query, workers=WORKERS, **options):
    frame = session.sql(query) if isinstance(query, str) else query
    plan = frame.execution_plan()
    return RULE.distribute(plan, session, workers, options=DistributedOptions(**options))


def kinds(stage):
    return [tree.kind for tree in stage.tree.walk()]


def boundaries(plan):
    return [stage.boundary for stage in plan.stages]


def test_a_grouped_aggregate_is_cut_at_its_shuffle(planning):
    plan = distribute(planning, "SELECT l_shipmode, count(*) FROM lineitem GROUP BY 1")
    assert isinstance(plan, DistributedPlan)
    assert boundaries(plan) == [Boundary.SHUFFLE, Boundary.COALESCE]
    shuffled, gathered = plan.stages
    assert kinds(shuffled) == ["repartition", "aggregate", "parquet_scan"]
    assert kinds(gathered) == ["projection", "aggregate", "stage_input"]
    assert kinds(plan.head) == ["stage_input"]


def test_an_ungrouped_aggregate_is_cut_at_its_coalesce(planning):
    plan = distribute(planning, "SELECT sum(l_tax) FROM lineitem WHERE l_quantity < 3")
    assert boundaries(plan) == [Boundary.COALESCE]
    assert kinds(plan.stages[0]) == ["aggregate", "filter", "parquet_scan"]
    assert kinds(plan.head)[-3:] == ["aggregate", "coalesce_partitions", "stage_input"]


def test_a_top_k_is_sorted_on_the_workers_and_merged_in_the_head(planning):
    plan = distribute(planning, "SELECT l_orderkey FROM lineitem ORDER BY l_tax, 1 LIMIT 5")
    assert "sort" in kinds(plan.stages[0])
    assert "sort_preserving_merge" in kinds(plan.head)


def test_every_side_of_a_join_is_a_stage(planning):
    plan = distribute(planning, "SELECT * FROM orders JOIN customer ON o_custkey = c_custkey")
    assert boundaries(plan) == [Boundary.SHUFFLE, Boundary.SHUFFLE, Boundary.COALESCE]
    assert [stage.number for stage in plan.stages[2].inputs] == [1, 2]
    plan = distribute(planning, "SELECT * FROM orders JOIN customer ON o_custkey < c_custkey")
    assert boundaries(plan) == [Boundary.BROADCAST, Boundary.COALESCE]
    plan = distribute(planning, "SELECT * FROM orders CROSS JOIN customer")
    assert boundaries(plan) == [Boundary.BROADCAST, Boundary.COALESCE]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM customer LEFT JOIN lineitem ON c_custkey < l_orderkey",
        "SELECT * FROM customer WHERE nullif(c_custkey, 1) NOT IN (SELECT nullif(o_custkey, 1) FROM orders)",
    ],
)
def test_a_join_that_emits_its_build_side_runs_in_one_task(planning, query):
    plan = distribute(planning, query)
    tops = [plan.head, *plan.stages]
    (holder,) = [top for top in tops if any(t.emits_build_side for t in top.tree.walk())]
    assert holder.divisible == 1
    assert len(holder.inputs) == 2, "each side is made by all workers"
    assert all(stage.divisible > 1 for stage in holder.inputs)


def test_a_union_is_divided_child_by_child(planning):
    query = "SELECT o_custkey FROM orders UNION ALL SELECT n_nationkey FROM nation"
    (stage,) = distribute(planning, query).stages
    assert stage.tree.partitions == 3
    shares = [stage.tree.shared(Share(k, k + 1, 3)) for k in range(3)]
    assert sum(share.partitions for share in shares if share is not None) == 3
    scans = [tree for share in shares if share is not None for tree in share.walk()]
    names = [tree.line.count("n_nationkey") for tree in scans if tree.node.is_scan]
    assert names.count(1) == 1, "the child of one partition is run once"


def test_every_partition_belongs_to_exactly_one_task(planning):
    query = "SELECT * FROM orders JOIN customer ON o_custkey = c_custkey"
    for total in (1, 2, 3, 4):
        for stage in distribute(planning, query).stages:
            trees = [stage.tree.shared(Share(k, k + 1, total)) for k in range(total)]
            leaves = [list(tree.walk())[-1] for tree in trees if tree is not None]
            whole = list(stage.tree.walk())[-1]
            assert sum(leaf.partitions for leaf in leaves) == whole.partitions


def test_adjacent_partitions_are_merged_alike_on_both_sides(planning):
    query = "SELECT * FROM orders JOIN customer ON o_custkey = c_custkey"
    *_, join = distribute(planning, query).stages
    assert join.tree.partitions == 3
    merged = join.tree.merged(2)
    assert merged.partitions == 2
    assert {leaf.merges for leaf in merged.walk() if leaf.source is not None} == {2}
    parts = [merged.shared(Share(k, k + 1, 2)) for k in range(2)]
    assert [part.partitions for part in parts] == [1, 1]
    assert join.tree.merged(3).partitions == 3


def test_what_is_sorted_is_not_merged(planning):
    """Two sorted partitions, one behind the other, are not sorted."""
    query = "SELECT sum(l_tax) OVER (ORDER BY l_orderkey) FROM lineitem"
    stage = distribute(planning, query).head
    sorted_inputs = [tree for tree in stage.tree.walk() if tree.source is not None]
    assert [tree.source.boundary for tree in sorted_inputs] == [Boundary.COALESCE]
    assert stage.tree.merged(1).partitions == stage.tree.partitions
    assert [tree.merged(1).merges for tree in sorted_inputs] == [1]


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
    assert "RoundRobin" not in plan.display(None)
    assert plan.stages[0].tree.partitions == 7


def test_an_order_that_a_repartition_keeps_is_not_cut(planning):
    """A sorted window insists on an order that a scan of stage output does not declare."""
    query = (
        "SELECT sum(k) OVER (ORDER BY k) AS a, sum(k) OVER (PARTITION BY k ORDER BY k) AS b "
        "FROM (SELECT o_custkey AS k FROM orders)"
    )
    plan = distribute(planning, query)
    assert isinstance(plan, DistributedPlan), plan
    assert any(stage.tree.needs_one_task for stage in plan.stages)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT 1", "single partition"),
        ("SELECT * FROM nation WHERE false", "single partition"),
        ("SELECT * FROM generate_series(1, 5)", "made in one place"),
        ("SELECT * FROM nation", "single partition"),
        ("EXPLAIN SELECT * FROM lineitem", "ExplainExec"),
        ("EXPLAIN ANALYZE SELECT * FROM lineitem", "AnalyzeExec"),
        ("COPY (SELECT * FROM lineitem) TO '{tmp}/out.parquet'", "writes files"),
        (
            "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t WHERE n < 3) SELECT * FROM t",
            "no wire encoding (RecursiveQueryExec)",
        ),
    ],
)
def test_what_is_not_cut_says_why(planning, tmp_path, query, reason):
    plan = distribute(planning, query.replace("{tmp}", str(tmp_path)))
    assert isinstance(plan, SingleNodePlan)
    assert reason in plan.reason
    assert reason in plan.display()


LAG = "lag(l_tax) OVER (PARTITION BY l_suppkey ORDER BY l_comment"
SUM = "sum(l_tax) OVER (PARTITION BY l_suppkey"


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        (f"{SUM} ORDER BY l_comment)", None),
        (f"{LAG}), {SUM} ORDER BY l_comment NULLS FIRST)", None),
        (LAG.replace(" OVER", " IGNORE NULLS OVER") + ")", "IGNORE NULLS"),
        (SUM.replace(" OVER", " FILTER (WHERE l_tax > 0.1) OVER") + ")", "FILTER"),
        (f"{LAG}), {LAG} DESC)", "backwards"),
    ],
)
def test_a_window_function_is_cut_only_if_its_encoding_says_all(planning, functions, reason):
    """DataFusion's plan comes back from its encoding with other functions, and looks the same."""
    plan = distribute(planning, f"SELECT {functions} FROM lineitem")
    assert isinstance(plan, DistributedPlan) == (reason is None), plan
    assert reason is None or reason in plan.reason


@pytest.mark.parametrize("order", ["", " ORDER BY l_comment", " ORDER BY l_suppkey"])
def test_a_window_over_what_a_filter_made_constant_is_left_alone(planning, order):
    query = f"SELECT {SUM}{order}) FROM lineitem WHERE l_suppkey = 3"
    assert "constant" in distribute(planning, query).reason


@pytest.mark.parametrize(
    "table",
    [
        "(SELECT * FROM lineitem WHERE l_suppkey = 3 ORDER BY l_comment LIMIT 9)",
        "lineitem JOIN (SELECT max(n_nationkey) AS n FROM nation WHERE n_regionkey = 1) ON n = l_suppkey",
    ],
)
def test_so_is_one_over_what_else_makes_columns_constant_or_equal(planning, table):
    query = f"SELECT {SUM} ORDER BY l_comment) FROM {table}"
    assert "constant" in distribute(planning, query).reason


def test_so_is_one_over_columns_that_a_filter_makes_equal(planning):
    query = (
        "SELECT sum(l_tax) OVER (PARTITION BY l_linenumber, l_suppkey ORDER BY l_comment) "
        "FROM lineitem WHERE l_linenumber = l_suppkey"
    )
    assert "equal" in distribute(planning, query).reason


def test_a_window_over_a_window_or_a_join_finds_its_order_below(planning):
    for query in (
        f"SELECT {SUM} ORDER BY l_comment), {LAG} DESC, l_tax), {LAG}, l_tax) FROM lineitem",
        f"SELECT {SUM} ORDER BY l_comment) FROM supplier JOIN lineitem ON s_suppkey = l_suppkey",
        f"SELECT *, {SUM} ORDER BY l_comment) FROM (SELECT *, {LAG}) FROM lineitem) WHERE l_tax > 0",
    ):
        assert isinstance(distribute(planning, query), DistributedPlan), query


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


def test_an_in_process_table_travels_up_to_a_limit(planning):
    planning.register_record_batches(
        "in_process", [[pa.record_batch({"a": [1]})], [pa.record_batch({"a": [2]})]]
    )
    query = "SELECT sum(a) FROM in_process"
    try:
        assert isinstance(distribute(planning, query), DistributedPlan)
        assert "inline_limit is 5" in distribute(planning, query, inline_limit=5).reason
    finally:
        planning.deregister_table("in_process")


def test_a_store_that_workers_have_is_read(planning, monkeypatch):
    monkeypatch.setattr(PlanNode, "object_store_url", property(lambda node: "s3://bucket/"))
    plan = planning.sql("SELECT count(l_tax) FROM lineitem WHERE l_tax > 0").execution_plan()
    assert isinstance(RULE.distribute(plan, planning, WORKERS), SingleNodePlan)
    known = RULE.distribute(plan, planning, WORKERS, stores=["s3://bucket/"])
    assert isinstance(known, DistributedPlan)


def edited(
    monkeypatch,
    planning,
    change,
    query="SELECT l_tax, count(l_tax) FROM lineitem WHERE l_tax > 0 GROUP BY 1",
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
        ({"preserves_order": lambda node: node.kind == "repartition"}, "merges sorted partitions"),
        ({"children": lambda node: (node, node)}, "not distributed"),
        ({"is_hash_repartition": lambda node: False}, "in a way that is not distributed"),
    ],
)
def test_what_is_not_fully_understood_is_left_alone(monkeypatch, planning, change, reason):
    assert reason in edited(monkeypatch, planning, change).reason


def test_a_plan_that_changes_on_the_wire_is_left_alone(monkeypatch, planning):
    other = planning.sql("SELECT 1").execution_plan()
    monkeypatch.setattr(_planner, "decode_plan", lambda *_, **__: other)
    plan = distribute(planning, "SELECT count(l_tax) FROM lineitem WHERE l_tax > 0")
    assert "changes on the wire" in plan.reason


def test_a_plan_that_a_bare_session_cannot_decode_is_left_alone(monkeypatch, planning):
    def refuse(*_, **__):
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
    encoded = plan.stages[0].tree.plan().to_bytes()
    stage = ExecutionPlan.from_bytes(datafusion.SessionContext(), encoded)
    assert "year=1994" in stage.display_indent()


def test_the_rule_checks_and_shows_its_option():
    slots = [WorkerSlots("http://a:1", 2), WorkerSlots("http://b:1", 1)]
    assert DistributedPhysicalOptimizerRule(partitions_per_slot=4).target_partitions(slots) == 12
    assert RULE.target_partitions(slots[1:]) == RULE.target_partitions([]) == 2
    assert repr(RULE) == "DistributedPhysicalOptimizerRule(partitions_per_slot=1)"
    with pytest.raises(ValueError, match="at least 1"):
        DistributedPhysicalOptimizerRule(partitions_per_slot=0)


def test_a_reason_from_an_empty_error_is_its_type():
    assert _planner.first_line(KeyError()) == "KeyError"
    assert _planner.first_line(ValueError("\n  first \nsecond")) == "first"
