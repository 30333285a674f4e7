"""What measured sizes change about a plan, and what they must not."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resolver.distributed import DistributedPhysicalOptimizerRule
from resolver.distributed._adapt import _Adapter, adapt, read_by_every_task, waits_for_build_side
from resolver.distributed._cutter import cut
from resolver.distributed._options import DistributedOptions
from resolver.distributed._plan_proto import JoinType, PlanNode
from resolver.distributed._sizes import Measured, is_tiny, reads_little, task_count
from resolver.distributed._tree import Boundary, Share, Tree, tree_of
from resolver.distributed._workers import WorkerSlots

WORKERS = [WorkerSlots(f"http://127.0.0.1:{port}", 1) for port in (1, 2, 3)]
SMALL, LARGE, NOTHING = Measured(10, 1_000), Measured(10**6, 10**9), Measured(0, 0)


def stages(planning, query):
    plan = DistributedPhysicalOptimizerRule().distribute(
        planning.sql(query).execution_plan(), planning, WORKERS
    )
    return {stage.number: stage for stage in plan.stages}


def joined(planning, query):
    """The stage that has the join, and the stages of its build and its probe side."""
    found = stages(planning, query)
    stage = next(s for s in found.values() if any("Join" in t.name for t in s.tree.walk()))
    join = next(tree for tree in stage.tree.walk() if "Join" in tree.name)
    return stage, *(side.source for side in join.children)


def adapted(stage, build, probe, measured, **options):
    probes = {} if probe is None else {probe.number: probe.tree.children[0]}
    return adapt(
        stage.tree,
        {build.number: measured},
        probes,
        DistributedOptions(**options),
        empty=lambda tree: tree.over(),
        new_number=itertools.count(100).__next__,
    )


MARK = (
    "SELECT * FROM customer "
    "WHERE c_custkey < 9 OR EXISTS (SELECT 1 FROM orders WHERE o_custkey = c_custkey)"
)
INNER = "SELECT * FROM customer JOIN orders ON o_custkey = c_custkey"


def test_a_small_build_side_is_broadcast_and_the_probe_side_not_shuffled(planning):
    stage, build, probe = joined(planning, INNER)
    assert waits_for_build_side(stage.tree) == {probe.number}
    assert waits_for_build_side(stage.tree, {build.number}) == frozenset()
    result = adapted(stage, build, probe, SMALL)
    join = next(tree for tree in result.tree.walk() if "Join" in tree.name)
    assert join.collects_left
    assert "CollectLeft" in join.line
    assert join.children[0].source.boundary is Boundary.BROADCAST
    assert join.children[1].source is None, "the probe side is still another stage"
    (decision,) = result.decisions
    assert "broadcast: 1,000 bytes" in decision


@pytest.mark.parametrize(
    ("measured", "options"), [(LARGE, {}), (SMALL, {"broadcast_threshold": 9})]
)
def test_a_large_build_side_is_shuffled(planning, measured, options):
    stage, build, probe = joined(planning, INNER)
    result = adapted(stage, build, probe, measured, **options)
    assert [leaf.source.number for leaf in result.tree.walk() if leaf.source] == [
        build.number,
        probe.number,
    ]
    assert "shuffled" in result.decisions[0]


@pytest.mark.parametrize(
    ("query", "type_"),
    [
        ("SELECT * FROM customer LEFT JOIN orders ON o_custkey = c_custkey", "Left"),
        ("SELECT * FROM customer FULL JOIN orders ON o_custkey = c_custkey", "Full"),
        ("SELECT * FROM customer LEFT SEMI JOIN orders ON o_custkey = c_custkey", "LeftSemi"),
        ("SELECT * FROM customer LEFT ANTI JOIN orders ON o_custkey = c_custkey", "LeftAnti"),
        (
            MARK,
            "LeftMark",
        ),
    ],
)
def test_what_emits_its_build_side_is_never_broadcast(planning, query, type_):
    stage, build, probe = joined(planning, query)
    assert any(f"join_type={type_}," in tree.line for tree in stage.tree.walk())
    result = adapted(stage, build, probe, SMALL)
    assert not any(tree.collects_left for tree in result.tree.walk())


@pytest.mark.parametrize(
    ("kind", "pruned"),
    [
        ("JOIN", True),
        ("LEFT JOIN", True),
        ("LEFT SEMI JOIN", True),
        ("LEFT ANTI JOIN", True),
        ("FULL JOIN", False),
        ("RIGHT JOIN", False),
        ("RIGHT ANTI JOIN", False),
        ("RIGHT SEMI JOIN", True),
    ],
)
def test_a_join_without_build_rows_is_not_run_if_it_has_none_then(planning, kind, pruned):
    query = f"SELECT * FROM customer {kind} lineitem ON c_custkey = l_suppkey"
    stage, build, probe = joined(planning, query)
    result = adapted(stage, build, probe, NOTHING)
    assert any("is empty" in decision for decision in result.decisions) == pruned


def test_a_join_without_build_rows_is_run_where_its_order_is_relied_on(planning):
    query = (
        "SELECT sum(o_totalprice) OVER (PARTITION BY o_custkey ORDER BY o_orderkey) "
        "FROM customer JOIN orders ON o_custkey = c_custkey"
    )
    stage, build, probe = joined(planning, query)
    result = adapted(stage, build, probe, NOTHING)
    assert not any("is empty" in decision for decision in result.decisions)


def test_what_relies_on_the_division_gets_its_rows_shuffled_after_the_join(planning):
    """Grouped by the join's key, DataFusion needs no further shuffle; after a broadcast, it does."""
    query = (
        "SELECT c_custkey, count(*) FROM customer JOIN orders ON o_custkey = c_custkey "
        "GROUP BY c_custkey"
    )
    stage, build, probe = joined(planning, query)
    result = adapted(stage, build, probe, SMALL)
    (created,) = result.created
    assert created.boundary is Boundary.SHUFFLE
    assert created.tree.partitions == 3
    assert [leaf.source.number for leaf in result.tree.walk() if leaf.source] == [created.number]
    assert any(tree.collects_left for tree in created.tree.walk())
    aggregate = next(tree for tree in result.tree.walk() if tree.kind == "aggregate")
    assert created.tree.node.hash_expressions == aggregate.node.group_keys


