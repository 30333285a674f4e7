"""Which parts of a plan give the same rows in the same partitions when they are run again."""

from __future__ import annotations

from decimal import Decimal

import datafusion
import pyarrow as pa
import pytest

from resolver.distributed._plan_proto import AggregateMode, PlanNode
from resolver.distributed._repeatable import is_repeatable
from resolver.distributed._tree import tree_of

COLUMNS = {
    "k": pa.array([1, 2]),
    "i": pa.array([1, 2]),
    "f": pa.array([1.0, 2.0]),
    "f32": pa.array([1.0, 2.0], pa.float32()),
    "d": pa.array([Decimal(1), Decimal(2)]),
    "s": pa.array(["a", "b"]),
    "b": pa.array([True, False]),
    "l": pa.array([[1.0], [2.0]]),
    "st": pa.array([{"x": 1.0}, {"x": 2.0}]),
    "dic": pa.array(["a", "b"]).dictionary_encode(),
}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    session = datafusion.SessionContext(datafusion.SessionConfig().with_target_partitions(3))
    session.from_arrow(pa.table(COLUMNS), "t")
    path = tmp_path_factory.mktemp("random") / "random.parquet"
    session.sql("SELECT * FROM t").write_parquet(str(path))
    session.register_parquet("random", str(path))  # a name, and not the function's
    doubled = datafusion.udf(lambda x: x, [pa.int64()], pa.int64(), "stable", "doubled")
    session.register_udf(doubled)
    return session


def tree(session, query):
    plan = session.sql(query).execution_plan()
    return tree_of(plan, PlanNode.parse(plan.to_bytes(session)))


REPEATABLE = [
    "SELECT * FROM t",
    "SELECT * FROM random",
    "SELECT k AS random, upper(s), substr(s, 1, 2) FROM random WHERE md5(s) <> 'x'",
    "SELECT * FROM t ORDER BY f",
    "SELECT t.k FROM t JOIN random u ON t.f = u.f AND t.i < u.i",
    "SELECT t.k FROM t LEFT JOIN random u ON t.s < u.s",
    "SELECT k FROM t WHERE s NOT IN (SELECT s FROM random)",
    "SELECT unnest(l) FROM t UNION ALL SELECT f FROM t",
    "SELECT DISTINCT f, s FROM t",
    "SELECT k, count(f), count(DISTINCT l), min(s), max(d), sum(d), avg(d), sum(i) FROM t GROUP BY k",
    "SELECT k, bool_and(b), bit_xor(i) FROM t GROUP BY k",
    "SELECT k, sum(i) FROM t GROUP BY GROUPING SETS ((k), ())",
]
NOT_REPEATABLE = [
    "SELECT random() FROM t",
    "SELECT k FROM t WHERE random() < 2",
    "SELECT k FROM random WHERE random() < 2",
    "SELECT t.k FROM t JOIN random u ON t.k = u.k AND t.f + u.f < random()",
    "SELECT uuid() FROM t",
    "SELECT doubled(k) FROM t",
    "SELECT * FROM t LIMIT 1",
    "SELECT * FROM t ORDER BY f LIMIT 1",
    "SELECT k FROM (SELECT k FROM random LIMIT 1) WHERE k > 0",
    "SELECT DISTINCT k FROM t LIMIT 1",
    "SELECT k, row_number() OVER (PARTITION BY k) FROM t",
    "SELECT k, sum(f) FROM t GROUP BY k",
    "SELECT k, sum(f32) FROM t GROUP BY k",
    "SELECT k, min(f) FROM t GROUP BY k",
    "SELECT k, max(l) FROM t GROUP BY k",
    "SELECT k, max(st) FROM t GROUP BY k",
    "SELECT k, max(dic) FROM t GROUP BY k",
    "SELECT k, sum(i * 0.5) FROM t GROUP BY k",
    "SELECT k, avg(i) FROM t GROUP BY k",
    "SELECT k, sum(random()) FROM t GROUP BY k",
    "SELECT k, count(random()) FROM t GROUP BY k",
    "SELECT k, first_value(i) FROM t GROUP BY k",
    "SELECT k, array_agg(i) FROM t GROUP BY k",
    "SELECT k, stddev(i) FROM t GROUP BY k",
    "SELECT k, count(*) FILTER (WHERE random() < 2) FROM t GROUP BY k",
    "SELECT count(*) FROM t GROUP BY random() < 2",
]


@pytest.mark.parametrize("query", REPEATABLE)
def test_what_is_computed_of_rows_alone_is_repeatable(session, query):
    assert is_repeatable(tree(session, query))


@pytest.mark.parametrize("query", NOT_REPEATABLE)
def test_what_depends_on_order_or_chance_is_not(session, query):
    assert not is_repeatable(tree(session, query))


def test_a_function_is_seen_whatever_it_is_called(session):
    """A plan's display tells the names of aggregates, which anybody may choose."""
    f = datafusion.functions
    column = datafusion.col("f")
    for function in (f.sum(column), f.first_value(column), f.count(f.random())):
        frame = session.table("t").aggregate([datafusion.col("k")], [function.alias("count(t.i)")])
        plan = frame.execution_plan()
        assert not is_repeatable(tree_of(plan, PlanNode.parse(plan.to_bytes(session))))


def test_a_function_without_a_name_is_seen_too(session):
    for types in ([pa.int64()], []):
        nameless = datafusion.udf(lambda *_: pa.array([1]), types, pa.int64(), "volatile", "")
        frame = session.table("t").select(nameless(*(datafusion.col("k") for _ in types)))
        plan = frame.execution_plan()
        assert not is_repeatable(tree_of(plan, PlanNode.parse(plan.to_bytes(session))))


def test_what_a_table_in_memory_holds_calls_nothing(session):
    session.from_arrow(pa.table({"b": [b"\x82\x01\x08\n\x06random"]}), "looks_like_a_call")
    assert is_repeatable(tree(session, "SELECT * FROM looks_like_a_call"))


def partial(session, query):
    """The part of the plan that is run before groups are put together."""
    return next(
        below
        for below in tree(session, query).walk()
        if below.kind == "repartition"
        and below.children[0].node.aggregate_mode == AggregateMode.PARTIAL
    )


@pytest.mark.parametrize(
    ("query", "groups"),
    [
        ("SELECT k, sum(f) FROM t GROUP BY k", True),
        ("SELECT k, array_agg(i) FROM t WHERE f > 1 GROUP BY k", True),
        ("SELECT f, sum(f) FROM t GROUP BY f", True),
        ("SELECT DISTINCT k FROM t LIMIT 1", False),
        ("SELECT k, sum(random()) FROM t GROUP BY k", False),
        ("SELECT random() < 2, sum(f) FROM t GROUP BY random() < 2", False),
        ("SELECT k, sum(f) FROM t WHERE random() < 2 GROUP BY k", False),
        ("SELECT s, sum(f) FROM (SELECT sum(f) AS f, s FROM t GROUP BY k, s) GROUP BY s", False),
    ],
)
def test_values_of_groups_may_differ_if_only_the_groups_do_not(session, query, groups):
    top = partial(session, query)
    assert is_repeatable(top, may_group=True) == groups
    assert not is_repeatable(top)
