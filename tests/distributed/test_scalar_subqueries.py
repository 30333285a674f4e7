"""A subquery that stands for one value and gives several rows is an error, never more rows."""

from __future__ import annotations

import pytest

from resolver.distributed._plan_proto import PlanNode
from resolver.distributed._scalar_subqueries import has_scalar_subqueries, refused_subquery
from resolver.distributed._settings import PLANNING, SCALAR_SUBQUERIES
from tests.support.distributed import configured

ONE = (
    "SELECT max(n_name) FROM nation WHERE n_regionkey = 1",
    "SELECT upper(m) FROM (SELECT min(n_name) AS m FROM nation WHERE n_nationkey > 1) WHERE m < 'Z'",
    "SELECT max(n) FROM (SELECT DISTINCT n_name AS n FROM nation)",
    "SELECT n_name FROM nation LIMIT 1",
    "SELECT n_name FROM nation ORDER BY n_name LIMIT 1 OFFSET 3",
    "SELECT max(a.n_name) FROM nation a WHERE a.n_regionkey = (SELECT max(r_regionkey) FROM region WHERE r_name > 'B')",
    (
        "SELECT a.m || b.m FROM (SELECT max(n_name) AS m FROM nation WHERE n_regionkey = 1) a, "
        "(SELECT max(r_name) AS m FROM region WHERE r_regionkey > 1) b"
    ),
    "SELECT 'x'",
)
MORE = (
    "SELECT n_name FROM nation",
    "SELECT DISTINCT n_name FROM nation WHERE n_nationkey = 1",
    "SELECT n_name FROM nation LIMIT 2",
    "SELECT max(n_name) FROM nation GROUP BY n_regionkey",
    "SELECT max(n_name) FROM nation GROUP BY GROUPING SETS ((), ())",
    "SELECT max(n_name) OVER () FROM nation",
    "SELECT max(n_name) FROM nation UNION ALL SELECT 'x'",
    "SELECT unnest(['x', 'y'])",
    "SELECT max(a.n_name) FROM nation a WHERE a.n_regionkey = (SELECT r_regionkey FROM region)",
)


@pytest.mark.parametrize(
    ("subquery", "is_one"), [*((q, True) for q in ONE), *((q, False) for q in MORE)]
)
def test_only_what_gives_one_row_at_most_becomes_a_join(register, subquery, is_one):
    planning = configured({**PLANNING, SCALAR_SUBQUERIES: "true"})
    register(planning)
    plan = planning.sql(f"SELECT * FROM part WHERE p_name > ({subquery})").execution_plan()
    assert has_scalar_subqueries(plan)
    refused = refused_subquery(plan, PlanNode.parse(plan.to_bytes(planning)))
    assert (refused is None) == is_one


def test_several_rows_for_one_value_are_an_error_as_on_a_single_node(session, single):
    query = "SELECT n_name FROM nation WHERE n_regionkey >= (SELECT r_regionkey FROM region)"
    for engine in (single, session):
        with pytest.raises(Exception, match="more than one row"):
            engine.sql(query).to_arrow_table()
    assert "stands for one value" in session.sql(query).distributed_plan().reason


def test_a_value_of_one_row_is_found_on_the_workers(session):
    query = "SELECT * FROM nation WHERE n_regionkey >= (SELECT r_regionkey FROM region LIMIT 1)"
    assert not hasattr(session.sql(query).distributed_plan(), "reason")


def test_one_inside_a_view_is_found_too(session):
    query = "SELECT * FROM nation WHERE n_regionkey >= (SELECT r_regionkey FROM region LIMIT 1)"
    session.register_view("later", session.sql(query))
    assert not hasattr(session.sql("SELECT * FROM later").distributed_plan(), "reason")
    session.deregister_table("later")


@pytest.mark.parametrize(
    ("condition", "plans"),
    [
        ("n_regionkey = (SELECT max(r_regionkey) FROM region)", 2),
        ("abs((SELECT max(r_regionkey) FROM region)) > n_regionkey", 2),
        ("EXISTS (SELECT 1 FROM region WHERE r_regionkey = n_regionkey)", 1),
        ("n_regionkey NOT IN (SELECT r_regionkey FROM region)", 1),
    ],
)
def test_only_what_stands_for_one_value_is_planned_twice(session, monkeypatch, condition, plans):
    derive, derived = type(session)._derived, []
    frame = session.sql(f"SELECT * FROM nation WHERE {condition}")

    def counting(self, settings):
        derived.append(settings)
        return derive(self, settings)

    monkeypatch.setattr(type(session), "_derived", counting)
    frame.distributed_plan()
    assert len(derived) == plans
