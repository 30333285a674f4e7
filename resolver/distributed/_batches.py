"""Record batches on their way between processes: types, casts, row counts.

DataFusion reads strings as views, and a sliced view keeps its whole buffers alive: a
top-k of a thousand short rows would travel as hundreds of megabytes. So batches are
cast to plain strings and binaries before they are written or sent, and back to the
declared types before DataFusion reads them again, because its file scan insists on them.
"""

from __future__ import annotations

import pyarrow as pa

__all__ = ["cast_batch", "has_dictionary", "plain_schema"]


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """``schema`` with every view type, nested ones too, replaced by its plain twin."""
    fields = [_plain_field(field) for field in schema]
    return pa.schema(fields, metadata=schema.metadata)


def cast_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """``batch`` with the types of ``schema``, column by column.

    A batch that needs no cast is returned as it is. So is one without columns: it
    carries only a row count, which rebuilding it from its (zero) arrays would lose.
    Raises ``pyarrow.ArrowInvalid`` where a value does not fit.
    """
    if batch.schema.equals(schema, check_metadata=True) or batch.num_columns == 0:
        return batch
    if batch.num_columns != len(schema):
        raise pa.ArrowInvalid(f"expected {len(schema)} columns, got {batch.num_columns}")
    columns = [
        column if column.type.equals(field.type) else column.cast(field.type)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def has_dictionary(schema: pa.Schema) -> bool:
    """Whether any column, nested ones too, is dictionary-encoded."""
    return any(_has_dictionary(field.type) for field in schema)


def _children(type_: pa.DataType) -> list[pa.Field]:
    return [type_.field(index) for index in range(type_.num_fields)]


def _has_dictionary(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return True
    return any(_has_dictionary(child.type) for child in _children(type_))


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain_type(field.type))


def _plain_type(type_: pa.DataType) -> pa.DataType:  # noqa: PLR0911  # one line a type
    types = pa.types
    if types.is_string_view(type_):
        return pa.string()
    if types.is_binary_view(type_):
        return pa.binary()
    if types.is_dictionary(type_):
        return pa.dictionary(type_.index_type, _plain_type(type_.value_type), type_.ordered)
    if types.is_struct(type_):
        return pa.struct([_plain_field(child) for child in _children(type_)])
    if types.is_list(type_):
        return pa.list_(_plain_field(type_.value_field))
    if types.is_large_list(type_):
        return pa.large_list(_plain_field(type_.value_field))
    if types.is_fixed_size_list(type_):
        return pa.list_(_plain_field(type_.value_field), type_.list_size)
    if types.is_map(type_):
        return pa.map_(
            _plain_field(type_.key_field), _plain_field(type_.item_field), type_.keys_sorted
        )
    return type_
