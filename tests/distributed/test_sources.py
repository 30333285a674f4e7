"""Text files: an option that a plan loses on the wire must keep the query at home."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import datafusion
import pyarrow as pa
import pytest

from resolver.distributed._logical_proto import _Plan, parse_text_scan
from resolver.distributed._plan_proto import PlanNode
from resolver.distributed._settings import EXECUTION, PLANNING
from resolver.distributed._sources import _CARRIED, _NOT_FOR_READING, refused_source
from tests.support.distributed import configured

NO_SUBQUERIES = {"datafusion.optimizer.enable_physical_uncorrelated_scalar_subquery": "false"}


@pytest.fixture
def planning() -> datafusion.SessionContext:
    return configured({**PLANNING, **NO_SUBQUERIES, "datafusion.execution.target_partitions": "2"})


def table(session: datafusion.SessionContext, kind: str, path: Path, options: str = "") -> None:
    options = f"OPTIONS ({options})" if options else ""
    session.sql(f"CREATE EXTERNAL TABLE t STORED AS {kind} LOCATION '{path}' {options}").collect()


def reason(session: datafusion.SessionContext, query: str = "SELECT * FROM t") -> str | None:
    frame = session.sql(query)
    plan = frame.execution_plan().to_bytes(session)
    return refused_source(frame, PlanNode.parse(plan))


def decoded(session: datafusion.SessionContext, query: str = "SELECT * FROM t") -> list[Any]:
    """The rows of the plan after its way over the wire."""
    data = session.sql(query).execution_plan().to_bytes(session)
    worker = configured(dict(EXECUTION))
    plan = datafusion.ExecutionPlan.from_bytes(worker, data)
    return [
        row
        for partition in range(plan.partition_count)
        for item in worker.execute(plan, partition)
        for row in item.to_pyarrow().to_pylist()
    ]


NEWLINES = "format.newlines_in_values true"
DATES = ", ".join(
    f"format.{name}_format '%d'" for name in ("date", "datetime", "timestamp", "timestamp_tz")
)
CSV = {
    "defaults": ("a,b\n1,x\n2,y\n", ""),
    "delimiter": ("a;b\n1;x,y\n", "format.delimiter ';'"),
    "quote": ("a,b\n1,|x,y|\n", "format.quote '|'"),
    "escape": ('a,b\n1,"x\\",y"\n', r"format.escape '\'"),
    "double quote": ('a,b\n1,"x"",y"\n', ""),
    "comment": ("a,b\n#1,x\n2,y\n", "format.comment '#'"),
    "newlines in values": ('a,b\n1,"x\ny"\n2,z\n', NEWLINES),
    "header": ("a,b\n1,x\n", "format.has_header true"),
    "no header": ("a,b\n1,x\n", "format.has_header false"),
    "truncated rows": ("a,b\n1,x\n2\n", "format.truncated_rows true"),
    # These do not change what is read, here or there.
    "null regex": ("a,b\n1,N\n2,\n", "format.null_regex '^N$'"),
    "null value": ("a,b\n1,x\nN,\n", "format.null_value 'N'"),
    "no double quote": ('a,b\n1,"x"",y"\n', "format.double_quote false"),
    "quote style": ("a,b\n1,x\n", "format.quote_style 'Always'"),
    "whitespace": (
        "a,b\n 1 , x \n",
        "format.ignore_leading_whitespace true, format.ignore_trailing_whitespace true",
    ),
    "sample": ("a,b\n1,x\n2,y\n", "format.schema_infer_max_rec 1"),
    "dates": (
        "a,b\n2024-02-03,2024-02-03T01:02:03\n",
        f"{DATES}, format.time_format '%H', format.compression_level 3",
    ),
}


@pytest.mark.parametrize(("text", "options"), CSV.values(), ids=CSV)
def test_csv_is_read_by_a_worker_as_it_is_here(planning, tmp_path, text, options):
    path = tmp_path / "t.csv"
    path.write_text(text)
    table(planning, "CSV", path, options)
    assert reason(planning) is None
    expected = planning.sql("SELECT * FROM t").to_pylist()
    assert expected
    assert decoded(planning) == expected


def test_every_option_that_passes_is_in_a_test():
    tested = " ".join(options for _, options in CSV.values())
    assert all(f"format.{name} " in tested for name in _CARRIED["csv"] | _NOT_FOR_READING)


@pytest.mark.parametrize("name", ["has_header", "newlines_in_values"])
@pytest.mark.parametrize("value", ["true", "false"])
def test_the_sessions_own_csv_defaults_travel(planning, tmp_path, name, value):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,x\n2,y\n")
    planning.sql(f"SET datafusion.catalog.{name} = {value}").collect()
    table(planning, "CSV", path)
    assert reason(planning) is None
    assert decoded(planning) == planning.sql("SELECT * FROM t").to_pylist()


COMPRESSIONS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
CSV_TEXT, JSON_TEXT = b"a,b\n" + b"1,x\n2,y\n" * 50, b'{"a": 1}\n{"a": 2}\n' * 50


def lost(session: datafusion.SessionContext) -> bool:
    """Whether a worker would read something else, or nothing."""
    expected = session.sql("SELECT * FROM t").to_pylist()
    assert expected
    try:
        return decoded(session) != expected
    except Exception:
        return True


@pytest.mark.parametrize("kind", ["CSV", "JSON"])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_text_stays_at_home(planning, tmp_path, kind, name):
    path = tmp_path / f"t.{kind.lower()}"
    path.write_bytes(COMPRESSIONS[name](CSV_TEXT if kind == "CSV" else JSON_TEXT))
    table(planning, kind, path, f"format.compression {name}")
    assert reason(planning) == (
        f"it reads {kind} with compression {name!r}, which a plan does not tell workers"
    )
    assert lost(planning)


def test_a_terminator_stays_at_home(planning, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b;1,x;2,y;")
    schema = pa.schema({"a": pa.int64(), "b": pa.string()})
    options = datafusion.CsvReadOptions(schema=schema, terminator=";")
    planning.register_csv("t", path, options=options)
    assert "terminator ';'" in reason(planning)
    assert lost(planning)


def test_a_json_array_stays_at_home(planning, tmp_path):
    path = tmp_path / "t.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    table(planning, "JSON", path, "format.newline_delimited false")
    assert "newline delimited 'false'" in reason(planning)
    assert lost(planning)


@pytest.mark.parametrize("options", ["", "format.schema_infer_max_rec 1"])
def test_json_lines_are_read_by_a_worker_as_they_are_here(planning, tmp_path, options):
    path = tmp_path / "t.json"
    path.write_bytes(JSON_TEXT)
    table(planning, "JSON", path, options)
    assert reason(planning) is None
    assert decoded(planning) == [{"a": 1}, {"a": 2}] * 50


@pytest.mark.parametrize("kind", ["CSV", "JSON"])
def test_partition_columns_travel(planning, tmp_path, kind):
    for day in ("1", "2"):
        folder = tmp_path / f"day={day}"
        folder.mkdir()
        (folder / f"t.{kind.lower()}").write_bytes(CSV_TEXT if kind == "CSV" else JSON_TEXT)
    read = planning.read_csv if kind == "CSV" else planning.read_json
    planning.register_view(
        "t", read(tmp_path, table_partition_cols=[("day", pa.string())]).select("a", "day")
    )
    assert reason(planning) is None
    expected = planning.sql("SELECT * FROM t").to_pylist()
    assert len({row["day"] for row in expected}) == 2
    assert sorted(map(str, decoded(planning))) == sorted(map(str, expected))


HIDING = {
    "table": "SELECT * FROM gz",
    "view": "SELECT * FROM v",
    "common table": "WITH c AS (SELECT * FROM gz) SELECT * FROM c UNION ALL SELECT * FROM c",
    "join": "SELECT * FROM plain JOIN v USING (a)",
    "join with memory": "SELECT * FROM memory JOIN v USING (a)",
    "in": "SELECT * FROM plain WHERE a IN (SELECT a FROM gz)",
    "exists": "SELECT * FROM plain WHERE NOT EXISTS (SELECT 1 FROM v WHERE v.a = plain.a)",
    "scalar": "SELECT a, (SELECT max(a) FROM v) AS m FROM plain",
    "scalar in a filter": "SELECT * FROM plain WHERE a = 2 OR a = (SELECT max(a) FROM gz)",
    "correlated": "SELECT a, (SELECT max(b) FROM gz WHERE gz.a = plain.a) AS m FROM plain",
    "lateral": "SELECT * FROM plain, LATERAL (SELECT b AS c FROM gz WHERE gz.a = plain.a)",
    "window": "SELECT rank() OVER (ORDER BY a) AS r FROM (SELECT * FROM gz)",
    "except": "SELECT a FROM plain EXCEPT SELECT a FROM gz",
}


@pytest.fixture
def tables(planning, tmp_path):
    (tmp_path / "plain.csv").write_bytes(CSV_TEXT)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(CSV_TEXT))
    planning.register_csv("plain", tmp_path / "plain.csv")
    planning.register_csv(
        "gz",
        tmp_path / "packed.csv.gz",
        file_extension=".csv.gz",
        file_compression_type="gzip",
    )
    planning.sql("CREATE VIEW v AS SELECT * FROM gz").collect()
    planning.from_pydict({"a": [1, 2]}, "memory")
    return planning


@pytest.mark.parametrize("query", HIDING.values(), ids=HIDING)
def test_a_text_file_is_found_wherever_it_hides(tables, query):
    assert "compression 'gzip'" in reason(tables, query)


@pytest.mark.parametrize("query", HIDING.values(), ids=HIDING)
def test_the_same_queries_over_plain_files_pass(tables, query):
    query = query.replace("gz", "plain").replace("FROM v", "FROM plain AS v")
    query = query.replace("JOIN v", "JOIN plain AS v").replace("plain.a = plain.a", "true")
    assert reason(tables, query) is None


def test_what_is_hidden_in_an_expression_is_refused(tables):
    """Where subqueries are not made joins, they cannot be walked."""
    tables.sql(f"SET {next(iter(NO_SUBQUERIES))} = true").collect()
    query = "SELECT * FROM plain WHERE a = 2 OR a = (SELECT max(a) FROM gz)"
    assert reason(tables, query) == "it reads text files, with options that cannot all be told"


def test_queries_without_text_files_are_not_optimized_again(tables):
    frame = tables.sql("SELECT * FROM memory")
    plan = PlanNode.parse(frame.execution_plan().to_bytes(tables))
    assert refused_source(None, plan) is None


def test_an_option_of_a_later_version_is_refused(planning, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(JSON_TEXT)
    table(planning, "JSON", path)
    data = planning.table("t").optimized_logical_plan().to_bytes()
    message = _Plan.FromString(data)
    message.listing_scan.json.options.MergeFromString(bytes([99 << 3 & 0x7F | 0x80, 99 >> 4, 1]))
    scan = parse_text_scan(message.SerializeToString())
    assert dict(scan.options) == {"option 99": "unknown"}


@pytest.mark.parametrize("data", [b"", b"\xff", b"R\x00"])
def test_other_leaves_are_no_text_scans(data):
    assert parse_text_scan(data) is None