def test_a_window_over_a_join_keeps_the_division(planning):
    query = (
        "SELECT row_number() OVER (PARTITION BY c_custkey ORDER BY o_orderkey) "
        "FROM customer JOIN orders ON o_custkey = c_custkey"
    )
    stage, build, probe = joined(planning, query)
    assert "window" in [tree.kind for tree in stage.tree.walk()]
    result = adapted(stage, build, probe, SMALL)
    assert not any(tree.collects_left for tree in result.tree.walk())
    assert not result.created


SELECTIVE = Measured(10, 1_000, most_rows=1_000)
EXISTS = "SELECT * FROM customer WHERE EXISTS (SELECT 1 FROM orders WHERE o_custkey = c_custkey)"
NOT_IN = (
    "SELECT * FROM customer WHERE nullif(c_custkey, 1) NOT IN "
    "(SELECT nullif(o_custkey, 1) FROM orders)"
)
WHOLE_ROWS = {
    "Left": INNER.replace("JOIN", "LEFT JOIN"),
    "LeftSemi": EXISTS.replace("= c_custkey", "= c_custkey AND o_totalprice > c_acctbal"),
}
KEYS_ONLY = {
    "LeftSemi": EXISTS,
    "LeftAnti": EXISTS.replace("EXISTS", "NOT EXISTS"),
    "LeftMark": MARK,
}


def created_for_a_selective_build_side(planning, query, type_):
    """The join as adapted, the stage that was created for it, and the two that it had."""
    stage, build, probe = joined(planning, query)
    assert waits_for_build_side(stage.tree) == {probe.number}
    result = adapted(stage, build, probe, SELECTIVE)
    (created,) = result.created
    join = next(tree for tree in result.tree.walk() if tree.node.is_partitioned_join)
    assert f"join_type={type_}," in join.line
    assert [side.source.number for side in join.children] == [build.number, created.number]
    assert created.boundary is Boundary.SHUFFLE
    assert created.tree.partitions == probe.tree.partitions
    assert not created.tree.needs_one_task
    assert any("with a partner in stage" in decision for decision in result.decisions)
    finder = next(tree for tree in created.tree.walk() if tree.kind == "hash_join")
    # Every task has all keys.
    assert finder.children[0].source.boundary is Boundary.BROADCAST
    assert finder.children[0].source.number == build.number
    assert finder.children[1] is probe.tree.children[0]
    return join, finder, created, probe


