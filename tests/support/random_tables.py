"""Random small tables of every column type and source, for queries to run over.

Files are slow to write and queries are not, so a run has a fixed pool of table sets, each
made from its number alone; 0 is the smallest, so a failing query shrinks towards it. The
sets differ in their rows, never in names and types. What queries look like is
``random_sql``'s.
"""

from __future__ import annotations

import datetime as dt
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import datafusion
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

__all__ = ["KINDS", "SETS", "TABLES", "VIEWS", "Column", "Table", "TableSet", "View"]

UTC: Final = dt.UTC
DAY: Final = dt.date(2024, 2, 28)
NOON: Final = dt.datetime(2024, 2, 28, 12, 30)  # noqa: DTZ001  # a type of its own

KINDS: Final[dict[str, Sequence[Any]]] = {
    "int": (0, 1, 2, 3, 5, 7, 9, 100, -1, -128),
    "unsigned": (0, 1, 2, 3, 200, 255),
    "huge": (0, 1, 2**63, 2**64 - 1),
    "float": (0.0, -0.0, 0.5, 1.0, -1.5, 1e9, float("nan"), float("inf"), float("-inf")),
    "decimal": tuple(map(Decimal, ("0.00", "1.50", "-1.50", "99.99", "1000000.01"))),
    "bool": (True, False),
    "text": ("a", "b", "", "ab", "A%", "äß", "a longer text than fits into a view"),
    "fixed": (b"ab", b"\xff\x00"),
    "bytes": (b"", b"\x00", b"\xff\x00", b"ab"),
    "date": tuple(DAY + dt.timedelta(days=d) for d in (0, 1, 2, 366, -20_000)),
    "time": (dt.time(0), dt.time(12, 30), dt.time(23, 59, 59, 999_999)),
    "clock": (dt.time(0), dt.time(12, 30)),
    "stamp": tuple(NOON + dt.timedelta(hours=h) for h in (0, 1, 24, 8784, -500_000)),
    "zoned": tuple((NOON + dt.timedelta(hours=h)).replace(tzinfo=UTC) for h in (0, 1, 24, 8784)),
    "span": tuple(dt.timedelta(seconds=s) for s in (0, 1, 3600, -5)),
    "list": ([], [1], [1, 2, None], [None], [3, 3]),
    "struct": ({"a": 1, "b": "x"}, {"a": None, "b": "x"}, {"a": 2, "b": None}),
    "map": ([], [("a", 1)], [("a", 1), ("b", None)]),
}
"""What the columns of a kind hold. Columns of one kind can be compared with each other."""


@dataclass(frozen=True)
class Column:
    """``kind`` is one of ``KINDS``; ``type`` how the table stores it."""

    name: str
    kind: str
    type: pa.DataType


@dataclass(frozen=True)
class Table:
    """``sizes`` are shares of a set's rows, one for each file or partition."""

    name: str
    source: str
    sizes: tuple[float, ...]
    columns: tuple[Column, ...]

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(column.name, column.type) for column in self.columns])


def _columns(**types: tuple[str, pa.DataType]) -> tuple[Column, ...]:
    return tuple(Column(name, *pair) for name, pair in types.items())


_ID: Final = ("int", pa.int64())
_KEY: Final = ("int", pa.int32())

TABLES: Final = (
    Table(
        "facts",
        "parquet",
        (0.1, 0.0, 0.7, 0.2),
        _columns(
            id=_ID,
            k=_KEY,
            s=("text", pa.string()),
            b=("bool", pa.bool_()),
            m=("decimal", pa.decimal128(9, 2)),
            d=("date", pa.date32()),
            f=("float", pa.float64()),
            ts=("stamp", pa.timestamp("us")),
            i8=("int", pa.int8()),
            i16=("int", pa.int16()),
            u8=("unsigned", pa.uint8()),
            u16=("unsigned", pa.uint16()),
            u32=("unsigned", pa.uint32()),
            u64=("huge", pa.uint64()),
            f32=("float", pa.float32()),
            wide=("decimal", pa.decimal128(30, 2)),
            y=("text", pa.dictionary(pa.int32(), pa.string())),
            ls=("text", pa.large_string()),
            x=("bytes", pa.binary()),
            tm=("time", pa.time64("us")),
            tz=("zoned", pa.timestamp("us", "UTC")),
            dur=("span", pa.duration("us")),
            l=("list", pa.list_(pa.int32())),
            st=("struct", pa.struct([("a", pa.int32()), ("b", pa.string())])),
            mp=("map", pa.map_(pa.string(), pa.int32())),
        ),
    ),
    Table(
        "dims",
        "parquet",
        (0.5, 0.1),
        _columns(
            id=_ID,
            k=_KEY,
            s=("text", pa.string()),
            u8=("unsigned", pa.uint8()),
            m=("decimal", pa.decimal128(12, 2)),
            d=("date", pa.date32()),
            ts=("stamp", pa.timestamp("ns")),
            fx=("fixed", pa.binary(2)),
        ),
    ),
    Table(
        "parts",
        "hive",
        (0.3, 0.1, 0.0),
        _columns(
            id=_ID,
            k=_KEY,
            s=("text", pa.string()),
            u64=("huge", pa.uint64()),
            p=("text", pa.string()),
        ),
    ),
    Table(
        "notes",
        "memory",
        (0.1, 0.0, 0.4),
        _columns(
            id=_ID,
            k=_KEY,
            s=("text", pa.string()),
            f=("float", pa.float64()),
            l=("list", pa.list_(pa.int32())),
            tz=("zoned", pa.timestamp("ms", "+02:00")),
        ),
    ),
    Table(
        "lines",
        "csv",
        (0.2, 0.0, 0.2),
        _columns(
            id=_ID, k=_KEY, s=("text", pa.string()), d=("date", pa.date32()), b=("bool", pa.bool_())
        ),
    ),
    Table(
        "docs",
        "json",
        (0.3, 0.1),
        _columns(
            id=_ID,
            k=_KEY,
            s=("text", pa.string()),
            st=("struct", pa.struct([("a", pa.int32()), ("b", pa.string())])),
        ),
    ),
    Table(
        "pages",
        "arrow",
        (0.2, 0.2),
        _columns(id=_ID, k=_KEY, s=("text", pa.large_string()), tm=("clock", pa.time32("ms"))),
    ),
    Table("nothing", "parquet", (0.0, 0.0), _columns(id=_ID, k=_KEY, s=("text", pa.string()))),
)
"""``id`` is unique and never NULL; ``k`` has few values, one of them frequent, and NULLs."""

