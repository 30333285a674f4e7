"""The 22 TPC-H queries, their data and their right answers, from DuckDB's tpch extension.

The extension is inside the package ``duckdb-extension-tpch``; nothing is downloaded. The
answers share no code with what is judged. They hold for data that the same extension
made: other generators give the same numbers and, allowed by TPC-H, other addresses and
comments, which five of the answers show.
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import duckdb_extension_tpch
import pyarrow as pa

TABLES = ("customer", "lineitem", "nation", "orders", "part", "partsupp", "region", "supplier")

RELATIVE_TOLERANCE = 1e-9
"""Of floating-point results: sums come in another order on another number of partitions."""

_NULL = ("", "NULL")

Row = tuple[object, ...]


@functools.cache
def queries() -> Mapping[int, str]:
    """The texts by their numbers, 1 to 22."""
    return dict(_ask("SELECT query_nr, rtrim(trim(query), ';') FROM tpch_queries()"))


@functools.cache
def answers(scale_factor: float) -> Mapping[int, str]:
    """What ``differences`` wants, by query; empty but for scale factors 0.01, 0.1 and 1."""
    known = "SELECT query_nr, answer FROM tpch_answers() WHERE scale_factor = ?"
    return dict(_ask(known, scale_factor))


def differences(table: pa.Table, answer: str | pa.Table) -> list[str]:
    """What is wrong with ``table``: nothing if it has the rows of ``answer`` in its order.

    Rows that agree in some number may have changed places, for the queries order by some
    columns only. Numbers are equal within ``RELATIVE_TOLERANCE``, other values exactly.
    """
    got = _normal(table)
    wanted = _parsed(answer, table.schema) if isinstance(answer, str) else _normal(answer)
    if len(got) != len(wanted):
        return [f"{len(got)} rows instead of {len(wanted)}"]
    if all(map(_same, got, wanted)):
        return []
    pairs = zip(sorted(got, key=_order), sorted(wanted, key=_order), strict=True)
    found = [f"{a} instead of {b}" for a, b in pairs if not _same(a, b)]
    if not found and not all(map(_ties, got, wanted)):
        found = ["the right rows in another order"]
    return found


def generate(scale_factor: float, folder: Path, *, parts: int) -> None:
    """Make the tables as Parquet files, ``parts`` per table, one directory each.

    Takes its name only when complete: a ``folder`` that exists is whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        fresh = Path(parent, "data")
        with _connected(Path(parent, "tpch.duckdb")) as connection:
            connection.execute("CALL dbgen(sf = ?)", [scale_factor])
            for (table,) in connection.execute("SHOW TABLES").fetchall():
                fresh.joinpath(table).mkdir(parents=True)
                (rows,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
                for part in range(min(parts, rows)):
                    first, end = rows * part // parts, rows * (part + 1) // parts
                    connection.execute(
                        f"COPY (FROM {table} WHERE rowid >= {first} AND rowid < {end}) "
                        f"TO '{fresh / table / f'{part}.parquet'}' (FORMAT parquet)"
                    )
        fresh.rename(folder)


@contextlib.contextmanager
def _connected(database: Path | str = ":memory:") -> Iterator[duckdb.DuckDBPyConnection]:
    extension = next(Path(duckdb_extension_tpch.__file__).parent.rglob("*.duckdb_extension"))
    options = {"allow_unsigned_extensions": "true"}
    with duckdb.connect(str(database), config=options) as connection:
        connection.execute(f"LOAD '{extension}'")
        yield connection


def _ask(query: str, *parameters: object) -> list[tuple[int, str]]:
    with _connected() as connection:
        return connection.execute(query, parameters).fetchall()


def _normal(table: pa.Table) -> list[Row]:
    columns = [column.to_pylist() for column in table.columns]
    return [tuple(map(_plain, row)) for row in zip(*columns, strict=True)]


def _plain(value: object) -> object:
    """Numbers as floats; all else as text."""
    if value is None:
        return None
    return float(value) if isinstance(value, numbers.Number) else str(value)


def _parsed(answer: str, schema: pa.Schema) -> list[Row]:
    """The rows of a text with a heading and bars between values."""
    lines = answer.splitlines()[1:]
    numeric = [_is_number(kind) for kind in schema.types]
    return [
        tuple(
            None if text in _NULL else float(text) if number else text
            for text, number in zip(line.split("|"), numeric, strict=True)
        )
        for line in lines
    ]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _same(one: Row, other: Row) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-6)
    return one == other


def _ties(one: Row, other: Row) -> bool:
    return any(
        isinstance(value, float) and _equal(value, twin)
        for value, twin in zip(one, other, strict=True)
    )


def _order(row: Row) -> tuple[Sequence[str], Sequence[float]]:
    """Numbers last: they are the ones that may differ a little."""
    texts = [str(value) for value in row if not isinstance(value, float)]
    return texts, [value for value in row if isinstance(value, float)]