@pytest.mark.parametrize("type_", WHOLE_ROWS)
def test_only_rows_with_a_partner_are_shuffled_to_a_small_selective_build_side(planning, type_):
    found = created_for_a_selective_build_side(planning, WHOLE_ROWS[type_], type_)
    _, finder, created, probe = found
    assert finder.node.join_type == JoinType.RIGHT_SEMI
    assert created.tree.node.hash_expressions == probe.tree.node.hash_expressions


@pytest.mark.parametrize("type_", KEYS_ONLY)
def test_where_one_partner_is_enough_only_keys_are_shuffled_each_once_per_task(planning, type_):
    found = created_for_a_selective_build_side(planning, KEYS_ONLY[type_], type_)
    join, finder, created, _ = found
    assert finder.node.join_type == JoinType.LEFT_SEMI
    assert created.tree.node.hash_expressions == join.node.join_keys[1]
    # Only this finder may emit what other tasks emit too.
    assert dataclasses.replace(finder, may_repeat=False).needs_one_task
    assert finder.shared(Share(0, 1, 2)) is not None


def test_a_limit_is_that_of_the_join_and_not_of_the_rows_that_may_have_a_partner(planning):
    query = INNER.replace("JOIN", "LEFT JOIN") + " AND c_acctbal < o_totalprice LIMIT 2"
    stage, build, probe = joined(planning, query)
    (created,) = adapted(stage, build, probe, SELECTIVE).created
    join, keeper = (
        next(tree.node for tree in each.tree.walk() if tree.kind == "hash_join")
        for each in (stage, created)
    )
    assert join.fetch == 2
    assert keeper.fetch is None


@pytest.mark.parametrize(
    ("query", "measured", "options"),
    [
        (EXISTS, SMALL, {}),  # nothing is known of what it dropped
        (EXISTS, Measured(600, 1_000, most_rows=1_000), {}),
        (EXISTS, SELECTIVE, {"broadcast_threshold": 999}),
        (INNER.replace("JOIN", "FULL JOIN"), SELECTIVE, {}),
        (NOT_IN, SELECTIVE, {}),
    ],
)
def test_a_probe_side_is_shuffled_whole_where_that_would_not_help_or_not_be_right(
    planning, query, measured, options
):
    stage = next(
        s
        for s in stages(planning, query).values()
        if any(t.node.is_partitioned_join or t.node.is_null_aware for t in s.tree.walk())
    )
    sides = [leaf.source for leaf in stage.tree.walk() if leaf.source is not None]
    build, probe = (sides[0], sides[-1])
    result = adapted(stage, build, probe, measured, **options)
    assert not result.created


def test_columns_of_a_gathered_build_side_are_named_in_every_task(planning):
    """Naming them is not worth a stage that gathers everything in one task first."""
    query = (
        "SELECT a.x, count(*) FROM (SELECT c_custkey + 1 AS x FROM customer LEFT JOIN nation "
        "ON c_nationkey = n_nationkey) a CROSS JOIN orders GROUP BY a.x"
    )
    found = stages(planning, query)
    join = next(t for s in found.values() for t in s.tree.walk() if t.kind == "cross_join")
    build = join.children[0]
    while build.kind == "projection":
        (build,) = build.children
    assert build.source is not None
    assert build.source.boundary is Boundary.BROADCAST
    assert build.source.tree.partitions > 1


def test_values_that_every_task_would_make_up_are_made_before(planning):
    query = "SELECT * FROM customer JOIN orders ON c_custkey * 0.5 > o_custkey + 3.5"
    plan = planning.sql(query).execution_plan()
    root = tree_of(plan, PlanNode.parse(plan.to_bytes(planning)))

    def lucky(tree):
        line = re.sub(r"\S+ as join_proj_push_down_1", "lucky() as x", tree.line)
        return dataclasses.replace(tree, line=line, children=tuple(map(lucky, tree.children)))

    for tree, kind in ((root, "projection"), (lucky(root), "stage_input")):
        trees = [tree for stage in cut(tree).walk() for tree in stage.tree.walk()]
        join = next(tree for tree in trees if tree.kind == "nested_loop_join")
        assert join.children[0].kind == kind


