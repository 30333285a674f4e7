"""Random queries of joins within groups within windows, on few keys that contain each other.

Where one node is divided by (a) and the next could be by (a, b), a planner that divides
rows anew must not break what a third node relies on. These queries are dense in such
places; types and expressions are ``random_sql``'s business. All have the columns a, b, c
and integers only, so answers are exact.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet

__all__ = ["TABLES", "nested_query", "partner_query", "write_tables"]

TABLES: Final = {"t": (600, 3), "u": (40, 2), "v": (90, 1), "w": (15, 5), "e": (0, 1)}
"""Name to rows and files."""

_JOINS: Final = (
    *["JOIN"] * 4,
    "LEFT JOIN",
    "RIGHT JOIN",
    "FULL JOIN",
    "LEFT SEMI JOIN",
    "LEFT ANTI JOIN",
    "RIGHT SEMI JOIN",
    "RIGHT ANTI JOIN",
)
_KEYS: Final = (
    "x.a = y.a",
    "x.a = y.a AND x.b = y.b",
    "x.b = y.b AND x.a = y.a",
    "x.a = y.b",
    "(x.a IS NOT DISTINCT FROM y.a)",
)
_JOINED: Final = (
    "x.a, x.b, y.c",
    "y.a, x.b, x.c",
    "x.a, y.b, x.c + y.c AS c",
    "y.a, y.b, x.c",
)


def write_tables(folder: Path) -> None:
    """Every table as a directory of Parquet files under ``folder``."""
    rng = random.Random(0)
    keys = [*range(12), None]
    for name, (rows, files) in TABLES.items():
        table = pa.table(
            {
                "a": pa.array(rng.choices(keys, k=rows), pa.int64()),
                "b": pa.array(rng.choices(keys, k=rows), pa.int64()),
                "c": pa.array(rng.choices(range(6), k=rows), pa.int64()),
            }
        )
        (folder / name).mkdir()
        for index in range(files):
            low, high = index * rows // files, (index + 1) * rows // files
            pyarrow.parquet.write_table(
                table.slice(low, high - low), folder / name / f"{index}.parquet"
            )


def nested_query(rng: random.Random, depth: int = 3) -> str:
    query = f"SELECT a, b, c FROM {_relation(rng, depth)}"
    # Which rows those are is not said; how many there are is.
    return rng.choice([query] * 4 + [f"SELECT count(*) FROM ({query} LIMIT 5)"])


def partner_query(rng: random.Random) -> str:
    """Rows of a selective side with or without a partner on a side that is shuffled."""
    x = f"(SELECT * FROM {rng.choice('tuv')} WHERE {rng.choice(['c = 0', 'b < 3', 'c + b < 3'])})"
    # A relation of some depth, so that the other side is not read from a table as it is.
    y = _relation(rng, rng.randrange(3))
    on = rng.choice(_KEYS) + rng.choice(["", "", "", " AND x.c < y.c"])
    kind = rng.choice(["SEMI", "ANTI", "MARK"])
    if kind == "MARK":
        return f"SELECT * FROM {x} x WHERE c = 5 OR EXISTS (SELECT 1 FROM {y} y WHERE {on})"
    return f"SELECT x.* FROM {x} x LEFT {kind} JOIN {y} y ON {on}"


def _relation(rng: random.Random, depth: int) -> str:
    form = rng.randrange(10)
    if depth == 0 or form < 3:
        return rng.choice("tttuuvvwwe")
    x = _relation(rng, depth - 1)
    if form < 7:
        return f"({_join(rng, x, _relation(rng, depth - 1))})"
    if form == 7:
        aggregate = rng.choice(["count(*)", "sum(c)", "max(c)", "count(DISTINCT c)"])
        return f"(SELECT a, b, {aggregate} AS c FROM {x} x GROUP BY a, b)"
    if form == 8:
        second = rng.choice(["max(b)", "count(DISTINCT b)"])
        return rng.choice(
            [
                f"(SELECT a, {second} AS b, sum(c) AS c FROM {x} x GROUP BY a)",
                f"(SELECT DISTINCT a, b, c FROM {x} x)",
            ]
        )
    keys = rng.choice(["a", "a, b", "b, a", "b"])
    y = _relation(rng, depth - 1)
    return rng.choice(
        [
            f"(SELECT a, b, sum(c) OVER (PARTITION BY {keys}) AS c FROM {x} x)",
            f"(SELECT a, b, count(*) OVER (PARTITION BY {keys} ORDER BY c) AS c FROM {x} x)",
            f"(SELECT a, b, c FROM {x} x ORDER BY a, b, c LIMIT 9 OFFSET 2)",
            f"(SELECT a, b, c FROM {x} x WHERE {rng.choice(['c < 0', 'a = 3', 'c = 1'])})",
            f"(SELECT a, b, c FROM {x} x UNION ALL SELECT a, b, c FROM {y} y)",
            f"(SELECT a, b, c FROM {x} x WHERE a NOT IN (SELECT b FROM {y} y))",
            f"(SELECT a, b, c FROM {x} x WHERE a IN (SELECT b FROM {y} y) OR c > 3)",
        ]
    )


def _join(rng: random.Random, x: str, y: str) -> str:
    join = rng.choice(_JOINS)
    on = rng.choice(_KEYS) + rng.choice(["", "", "", " AND x.c < y.c"])
    columns = rng.choice(_JOINED)
    if "SEMI" in join or "ANTI" in join:
        side = "x" if join.startswith("LEFT") else "y"
        columns = f"{side}.a, {side}.b, {side}.c"
    return f"SELECT {columns} FROM {x} x {join} {y} y ON {on}"
