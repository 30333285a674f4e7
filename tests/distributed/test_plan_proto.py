"""DataFusion's plan encoding: what is not known survives, what is edited is right."""

from __future__ import annotations

import random
from pathlib import Path

import duckdb
import duckdb_extension_tpch
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datafusion import ExecutionPlan, SessionContext, col, udf

from resolver.distributed._plan_proto import (
    AggregateMode,
    FileEntry,
    JoinType,
    PlanDecodeError,
    PlanNode,
    python_functions,
)
from resolver.distributed._settings import EXECUTION
from tests.support.distributed import configured, rows


def tpch_queries() -> list[tuple[int, str]]:
    extension = next(Path(duckdb_extension_tpch.__file__).parent.rglob("*.duckdb_extension"))
    with duckdb.connect(config={"allow_unsigned_extensions": "true"}) as connection:
        connection.execute(f"LOAD '{extension}'")
        return connection.execute("SELECT query_nr, query FROM tpch_queries()").fetchall()


def encoded(session: SessionContext, query: str) -> tuple[ExecutionPlan, PlanNode]:
    plan = session.sql(query).execution_plan()
    return plan, PlanNode.parse(plan.to_bytes(session))


def decoded(session: SessionContext, node: PlanNode) -> ExecutionPlan:
    return ExecutionPlan.from_bytes(session, node.to_bytes())


@pytest.mark.parametrize(("number", "query"), tpch_queries())
def test_every_byte_that_is_not_known_survives(planning, number, query):
    plan, node = encoded(planning, query)
    assert decoded(planning, node).display_indent() == plan.display_indent()


@pytest.mark.parametrize(("number", "query"), tpch_queries())
def test_the_shape_is_the_one_datafusion_shows(planning, number, query):
    def shape(plan):
        return [shape(child) for child in plan.children()]

    def node_shape(node):
        return [node_shape(child) for child in node.children]

    plan, node = encoded(planning, query)
    assert node_shape(node) == shape(plan)
    assert "unknown" not in {below.kind for below in node.walk()}


@pytest.mark.parametrize("data", [b"\xff" * 50, b"\x22\x7fgarbage", b"\x0a\x05\x0a"])
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(PlanDecodeError, match="physical plan"):
        PlanNode.parse(data)


def test_a_node_of_no_known_kind_is_unknown_and_kept():
    future_node = b"\xa2\x06\x02\x08\x01"  # field 100, a message of one integer
    node = PlanNode.parse(future_node)
    assert (node.kind, node.children) == ("unknown", ())
    assert node.to_bytes() == future_node


def test_a_zero_that_was_written_is_written_back(planning):
    _, node = encoded(planning, "SELECT l_shipmode, count(*) FROM lineitem GROUP BY 1 LIMIT 0")
    assert PlanNode.parse(node.to_bytes()).to_bytes() == node.to_bytes()


def test_a_scan_can_be_cut_down_to_some_of_its_groups(planning):
    _, scan = encoded(planning, "SELECT l_orderkey FROM lineitem")
    assert scan.is_scan
    assert scan.file_groups == 3

    def keys(node):
        part = decoded(planning, node)
        return [
            batch.to_pyarrow().column(0).to_pylist()
            for index in range(part.partition_count)
            for batch in planning.execute(part, index)
        ]

    whole = sorted(key for batch in keys(scan) for key in batch)
    parts = [
        key for group in range(3) for batch in keys(scan.with_file_groups([group])) for key in batch
    ]
    assert sorted(parts) == whole
    assert scan.file_groups == 3, "an edit changed the original"


def test_a_plan_without_rows_keeps_schema_and_partitions(planning):
    plan, node = encoded(planning, "SELECT l_shipmode, sum(l_tax) FROM lineitem GROUP BY 1")
    empty = decoded(planning, node.without_rows())
    assert empty.partition_count == plan.partition_count
    assert [list(planning.execute(empty, k)) for k in range(empty.partition_count)] == [[], [], []]
    assert "lineitem.1.parquet" not in empty.display_indent()
    assert "lineitem.1.parquet" in decoded(planning, node).display_indent()