SMALL_BUILD = "SELECT * FROM nation JOIN customer ON n_nationkey = c_nationkey"


def settled(planning, query, **options):
    """The stage with the first join as it would run before anything was measured."""
    stage, build, probe = joined(planning, query)
    options = DistributedOptions(**options)
    spared = read_by_every_task(stage.tree, options)
    result = adapt(
        stage.tree,
        {},
        {probe.number: probe.tree.children[0]},
        options,
        empty=lambda tree: tree.over(),
        new_number=itertools.count(100).__next__,
    )
    return stage, build, probe, spared, result


def test_a_build_side_of_small_files_is_read_by_every_task(planning):
    stage, build, probe, spared, result = settled(planning, SMALL_BUILD)
    assert spared == {build.number}
    join = next(tree for tree in result.tree.walk() if "Join" in tree.name)
    assert join.collects_left
    left, right = join.children
    assert left.partitions == 1
    assert [tree.node.is_scan for tree in left.walk()][-1]
    assert right is probe.tree.children[0]
    assert not [leaf for leaf in result.tree.walk() if leaf.source is not None]
    assert any("every task reads" in decision for decision in result.decisions)
    # What every task has whole is not what the tasks share out.
    task = dataclasses.replace(stage, tree=result.tree)
    assert task_count(task, {}, DistributedOptions(scan_bytes_per_task=0), 9) == right.partitions
    shares = [result.tree.shared(Share(k, k + 1, 3)) for k in range(3)]
    assert any(shares)
    for own in filter(None, shares):
        assert next(tree for tree in own.walk() if "Join" in tree.name).children[0] is left


@pytest.mark.parametrize(
    ("query", "options"),
    [
        (SMALL_BUILD, {"scan_bytes_per_task": 0}),
        (SMALL_BUILD, {"scan_bytes_per_task": 199}),  # 25 rows of at least 8 bytes
        (SMALL_BUILD, {"broadcast_threshold": 0}),
        (SMALL_BUILD.replace("JOIN", "LEFT JOIN"), {}),
        # Every task would see other rows.
        (SMALL_BUILD.replace("nation ", "(SELECT * FROM nation WHERE random() < 0.5) "), {}),
        (SMALL_BUILD.replace("nation ", "(SELECT *, random() AS r FROM nation) "), {}),
        (SMALL_BUILD.replace("nation ", "(SELECT * FROM nation LIMIT 7) "), {}),
    ],
)
def test_a_build_side_is_a_stage_where_reading_it_everywhere_is_not_the_same(
    planning, query, options
):
    _, build, _, spared, result = settled(planning, query, **options)
    assert not spared
    assert build.number in [leaf.source.number for leaf in result.tree.walk() if leaf.source]


def test_any_function_may_be_a_volatile_one_but_a_cast_is_not(planning):
    query = SMALL_BUILD.replace(
        "nation ", "(SELECT *, CAST(n_regionkey AS DOUBLE) AS r FROM nation) "
    )
    _, build, _ = joined(planning, query)
    assert is_tiny(build, DistributedOptions())

    def calling(tree):
        line = tree.line.replace("CAST(", "Lucky(")
        return dataclasses.replace(tree, line=line, children=tuple(map(calling, tree.children)))

    assert not is_tiny(dataclasses.replace(build, tree=calling(build.tree)), DistributedOptions())


def test_the_type_of_a_cast_is_no_call():
    node = PlanNode.coalesce()
    plain = "ProjectionExec: expr=[CAST(a@0 AS Decimal128(19, 6)) as b, a@0 AS Timestamp(ns) as c]"
    assert not Tree(node, plain).may_be_volatile
    assert Tree(node, plain.replace("a@0", "random()")).may_be_volatile
    assert Tree(node, plain.replace("AS Decimal128", "+ Decimal128")).may_be_volatile


def test_a_small_build_side_is_a_stage_where_the_division_is_relied_on(planning):
    query = (
        f"SELECT n_nationkey, sum(c_acctbal) OVER (PARTITION BY n_nationkey) FROM ({SMALL_BUILD})"
    )
    _, build, _, spared, result = settled(planning, query)
    assert spared == {build.number}
    assert build.number in [leaf.source.number for leaf in result.tree.walk() if leaf.source]


