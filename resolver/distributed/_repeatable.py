"""Whether a stage that is run again gives the same rows, each in the same partition.

Most do, and some only nearly: which rows a LIMIT lets pass, what ``random()`` gives, and the
last digits of a sum of floats depend on what came first. It matters to results of which
a part has been read already: what is lost then may be made again only if it is the same.
Nothing is run here, and what is not known to be repeatable is not.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import datafusion

from ._plan_proto import AggregateMode

if TYPE_CHECKING:
    from ._tree import Tree

__all__ = ["has_limit", "is_repeatable"]

# Of each row, or of all rows with its keys, whatever the order.
_ANY_ORDER: Final = frozenset(
    {
        "buffer",
        "coalesce_batches",
        "coalesce_partitions",
        "cooperative",
        "cross_join",
        "empty",
        "filter",
        "hash_join",
        "memory_scan",
        "nested_loop_join",
        "placeholder_row",
        "projection",
        "repartition",
        "sort",
        "sort_merge_join",
        "sort_preserving_merge",
        "stage_input",
        "union",
        "unnest",
    }
)
_LIMITS: Final = ("fetch=", "limit=", "lim=[")
_ABOVE_PARTIAL: Final = frozenset({"coalesce_batches", "cooperative", "repartition"})


def is_repeatable(tree: Tree, *, may_group: bool = False) -> bool:
    """Whether ``tree``, over the same inputs, gives the same rows in the same partitions.

    With ``may_group``, what it computes of each group may differ, as long as the groups do
    not: whoever reads it puts every group together, and needs it for nothing else.
    """
    if may_group:
        top = tree
        while top.kind in _ABOVE_PARTIAL:
            (top,) = top.children
        if top.node.aggregate_mode == AggregateMode.PARTIAL:
            may_differ = has_limit(top) or not _calls_nothing_else(top)
            return not may_differ and is_repeatable(top.children[0])
    return all(_is_repeatable_node(below) for below in tree.walk())


def has_limit(tree: Tree) -> bool:
    """Whether a node may count rows. A limit may stand in any; a path may look like one."""
    return tree.node.fetch is not None or any(word in tree.line for word in _LIMITS)


def _is_repeatable_node(tree: Tree) -> bool:
    if has_limit(tree) or not _calls_nothing_else(tree):
        return False
    if tree.kind == "aggregate":
        return tree.node.is_exact_aggregate
    return tree.kind in _ANY_ORDER or tree.node.is_scan


def _calls_nothing_else(tree: Tree) -> bool:
    """Whether all functions it calls are DataFusion's own, and give the same for the same."""
    return tree.node.scalar_functions <= _deterministic()


@functools.cache
def _deterministic() -> frozenset[str]:
    config = datafusion.SessionConfig().with_information_schema(True)
    found = datafusion.SessionContext(config).sql(
        "SELECT routine_name AS name, is_deterministic AS same FROM information_schema.routines"
    )
    routines = [(row["name"], row["same"]) for row in found.to_pylist()]
    names = {name for name, same in routines if same}
    return frozenset(names - {name for name, same in routines if not same})
