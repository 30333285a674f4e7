"""Whether the scalar subqueries of a query may be planned as joins.

Such a subquery stands for one value, and DataFusion fails a query where it gives more
than one row. Planned as a join, which can be cut apart, it would repeat the rows of the
query instead. So it must be plain from its plan that it gives one row at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ._plan_proto import AggregateMode, JoinType
from ._tree import TreeError, tree_of

if TYPE_CHECKING:
    import datafusion

    from ._plan_proto import PlanNode
    from ._tree import Tree

__all__ = ["has_scalar_subqueries", "refused_subquery"]

# Of every row they make one at most.
_NO_MORE_ROWS: Final = frozenset(
    {
        "buffer",
        "coalesce_batches",
        "coalesce_partitions",
        "cooperative",
        "filter",
        "global_limit",
        "local_limit",
        "projection",
        "repartition",
        "sort",
        "sort_preserving_merge",
        "window",
    }
)
_WHOLE: Final = frozenset({AggregateMode.FINAL, AggregateMode.SINGLE})
_ROW_BY_ROW_JOINS: Final = frozenset({JoinType.INNER, JoinType.LEFT, JoinType.RIGHT})


def has_scalar_subqueries(plan: datafusion.ExecutionPlan) -> bool:
    """Whether any node of ``plan`` computes one."""
    return plan.display().startswith("ScalarSubqueryExec") or any(
        has_scalar_subqueries(below) for below in plan.children()
    )


def refused_subquery(plan: datafusion.ExecutionPlan, root: PlanNode) -> str | None:
    """Why the scalar subqueries of ``plan``, encoded in ``root``, must not become joins."""
    try:
        every = list(tree_of(plan, root).walk())
        values = [value for t in every if t.kind == "scalar_subquery" for value in t.children[1:]]
        if all(_is_one_row_at_most(value) for value in values):
            return None
    except TreeError as error:
        return str(error)
    return (
        "a subquery that stands for one value may give several rows, which must be an error; "
        "an aggregate or LIMIT 1 in it would tell that it does not"
    )


def _is_one_row_at_most(tree: Tree) -> bool:
    node = tree.node
    if node.fetch is not None and node.fetch <= 1 and tree.partitions == 1:
        return True
    if node.kind in {"empty", "placeholder_row"}:
        return True
    if node.kind == "aggregate":
        # Grouping sets of nothing have no keys either, and a row each.
        return node.aggregate_mode in _WHOLE and "gby=[]," in tree.line
    if node.kind == "cross_join" or (
        node.kind in {"hash_join", "nested_loop_join"} and node.join_type in _ROW_BY_ROW_JOINS
    ):
        return all(map(_is_one_row_at_most, tree.children))
    if node.kind == "scalar_subquery" or node.kind in _NO_MORE_ROWS:
        return _is_one_row_at_most(tree.children[0])
    return False