def test_a_plan_without_rows_keeps_none_in_memory():
    """Or asking a plan for its schema would run it over them once more."""
    session = configured(dict(EXECUTION))
    batches = [pa.record_batch({"a": [1, 2]}), pa.record_batch({"a": [3]})]
    session.register_record_batches("m", [[batches[0]], [batches[1]]])
    plan, node = encoded(session, "SELECT a + 1 AS b FROM m")
    empty = decoded(session, node.without_rows())
    assert plan.partition_count == empty.partition_count == 2
    assert [list(session.execute(empty, k)) for k in range(2)] == [[], []]
    (batch,) = session.execute(decoded(session, node.without_rows().always_one_row()), 0)
    assert batch.to_pyarrow().schema.names == ["b"]


def test_an_input_can_be_replaced(planning):
    _, node = encoded(planning, "SELECT l_orderkey + 1 FROM lineitem WHERE l_tax > 0.01")
    replaced = node.replaced(lambda n: n.with_file_groups([1]) if n.is_scan else None)
    assert decoded(planning, replaced).partition_count == 1
    assert decoded(planning, node).partition_count == 3


def test_a_coalesced_plan_has_one_partition(planning):
    _, node = encoded(planning, "SELECT l_orderkey FROM lineitem")
    assert decoded(planning, node.coalesced()).partition_count == 1


def test_files_are_spliced_without_a_byte_range(tmp_path):
    """With a range, DataFusion reads an Arrow file whole instead of batch by batch."""
    session = configured(dict(EXECUTION))
    batch = pa.record_batch({"a": [1, 2, 3]})
    entries = []
    for name in ("one.arrow", "two 100% ü#?.arrow"):
        path = tmp_path / name
        with pa.ipc.new_file(str(path), batch.schema) as writer:
            writer.write_batch(batch)
        entries.append(FileEntry(str(path), path.stat().st_size, path.stat().st_mtime_ns))
    template = PlanNode.parse(
        session.read_arrow(str(tmp_path / "one.arrow")).execution_plan().to_bytes(session)
    )
    plan = decoded(session, template.with_files([[entries[0]], [], entries]))
    assert plan.partition_count == 3
    assert ".arrow:" not in plan.display_indent(), "a file carries a byte range"
    read = [
        sum(item.to_pyarrow().num_rows for item in session.execute(plan, index))
        for index in range(3)
    ]
    assert read == [3, 0, 6]


def test_modes_are_read(planning):
    _, node = encoded(
        planning, "SELECT l_shipmode, count(*) FROM lineitem GROUP BY 1 ORDER BY 1 LIMIT 3"
    )
    nodes = list(node.walk())
    kinds = [below.kind for below in nodes]
    assert kinds.count("aggregate") == 2
    modes = [n.aggregate_mode for n in nodes if n.kind == "aggregate"]
    assert modes == [AggregateMode.FINAL_PARTITIONED, AggregateMode.PARTIAL]
    repartition = next(n for n in nodes if n.kind == "repartition")
    assert repartition.is_hash_repartition
    assert not repartition.is_round_robin
    assert not repartition.preserves_order
    assert repartition.hash_partitions == 3
    sort = next(n for n in nodes if n.kind == "sort")
    assert sort.is_partition_wise_sort
    assert nodes[-1].object_store_url == "file:///"
    assert not nodes[-1].declares_partitioning


def test_a_rewritten_plan_gives_the_same_rows(planning, single):
    query = "SELECT l_shipmode, count(*) AS n, min(l_comment) FROM lineitem GROUP BY 1 ORDER BY 1"
    _, node = encoded(planning, query)
    worker = configured({"datafusion.execution.enable_file_stream_work_stealing": "false"})
    plan = ExecutionPlan.from_bytes(worker, node.to_bytes())
    got = pa.Table.from_batches([b.to_pyarrow() for b in worker.execute(plan, 0)])
    assert rows(got) == rows(single.sql(query).to_arrow_table())


