"""Batches on their way to a file: views are compacted, names unique, row counts stay."""

from __future__ import annotations

import pyarrow as pa
import pytest

from resolver.distributed import _batches
from resolver.distributed._batches import (
    Compactor,
    cast_batch,
    has_dictionary,
    merged_schema,
    stored_schema,
)

VIEWS = {
    "string": pa.string_view(),
    "binary": pa.binary_view(),
    "list": pa.list_(pa.field("item", pa.string_view(), nullable=False)),
    "large list": pa.large_list(pa.string_view()),
    "fixed list": pa.list_(pa.string_view(), 2),
    "struct": pa.struct([pa.field("x", pa.string_view(), metadata={"k": "v"})]),
    "map": pa.map_(pa.string_view(), pa.list_(pa.string_view())),
    "dictionary": pa.dictionary(pa.int8(), pa.string_view()),
}
VALUES = {
    "string": ["a", None, "a long string that is not inlined"],
    "binary": [b"a", None, b"\x00" * 40],
    "list": [["a"], None, []],
    "large list": [["a", None], None, []],
    "fixed list": [["a", "b"], None, ["c", "d"]],
    "struct": [{"x": "a"}, None, {"x": None}],
    "map": [[("k", ["v"])], None, []],
    "dictionary": ["a", None, "a"],
}


def array(kind):
    if kind == "dictionary":
        indices = pa.array([0, None, 0], pa.int8())
        return pa.DictionaryArray.from_arrays(indices, pa.array(["a"], pa.string_view()))
    return pa.array(VALUES[kind], VIEWS[kind])


@pytest.mark.parametrize("kind", VIEWS)
def test_compacted_views_are_equal_and_of_the_same_type(kind, monkeypatch):
    monkeypatch.setattr(_batches, "_SMALL", -1)
    field = pa.field("c", VIEWS[kind], metadata={"kept": "yes"})
    declared = pa.schema([field, pa.field("n", pa.int64(), nullable=False)], metadata={"m": "1"})
    batch = pa.RecordBatch.from_arrays([array(kind), pa.array([1, 2, 3])], schema=declared)
    compacted = Compactor(declared).compacted(batch.slice(1))
    compacted.validate(full=True)
    assert compacted.schema.equals(declared, check_metadata=True)
    assert compacted.to_pylist() == batch.slice(1).to_pylist()


def test_other_types_are_left_alone():
    schema = pa.schema([("d", pa.decimal128(15, 2)), ("t", pa.timestamp("us", "UTC"))])
    batch = pa.RecordBatch.from_pylist([{"d": None, "t": None}], schema=schema)
    assert Compactor(schema).compacted(batch) is batch
    assert cast_batch(batch, schema) is batch


def test_a_batch_without_columns_keeps_its_row_count():
    batch = pa.RecordBatch.from_struct_array(pa.array([{}] * 5, pa.struct([])))
    assert Compactor(batch.schema).compacted(batch).num_rows == 5
    assert cast_batch(batch, pa.schema([], metadata={"other": "schema"})).num_rows == 5


def test_a_slice_of_views_does_not_drag_its_buffers_along():
    long = pa.array(["x" * 100] * 100_000, pa.string_view())
    batch = pa.record_batch({"s": long}).slice(7, 10)

    def written(batch):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().size

    assert written(batch) > 1_000_000, "pyarrow writes only what is shown now: no need to compact"
    assert written(Compactor(batch.schema).compacted(batch)) < 10_000


def test_repeated_names_become_unique_in_files():
    schema = pa.schema([("a", pa.int8()), ("b", pa.int8()), ("a", pa.int8()), ("a#2", pa.int8())])
    stored = stored_schema(schema)
    assert len(set(stored.names)) == 4
    assert stored.names[:2] == ["a", "b"]
    assert stored.names[3] == "a#2"
    batch = pa.RecordBatch.from_arrays([pa.array([n], pa.int8()) for n in range(4)], schema=schema)
    compacted = Compactor(schema).compacted(batch)
    assert compacted.schema == stored
    assert [column[0].as_py() for column in compacted.columns] == [0, 1, 2, 3]
    assert stored_schema(stored) is stored


def test_schemas_are_merged_to_what_allows_nulls():
    strict = pa.schema([pa.field("a", pa.int64(), nullable=False)])
    loose = pa.schema([pa.field("a", pa.int64())])
    assert merged_schema([strict, loose]) == loose
    assert merged_schema([strict, strict]) == strict
    with pytest.raises(ValueError, match="type of a"):
        merged_schema([strict, pa.schema([("a", pa.string())])])
    with pytest.raises(ValueError, match="columns"):
        merged_schema([strict, pa.schema([("b", pa.int64())])])


def test_another_number_of_columns_is_refused():
    with pytest.raises(pa.ArrowInvalid, match="expected 2 columns, got 1"):
        cast_batch(pa.record_batch({"a": [1]}), pa.schema([("a", pa.int64()), ("b", pa.int64())]))


def test_dictionaries_are_found_wherever_they_are():
    dictionary = pa.dictionary(pa.int32(), pa.string())
    assert has_dictionary(pa.schema([("a", pa.int64()), ("l", pa.list_(dictionary))]))
    assert not has_dictionary(pa.schema([("l", pa.list_(pa.string()))]))
