"""DataFusion options: which the engine insists on, and how they travel.

A plan means the same in two processes only if both run it under the same options, and
some of DataFusion's defaults assume that one process runs the whole plan. Only options
are handled here; nothing is planned or run.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import datafusion

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BATCH_SIZE",
    "EXECUTION",
    "PLANNING",
    "SCALAR_SUBQUERIES",
    "check_travelled",
    "derive_context",
    "non_default_settings",
]

_INFORMATION_SCHEMA: Final = "datafusion.catalog.information_schema"
_TRAVELS: Final = "datafusion.execution."

SCALAR_SUBQUERIES: Final = "datafusion.optimizer.enable_physical_uncorrelated_scalar_subquery"
"""Whether they are nodes of a plan, and not joins."""

EXECUTION: Final[Mapping[str, str]] = {
    # Since DataFusion 54 the partitions of a scan share one queue of files: polling one
    # partition reads them all, and every other partition, or task, gets nothing.
    "datafusion.execution.enable_file_stream_work_stealing": "false",
}
"""For every session that decodes a plan."""

PLANNING: Final[Mapping[str, str]] = {
    **EXECUTION,
    # Such a filter is filled in by another part of the plan while it runs. Cut apart,
    # the part that waits for it is in another process.
    "datafusion.optimizer.enable_dynamic_filter_pushdown": "false",
    # What this tells a scan about the order to read in has no encoding.
    "datafusion.optimizer.enable_sort_pushdown": "false",
    # Joins are planned for two shuffles each. Whether one side is sent to every task
    # instead is decided from sizes that have been measured, not estimated.
    "datafusion.optimizer.hash_join_single_partition_threshold": "0",
    "datafusion.optimizer.hash_join_single_partition_threshold_rows": "0",
    # An InterleaveExec wants inputs that say how they are hashed. The files in which a
    # worker reads other stages do not say it.
    "datafusion.optimizer.prefer_existing_union": "true",
    # Its value is known only inside the node that uses it, which cannot be cut apart. A
    # join in its place does not tell when there is more than one: see _scalar_subqueries.
    SCALAR_SUBQUERIES: "false",
}
"""For the session that plans what is to be cut."""


BATCH_SIZE: Final[Mapping[str, str]] = {"datafusion.execution.batch_size": "32768"}
"""For tasks, unless the session has a batch size of its own.

Every batch of stage output passes through Python; four times DataFusion's own size is
where that no longer shows (``make tpch``).
"""


def derive_context(
    context: datafusion.SessionContext,
    settings: Mapping[str, str],
    runtime: datafusion.RuntimeEnvBuilder | None = None,
) -> datafusion.SessionContext:
    """A session of its own with the options of ``context`` and, over them, ``settings``.

    It shares no tables and functions with ``context``. Raises ``ValueError`` for an
    option that DataFusion does not know or a value it refuses.
    """
    config = context.copied_config()
    for name, value in settings.items():
        config = config.set(name, value)
    return datafusion.SessionContext(config, runtime)


def non_default_settings(context: datafusion.SessionContext) -> dict[str, str]:
    """The execution options in which ``context`` differs from a fresh session.

    These travel with a task: time zone, batch size, reader options and the like.
    """
    defaults = _defaults()
    return {
        name: value
        for name, value in _read(context).items()
        if name.startswith(_TRAVELS) and name not in EXECUTION and defaults.get(name) != value
    }


def check_travelled(settings: Mapping[str, str]) -> None:
    """Raise ``ValueError`` for options that ``non_default_settings`` would not have sent."""
    for name in settings:
        if not name.startswith(_TRAVELS):
            raise ValueError(f"{name} is not an option of how a plan is executed")


@functools.cache
def _defaults() -> Mapping[str, str]:
    return _read(datafusion.SessionContext())


def _read(context: datafusion.SessionContext) -> dict[str, str]:
    reader = derive_context(context, {_INFORMATION_SCHEMA: "true"})
    rows = reader.sql("SELECT name, value FROM information_schema.df_settings").to_pydict()
    return {
        name: value
        for name, value in zip(rows["name"], rows["value"], strict=True)
        if value is not None
    }