def test_a_scan_of_little_is_one_task(planning):
    (scan, _) = stages(planning, "SELECT l_tax, count(*) FROM lineitem GROUP BY 1").values()
    size = next(tree.node for tree in scan.tree.walk() if tree.node.is_scan).file_bytes
    for least, expected in ((size, 1), (size - 1, 2), (1, 3), (0, 3)):
        options = DistributedOptions(scan_bytes_per_task=least)
        assert task_count(scan, {}, options, 3) == expected


def test_many_rows_in_few_bytes_of_files_are_shared_out(planning, tmp_path):
    for name in "abc":
        pq.write_table(pa.table({"same": [1] * 10_000}), tmp_path / f"{name}.parquet")
    planning.register_parquet("rows_of_one_value", str(tmp_path))
    try:
        query = "SELECT same, count(*) FROM rows_of_one_value GROUP BY same"
        (scan, _) = stages(planning, query).values()
    finally:
        planning.deregister_table("rows_of_one_value")
    assert task_count(scan, {}, DistributedOptions(scan_bytes_per_task=100_000), 3) == 3
    assert task_count(scan, {}, DistributedOptions(scan_bytes_per_task=240_000), 3) == 1


def test_a_cross_join_of_little_is_shared_out(planning):
    query = "SELECT a.l_tax FROM lineitem a, lineitem b WHERE a.l_tax < b.l_discount"
    stage = next(
        s
        for s in stages(planning, query).values()
        if any(tree.kind in {"cross_join", "nested_loop_join"} for tree in s.tree.walk())
    )
    build = next(leaf.source for leaf in stage.tree.walk() if leaf.source is not None)
    assert task_count(build, {}, DistributedOptions(), 3) == 1
    assert task_count(stage, {build.number: SMALL}, DistributedOptions(), 3) > 1


def test_files_that_one_task_reads_may_be_too_many_for_every_task_to_read(planning):
    query = "SELECT sum(l_tax) OVER (PARTITION BY l_suppkey) FROM lineitem"
    scan, *_ = stages(planning, query).values()
    options = DistributedOptions()
    assert task_count(scan, {}, options, 3) == 1
    assert scan.boundary is Boundary.SHUFFLE
    assert not is_tiny(scan, options)
    assert not reads_little(scan.tree, {}, options)


def test_a_stage_gets_the_tasks_that_it_is_worth(planning):
    scan, total = stages(planning, "SELECT l_suppkey, sum(l_tax) FROM lineitem GROUP BY 1").values()
    options = DistributedOptions(bytes_per_task=1_000, scan_bytes_per_task=0)
    assert task_count(scan, {}, options, 3) == 3
    assert task_count(scan, {}, options, 2) == 2
    assert task_count(scan, {}, DistributedOptions(files_per_task=1_000), 3) == 1
    for size, expected in ((0, 1), (1_000, 1), (1_001, 2), (10**9, 3)):
        assert task_count(total, {1: Measured(1, size)}, options, 3) == expected
    assert task_count(total, {1: NOTHING}, DistributedOptions(bytes_per_task=0), 3) == 3


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 40))
def test_shares_divide_every_partition_once_and_in_order(slots, partitions):
    bounds = [0, *itertools.accumulate(slots)]
    shares = [Share(low, high, bounds[-1]) for low, high in itertools.pairwise(bounds)]
    owned = [partition for share in shares for partition in share.of(partitions)]
    assert owned == list(range(partitions))


def test_a_chain_of_joins_is_adapted_in_a_few_steps(planning, monkeypatch):
    joins = " ".join(
        f"JOIN orders o{i} ON o{i}.o_orderkey = o{i - 1}.o_orderkey" for i in range(1, 13)
    )
    found = stages(planning, f"SELECT o0.o_clerk FROM orders o0 {joins}")
    stage = max(found.values(), key=lambda stage: len(stage.inputs))
    assert len(stage.inputs) == 13
    steps = []
    join = _Adapter._join
    monkeypatch.setattr(
        _Adapter, "_join", lambda self, *args, **kw: steps.append(1) or join(self, *args, **kw)
    )
    adapt(
        stage.tree,
        {},
        {},
        DistributedOptions(scan_bytes_per_task=0),
        empty=lambda tree: tree.over(),
        new_number=itertools.count(100).__next__,
    )
    assert 12 <= len(steps) <= 12 * 12
