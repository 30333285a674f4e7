"""Compares the answers of two engines to one query: as multisets, floats with tolerance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

__all__ = ["difference"]

_RELATIVE: Final = 1e-9
_ABSOLUTE: Final = 1e-6
"""For sums of few small numbers, and square roots of their differences."""


def difference(answer: pa.Table, expected: pa.Table, *, ordered: bool = False) -> str:
    """How ``answer`` differs from ``expected``; empty when it does not.

    Names and types of the columns count, nullability does not: a plan may know more or
    less of it than another. The order of rows counts with ``ordered``.
    """
    answer.validate(full=True)
    shapes = [[(field.name, field.type) for field in t.schema] for t in (answer, expected)]
    if shapes[0] != shapes[1]:
        return f"columns {shapes[0]}, expected {shapes[1]}"
    got, wanted = (_rows(table) for table in (answer, expected))
    if len(got) != len(wanted):
        return f"{len(got)} rows, expected {len(wanted)}{_examples(got, wanted)}"
    if ordered:
        for place, (row, twin) in enumerate(zip(got, wanted, strict=True)):
            if not _close(row, twin):
                return f"row {place} is {row}, expected {twin}"
        return ""
    left, missing = _unmatched(got, wanted)
    return f"other rows{_examples(left, missing)}" if left else ""


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    columns = [column.to_pylist() for column in table.columns]
    return list(zip(*columns, strict=True)) if columns else [()] * table.num_rows


def _unmatched(
    got: Sequence[tuple[Any, ...]], wanted: Sequence[tuple[Any, ...]]
) -> tuple[list[Any], list[Any]]:
    """The rows of each side that have no twin on the other."""
    spelled = [Counter(map(repr, rows)) for rows in (got, wanted)]
    if spelled[0] == spelled[1]:
        return [], []
    left = list(_spelled_in(got, spelled[0] - spelled[1]))
    missing = list(_spelled_in(wanted, spelled[1] - spelled[0]))
    for row in list(left):
        twin = next((twin for twin in missing if _close(row, twin)), None)
        if twin is not None:
            left.remove(row)
            missing.remove(twin)
    return left, missing


def _spelled_in(rows: Sequence[tuple[Any, ...]], wanted: Counter[str]) -> Iterator[tuple[Any, ...]]:
    for row in rows:
        if wanted[repr(row)]:
            wanted[repr(row)] -= 1
            yield row


def _close(value: Any, other: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(value) == len(other) and all(map(_close, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_close(value[k], other[k]) for k in value)
    if isinstance(value, float) and isinstance(other, float):
        return (math.isnan(value) and math.isnan(other)) or math.isclose(
            value, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE
        )
    return bool(value == other)


def _examples(got: Sequence[Any], wanted: Sequence[Any], most: int = 5) -> str:
    left, missing = _unmatched(got, wanted) if len(got) != len(wanted) else (got, wanted)
    lines = [f"\n  + {row}" for row in left[:most]] + [f"\n  - {row}" for row in missing[:most]]
    return "".join(lines)
