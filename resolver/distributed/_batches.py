"""Record batches on their way to a file: types, names, casts, row counts.

DataFusion reads strings as views, and a sliced view keeps its whole buffers alive: a
top-k of a thousand short rows would be written as hundreds of megabytes. So the views of
a batch are rebuilt before it is written. Their types stay: DataFusion's file scan insists
on the types that a plan declares. Names may change: that scan finds columns by name, and
a join may have two of one name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "Compactor",
    "cast_batch",
    "checked",
    "has_dictionary",
    "merged_schema",
    "stored_schema",
]

_SMALL: Final = 1 << 12  # bytes per column that are not worth a copy


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """``schema`` with names that are unique; the schema itself if they are."""
    names = unique_names(schema.names)
    if names == schema.names:
        return schema
    fields = [field.with_name(name) for field, name in zip(schema, names, strict=True)]
    return pa.schema(fields, metadata=schema.metadata)


def unique_names(names: Sequence[str]) -> list[str]:
    """``names`` with every repeated one followed by its position."""
    seen: set[str] = set()
    unique = []
    for index, name in enumerate(names):
        new = name
        while new in seen or (new != name and new in names):
            new = f"{new}#{index}"
        seen.add(new)
        unique.append(new)
    return unique


def merged_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The schema that tasks of one stage have in common, nullable where any of them is.

    Raises ``ValueError`` if they differ in more.
    """
    first, *others = schemas
    for other in others:
        if other.names != first.names:
            raise ValueError("they disagree about their columns")
        fields = [_merged_field(a, b) for a, b in zip(first, other, strict=True)]
        first = pa.schema(fields, metadata=first.metadata)
    return first


def _merged_field(one: pa.Field, other: pa.Field) -> pa.Field:
    if one.type != other.type:
        raise ValueError(f"they disagree about the type of {one.name}: {one.type}, {other.type}")
    return one.with_nullable(one.nullable or other.nullable)


class Compactor:
    """Makes batches fit to be stored under ``schema``: of their own types, views compacted.

    Made once per stream, for its first batch's schema: what a column needs is found out
    then.
    """

    def __init__(self, declared: pa.Schema) -> None:
        self.declared: Final = declared
        self.schema: Final = stored_schema(declared)
        self._renames = self.schema is not declared
        self._views: Final = [
            (index, plain)
            for index, field in enumerate(declared)
            for plain in [_plain_type(field.type)]
            if plain != field.type
        ]

    def compacted(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """``batch`` with views that hold no more than they show.

        A batch without columns carries only a row count, which rebuilding it would lose.
        """
        if not (self._views or self._renames) or batch.num_columns == 0:
            return batch
        columns = batch.columns
        for index, plain in self._views:
            column = columns[index]
            if column.get_total_buffer_size() > _SMALL:
                columns[index] = column.cast(plain).cast(column.type)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


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


def checked(reader: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches of a ``reader`` of bytes that may come from a stranger.

    DataFusion must not be given such bytes: it ends the process where they ask for more
    memory than there is. Raises ``pyarrow.ArrowException`` or ``OSError``.
    """
    for batch in reader:
        batch.validate(full=True)
        yield batch


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