@pytest.mark.parametrize(
    ("query", "kind", "join_type"),
    [
        ("SELECT * FROM orders JOIN customer ON o_custkey = c_custkey", "hash_join", "INNER"),
        ("SELECT * FROM customer LEFT JOIN orders ON o_custkey = c_custkey", "hash_join", "LEFT"),
        ("SELECT * FROM orders LEFT JOIN customer ON o_custkey = c_custkey", "hash_join", "RIGHT"),
        ("SELECT * FROM orders FULL JOIN customer ON o_custkey = c_custkey", "hash_join", "FULL"),
        ("SELECT * FROM customer LEFT SEMI JOIN orders ON o_custkey = c_custkey", "hash_join", "LEFT_SEMI"),
        ("SELECT * FROM orders LEFT SEMI JOIN customer ON o_custkey = c_custkey", "hash_join", "RIGHT_SEMI"),
        ("SELECT * FROM customer LEFT ANTI JOIN orders ON o_custkey = c_custkey", "hash_join", "LEFT_ANTI"),
        ("SELECT * FROM orders LEFT ANTI JOIN customer ON o_custkey = c_custkey", "hash_join", "RIGHT_ANTI"),
        ("SELECT * FROM customer WHERE c_custkey < 9 OR EXISTS (SELECT 1 FROM orders WHERE o_custkey = c_custkey)", "hash_join", "LEFT_MARK"),
        ("SELECT * FROM customer JOIN orders ON o_custkey < c_custkey", "nested_loop_join", "INNER"),
        ("SELECT * FROM customer LEFT JOIN orders ON o_custkey < c_custkey", "nested_loop_join", "LEFT"),
        ("SELECT * FROM customer FULL JOIN orders ON o_custkey < c_custkey", "nested_loop_join", "FULL"),
    ],
)  # fmt: skip
def test_join_types_are_read_from_the_bytes(planning, query, kind, join_type):
    plan, node = encoded(planning, query)
    join = next(n for n in node.walk() if n.kind == kind)
    assert join.join_type == JoinType[join_type]
    displayed = join_type.title().replace("_", "")
    assert f"join_type={displayed}" in plan.display_indent(), "the numbers of join types changed"
    if kind == "hash_join":
        assert join.is_partitioned_join
        assert not join.collecting_left().is_partitioned_join
        assert len(join.join_keys[0]) == len(join.join_keys[1]) == 1


def test_a_null_aware_join_is_known(planning):
    query = (
        "SELECT * FROM customer "
        "WHERE nullif(c_custkey, 1) NOT IN (SELECT nullif(o_custkey, 1) FROM orders)"
    )
    _, node = encoded(planning, query)
    join = next(n for n in node.walk() if n.kind == "hash_join")
    assert join.is_null_aware
    assert not join.is_partitioned_join


def test_windows_tell_whether_they_are_partitioned(planning):
    for over, expected in (("PARTITION BY l_tax", True), ("ORDER BY l_tax", False)):
        _, node = encoded(planning, f"SELECT row_number() OVER ({over}) FROM lineitem")
        window = next(n for n in node.walk() if n.kind == "window")
        assert window.is_partitioned_window == expected


def test_an_empty_plan_still_shows_its_columns(planning):
    for query in ("SELECT l_comment, l_tax FROM lineitem WHERE l_tax < 0", "SELECT * FROM region"):
        plan, node = encoded(planning, query)
        probe = decoded(planning, node.without_rows().always_one_row())
        (batch,) = [item.to_pyarrow() for item in planning.execute(probe, 0)]
        names = planning.sql(query).schema().names
        assert batch.schema.names == names
        assert plan.partition_count


def test_columns_get_names_that_repeat(planning):
    _, node = encoded(planning, "SELECT l_orderkey, l_tax FROM lineitem")
    plan = decoded(planning, node.renamed(["l_orderkey", "l_tax"], ["a", "a"]))
    first = next(iter(planning.execute(plan, 0))).to_pyarrow()
    assert first.schema.names == ["a", "a"]


