"""A query's result as text or in a file format, written while it arrives.

Holds one batch at a time; for Parquet one row group. What a result is called and where
it goes is the caller's business.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from decimal import Decimal
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, Final

import datafusion
import pyarrow as pa
from pyarrow import csv, parquet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["FORMATS", "format_of", "table_text", "write"]

FORMATS: Final = ("csv", "json", "parquet", "arrow")

_ROW_GROUP: Final = 1 << 20  # rows
_ROW_GROUP_BYTES: Final = 128 << 20


def format_of(extension: str) -> str | None:
    """The format that a file's extension stands for."""
    name = extension.lower().removeprefix(".")
    return "json" if name == "ndjson" else name if name in FORMATS else None


def write(
    kind: str,
    sink: IO[bytes],
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    *,
    seekable: bool = True,
) -> int:
    """Write ``batches`` to ``sink`` as ``kind``, one of ``FORMATS``; returns how many rows.

    JSON is one object per line. Arrow is the file format, or the stream format for a
    sink that is not ``seekable``. Raises ``ValueError`` for columns that the format has
    no place for, before anything is written.
    """
    schema = _plain_schema(schema, _json_type if kind == "json" else _plain_type)
    rows = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in batches:
            rows += batch.num_rows
            yield _as(batch, schema)

    match kind:
        case "csv":
            _write_csv(sink, schema, counted())
        case "json":
            _write_json(sink, schema, counted())
        case "parquet":
            with parquet.ParquetWriter(sink, schema) as writer:
                for group in _row_groups(schema, counted()):
                    writer.write_table(group)
        case "arrow":
            with (pa.ipc.new_file if seekable else pa.ipc.new_stream)(sink, schema) as writer:
                for batch in counted():
                    writer.write_batch(batch)
        case _:
            raise ValueError(f"no format {kind!r}; there are {', '.join(FORMATS)}")
    return rows


def table_text(schema: pa.Schema, batches: Iterable[pa.RecordBatch], most: int) -> tuple[str, int]:
    """The first ``most`` rows as DataFusion prints a table, and how many rows there are."""
    shown: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        if rows < most:
            shown.append(batch.slice(0, most - rows))
        rows += batch.num_rows
    if not rows:  # of which DataFusion shows no columns
        edge = "+".join(["", *("-" * (len(name) + 2) for name in schema.names), ""])
        return f"{edge}\n| {' | '.join(schema.names)} |\n{edge}", 0
    table = pa.Table.from_batches(shown)
    # Columns may share a name, which DataFusion allows in a result and not in a table.
    seen: Counter[str] = Counter()
    unique = []
    for name in table.column_names:
        unique.append(name + " " * seen[name])
        seen[name] += 1
    frame = datafusion.SessionContext().from_arrow(table.rename_columns(unique))
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        frame.show(most)
    return text.getvalue().removeprefix("DataFrame()\n").rstrip("\n"), rows


def _write_csv(sink: IO[bytes], schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    for field in schema:
        if pa.types.is_nested(field.type):
            raise ValueError(
                f"column {field.name} is a {field.type}, which CSV has no place for; "
                "write another format, such as json"
            )
    with csv.CSVWriter(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_json(sink: IO[bytes], schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"several columns are called {repeated[0]}, and a JSON object has one of each name; "
            "rename them with AS"
        )
    keys = [json.dumps(name, ensure_ascii=False) for name in schema.names]
    for batch in batches:
        columns = [column.to_pylist() for column in batch.columns]
        rows: Iterable[tuple[Any, ...]] = zip(*columns, strict=True)
        for row in rows:
            pairs = (f"{key}:{_json(value)}" for key, value in zip(keys, row, strict=True))
            sink.write(f"{{{','.join(pairs)}}}\n".encode())


def _json(value: Any) -> str:  # noqa: PLR0911  # one for each kind of value
    """JSON that loses nothing of a number and gives null where JSON has none."""
    match value:
        case None | bool():
            return json.dumps(value)
        case int() | str():
            return json.dumps(value, ensure_ascii=False)
        case float():
            return repr(value) if math.isfinite(value) else "null"
        case Decimal():
            return f"{value:f}"
        case bytes():
            return f'"{value.hex()}"'
        case dict():
            pairs = (f"{json.dumps(key)}:{_json(item)}" for key, item in value.items())
            return f"{{{','.join(pairs)}}}"
        case list() | tuple():  # a map is a list of pairs
            return f"[{','.join(map(_json, value))}]"
        case _:
            return json.dumps(str(value))


def _row_groups(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    group: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in chain(batches, [None]):
        if batch is not None:
            group.append(batch)
            rows += batch.num_rows
            size += batch.nbytes
        if group and (batch is None or rows >= _ROW_GROUP or size >= _ROW_GROUP_BYTES):
            yield pa.Table.from_batches(group, schema)
            group, rows, size = [], 0, 0


def _as(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """``batch`` in the types of ``schema``, column by column: names may repeat."""
    columns = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _plain_schema(schema: pa.Schema, plain: Callable[[pa.DataType], pa.DataType]) -> pa.Schema:
    # Nullable: a plan may be less sure of it than the query was.
    return pa.schema([pa.field(field.name, plain(field.type)) for field in schema])


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Without views and dictionaries, which few readers of files know."""
    return _rebuilt(kind, _plain_type)


def _json_type(kind: pa.DataType) -> pa.DataType:
    """The same, and times as text, for Python's own have no nanoseconds."""
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_date(kind):
        return pa.string()
    if pa.types.is_duration(kind):
        return pa.int64()
    return _rebuilt(kind, _json_type)


def _rebuilt(kind: pa.DataType, inner: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)
    if pa.types.is_dictionary(kind):
        plain = inner(kind.value_type)
    elif pa.types.is_list(kind):
        plain = pa.list_(inner(kind.value_type))
    elif pa.types.is_large_list(kind):
        plain = pa.large_list(inner(kind.value_type))
    elif pa.types.is_fixed_size_list(kind):
        plain = pa.list_(inner(kind.value_type), kind.list_size)
    elif pa.types.is_map(kind):
        plain = pa.map_(inner(kind.key_type), inner(kind.item_type))
    elif pa.types.is_struct(kind):
        plain = pa.struct([pa.field(field.name, inner(field.type)) for field in kind])
    return plain
