"""Whether workers would read the text files of a query as this process does.

The physical encoding of a CSV or JSON scan drops reader options without a word: a worker
would take the default instead and read other rows. The options are known to the logical
plan, so that is asked here. Only text files are judged; where a scan's files are, and
everything else about a plan, is the planner's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ._logical_proto import TextScan, parse_text_scan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import datafusion
    from datafusion.plan import LogicalPlan

    from ._plan_proto import PlanNode

__all__ = ["refused_source"]

# What a physical scan carries.
_CARRIED: Final = {
    "csv": frozenset(
        {
            "comment",
            "delimiter",
            "escape",
            "has_header",
            "newlines_in_values",
            "quote",
            "truncated_rows",
        }
    ),
    "json": frozenset[str](),
}
# What has done its work once the schema is known, or matters to a writer only.
_NOT_FOR_READING: Final = frozenset(
    {
        "compression_level",
        "date_format",
        "datetime_format",
        "double_quote",
        "ignore_leading_whitespace",
        "ignore_trailing_whitespace",
        "null_regex",
        "null_value",
        "quote_style",
        "schema_infer_max_rec",
        "time_format",
        "timestamp_format",
        "timestamp_tz_format",
    }
)
_TEXT_SCANS: Final[Mapping[str, str]] = {"csv_scan": "csv", "json_scan": "json"}


def refused_source(frame: datafusion.DataFrame, plan: PlanNode) -> str | None:
    """Why workers would misread a text file of ``plan``, the physical plan of ``frame``.

    ``None`` if they would not. ``frame`` must be of the very session that planned
    ``plan``. It costs another optimization of the query, and only if ``plan`` reads text.
    Whatever cannot be told for certain is refused.
    """
    planned = sorted(_TEXT_SCANS[node.kind] for node in plan.walk() if node.kind in _TEXT_SCANS)
    if not planned:
        return None
    scans = list(_text_scans(frame.optimized_logical_plan()))
    for scan in scans:
        for name, value in sorted(scan.options.items()):
            if name not in _CARRIED[scan.format] | _NOT_FOR_READING:
                return (
                    f"it reads {scan.format.upper()} with {name.replace('_', ' ')} {value!r}, "
                    "which a plan does not tell workers"
                )
    # A subquery that is still part of an expression hides its tables from the walk.
    if planned != sorted(scan.format for scan in scans):
        return "it reads text files, with options that cannot all be told"
    return None


def _text_scans(plan: LogicalPlan) -> Iterator[TextScan]:
    waiting = [plan]
    while waiting:
        node = waiting.pop()
        inputs = node.inputs()
        waiting.extend(inputs)
        if not inputs:
            try:
                scan = parse_text_scan(node.to_bytes())
            except Exception:  # noqa: BLE001, S112  # no encoding: no table of files
                continue
            if scan is not None:
                yield scan