def test_python_functions_are_named_without_being_unpickled(planning):
    function = udf(lambda a: a, [pa.int64()], pa.int64(), "volatile", name="Mine")
    frame = planning.table("lineitem").select(function(col("l_orderkey")))
    data = frame.execution_plan().to_bytes(planning.with_python_udf_inlining(enabled=True))
    assert python_functions(data) == {"Mine"}
    assert python_functions(b"nothing of the kind") == frozenset()
    with pytest.raises(PlanDecodeError):
        python_functions(b"DFPYUDF\x01\x03\x0b\x80\x05.")


# Slivers of files.


def scan_of(folder: Path, sizes: list[int], groups: int) -> tuple[SessionContext, PlanNode]:
    """A scan of Parquet files of these many rows, one row group each, in groups of bytes."""
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        values = pa.array(random.Random(number).sample(range(1 << 40), size))
        parquet.write_table(pa.table({"x": values}), folder / f"{number}.parquet")
    session = configured(
        {
            "datafusion.execution.target_partitions": str(groups),
            "datafusion.optimizer.repartition_file_min_size": "0",
            **EXECUTION,
        }
    )
    session.register_parquet("t", str(folder))
    return session, encoded(session, "SELECT x FROM t")[1]


def rows_of_groups(session: SessionContext, scan: PlanNode) -> list[int]:
    plan = decoded(session, scan)
    return [
        sum(item.to_pyarrow().num_rows for item in session.execute(plan, index))
        for index in range(plan.partition_count)
    ]


@pytest.mark.parametrize("larger", [1, 2])
def test_a_sliver_of_a_file_stays_with_the_rest_of_it(tmp_path, larger):
    """Of four files the second, or the third, is a little larger: it is cut near its end."""
    sizes = [20_000] * 4
    sizes[larger] += 100
    session, scan = scan_of(tmp_path / "t", sizes, 2)
    assert scan.file_ranges == 5, "it has been cut"
    whole = scan.with_whole_files()
    assert (whole.file_ranges, whole.file_groups) == (4, 2)
    assert rows_of_groups(session, whole) == [sizes[0] + sizes[1], sizes[2] + sizes[3]]
    assert whole.with_whole_files().to_bytes() == whole.to_bytes()


def test_the_first_bytes_of_a_file_would_bring_a_row_group_along(tmp_path):
    session, scan = scan_of(tmp_path / "t", [20_000, 20_000, 20_000, 20_100], 2)
    assert rows_of_groups(session, scan) == [60_000, 20_100], "which is why"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_adjacent_file_groups_become_one(tmp_path, count):
    session, scan = scan_of(tmp_path / "t", [9_000, 5_000, 20], 7)
    rows = rows_of_groups(session, scan)
    assert len(rows) == 7
    assert scan.file_ranges > 7, "a file is in two groups"
    merged = scan.with_file_groups_merged(count)
    assert rows_of_groups(session, merged) == [
        sum(rows[first : first + count]) for first in range(0, 7, count)
    ]
    assert scan.file_groups == 7, "an edit changed the original"
    whole = scan.with_file_groups_merged(7)
    assert (whole.file_groups, whole.file_ranges) == (1, 3), "ranges of a file are one again"


@pytest.mark.parametrize(("sizes", "groups"), [([9_000], 3), ([5_000, 9_000], 3), ([10, 9_000], 2)])
def test_files_that_are_cut_for_good_keep_all_their_rows(tmp_path, sizes, groups):
    session, scan = scan_of(tmp_path / "t", sizes, groups)
    whole = scan.with_whole_files()
    assert whole.file_groups == scan.file_groups
    assert sum(rows_of_groups(session, whole)) == sum(sizes)
    assert all(group.files for group in whole._body().base_conf.file_groups)


def test_one_file_that_is_listed_twice_is_read_twice(planning):
    scan = encoded(planning, "SELECT n_name FROM nation")[1]
    scan = next(node for node in scan.walk() if node.is_scan)
    entry = FileEntry("/a.parquet", 100, 1)
    twice = scan.with_files([[entry, entry], [entry, entry]])
    assert twice.with_whole_files().to_bytes() == twice.to_bytes()