SETS: Final = (5, 24, 60, 0)
"""Rows of ``facts`` in each set, roughly. The last has no rows at all."""


@dataclass(frozen=True)
class View:
    """A view over the tables; ``kinds`` are its columns by name and kind."""

    name: str
    query: str
    kinds: tuple[tuple[str, str], ...]


VIEWS: Final = (
    View(
        "joined",
        "SELECT facts.id AS i, facts.k, dims.s, dims.m FROM facts "
        "LEFT JOIN dims ON facts.k = dims.k AND dims.id < 4",
        (("i", "int"), ("k", "int"), ("s", "text"), ("m", "decimal")),
    ),
    View(
        "grouped",
        "SELECT k, count(*) AS n, min(s) AS s FROM facts GROUP BY k",
        (("k", "int"), ("n", "int"), ("s", "text")),
    ),
)


class TableSet:
    """The tables of one number, written under ``folder`` when it is made."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self._folder = folder
        self._batches = {table.name: _batches(table, number) for table in TABLES}
        for table in TABLES:
            if table.source != "memory":
                _write(table, self._batches[table.name], folder / table.name)

    def register(self, session: datafusion.SessionContext) -> None:
        """Register every table and view in ``session``."""
        for table in TABLES:
            path, schema = self._folder / table.name, table.schema
            match table.source:
                case "parquet":  # with the types DataFusion itself infers: views, for one
                    session.register_parquet(table.name, path)
                case "hive":
                    columns = pa.schema([field for field in schema if field.name != "p"])
                    session.register_parquet(
                        table.name, path, table_partition_cols=[("p", pa.string())], schema=columns
                    )
                case "csv":
                    session.register_csv(table.name, path, schema=schema)
                case "json":
                    session.register_json(table.name, path, schema=schema, file_extension=".json")
                case "arrow":
                    session.register_arrow(table.name, path, schema=schema)
                case "memory":
                    batches = self._batches[table.name]
                    session.register_record_batches(table.name, [[batch] for batch in batches])
        for view in VIEWS:
            session.sql(f"CREATE VIEW {view.name} AS {view.query}").collect()

    def describe(self) -> str:
        """How to make these tables again, and how many rows there are."""
        rows = {name: [len(b) for b in batches] for name, batches in self._batches.items()}
        return f"TableSet({self.number}, folder), rows per file or partition: {rows}"


def _batches(table: Table, number: int) -> list[pa.RecordBatch]:
    """One batch for each file. Text seeds a generator the same way in every process."""
    chance = random.Random(f"{table.name} {number}")
    batches, first = [], 0
    for share in table.sizes:
        count = round(share * SETS[number])
        rows = range(first, first + count)
        first += count
        arrays = [_array(column, rows, chance) for column in table.columns]
        batches.append(pa.record_batch(arrays, schema=table.schema))
    return batches


def _array(column: Column, rows: range, chance: random.Random) -> pa.Array:
    if column.name == "id":
        return pa.array(rows, column.type)
    if column.name == "k":
        values: Sequence[Any] = (1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7, None, None)
    else:
        values = (*KINDS[column.kind], None, None)
    return pa.array([chance.choice(values) for _ in rows], column.type)


def _write(table: Table, batches: Sequence[pa.RecordBatch], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, batch in enumerate(batches):
        rows = pa.Table.from_batches([batch])
        match table.source:
            case "parquet":
                pyarrow.parquet.write_table(rows, folder / f"{number}.parquet")
            case "hive":
                path = folder / ("p=a", "p=b")[number % 2] / f"{number}.parquet"
                path.parent.mkdir(exist_ok=True)
                pyarrow.parquet.write_table(rows.drop_columns(["p"]), path)
            case "csv":
                pyarrow.csv.write_csv(rows, folder / f"{number}.csv")
            case "json":
                lines = [json.dumps(row) + "\n" for row in rows.to_pylist()]
                (folder / f"{number}.json").write_text("".join(lines))
            case "arrow":
                with pa.ipc.new_file(folder / f"{number}.arrow", batch.schema) as writer:
                    writer.write_batch(batch)
