"""``python -m resolver sql``: tables, statements, outputs, running workers, errors."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import io
import json
import os
import pty
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet
import pytest
import trustme

import resolver
from resolver.cli import main
from resolver.distributed import SessionStateBuilder, Worker, _sql
from resolver.distributed._executor import QueryRun
from resolver.distributed._named_tables import NamedTable
from resolver.distributed._output import table_text, write
from resolver.distributed._statements import split
from tests.support.distributed import eventually, names

AT_A_WORKER = ["--workers", "http://127.0.0.1:1", "SELECT 1"]
REPOSITORY = Path(resolver.__file__).parents[1]
PEOPLE = pa.table({"id": [1, 2, 3], "name": ["Ada", "Grace", None]})
JOIN = """
    SELECT n_name, count(*) AS customers FROM customer JOIN nation ON c_nationkey = n_nationkey
    GROUP BY n_name ORDER BY customers DESC, n_name LIMIT 2
"""


@pytest.fixture(autouse=True, scope="module")
def shared_cluster(cluster):
    """The statements of these tests run on one cluster; starting is tested by itself."""

    class Started:
        def __init__(self, workers):
            self.workers = workers

        def __enter__(self):
            return cluster

        def __exit__(self, *_):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sql, "LocalCluster", Started)
        yield


@pytest.fixture
def people(tmp_path):
    path = tmp_path / "people.parquet"
    parquet.write_table(PEOPLE, path)
    return f"people={path}"


def tables(tpch, *wanted):
    return [argument for name in wanted for argument in ("--table", f"{name}={tpch / name}")]


def run(capfd, *arguments):
    """Exit code, stdout and stderr of the command."""
    code = main(["sql", *arguments])
    return (code, *capfd.readouterr())


def test_a_join_is_printed_as_a_table_with_its_row_count(capfd, tpch):
    code, out, err = run(capfd, *tables(tpch, "customer", "nation"), JOIN)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1] == "| n_name  | customers |"
    assert len(lines) == 7
    assert lines[-1].startswith("2 rows in ")
    assert "not distributed" not in lines[-1]


def test_a_query_that_ran_on_a_single_node_says_why(capfd):
    _, out, _ = run(capfd, "SELECT 1 AS one")
    assert "; not distributed: the plan is a single partition, so" in out


def test_the_staged_plan_is_printed_and_nothing_runs(capfd, tpch):
    code, out, _ = run(capfd, *tables(tpch, "customer", "nation"), "--explain", JOIN)
    assert code == 0
    assert "Head stage" in out
    assert "customers |" not in out


def test_how_it_ran_is_printed(capfd, tpch):
    code, out, _ = run(capfd, *tables(tpch, "customer", "nation"), "--analyze", JOIN)
    assert code == 0
    assert "rows" in out


def test_long_tables_are_clipped_and_counted(capfd, tpch):
    query = "SELECT o_orderkey FROM orders"
    code, out, _ = run(capfd, *tables(tpch, "orders"), "--max-rows", "3", query)
    assert code == 0
    assert len(out.splitlines()) == 3 + 4 + 1
    assert "15,000 rows, the first 3 shown in " in out


def test_a_table_without_rows_has_a_heading(capfd, people):
    _, out, _ = run(capfd, "--table", people, "SELECT name FROM people WHERE id > 9")
    assert "| name |" in out
    assert "0 rows in " in out


def test_columns_of_one_name_are_both_printed(capfd, people):
    query = "SELECT a.id, b.id FROM people a JOIN people b ON a.id = b.id + 1 ORDER BY 1"
    _, out, _ = run(capfd, "--table", people, query)
    assert [line.split() for line in out.splitlines()[1:5:2]] == [
        ["|", "id", "|", "id", "|"],
        ["|", "2", "|", "1", "|"],
    ]


def test_statements_run_in_order(capfd, people):
    script = """
        -- a view; with a comment
        CREATE VIEW adults AS SELECT name FROM people WHERE id < 3;
        SET datafusion.execution.batch_size = 16;
        SELECT count(*) AS n FROM adults; SELECT ';' AS semicolon;
    """
    code, out, _ = run(capfd, "--table", people, "--output", "csv", script)
    assert code == 0
    assert out == '"n"\n2\n"semicolon"\n";"\n'


def test_sql_comes_from_stdin_or_a_file(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 1 AS one"))
    assert run(capfd, "--output", "json", "-")[1] == '{"one":1}\n'
    (tmp_path / "query.sql").write_text("SELECT 2 AS two;\n")
    arguments = ["--output", "json", "--file", str(tmp_path / "query.sql")]
    assert run(capfd, *arguments)[1] == '{"two":2}\n'


# Tables: every format, alone and in directories.


def write_csv(table, path):
    csv.write_csv(table, path)


def write_json(table, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def write_arrow(table, path):
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


FORMATS = {
    ".parquet": parquet.write_table,
    ".PARQUET": parquet.write_table,
    ".csv": write_csv,
    ".json": write_json,
    ".ndjson": write_json,
    ".arrow": write_arrow,
}


@pytest.mark.parametrize("extension", FORMATS)
def test_a_table_is_a_file_of_any_format(capfd, tmp_path, extension):
    path = tmp_path / f"people{extension}"
    FORMATS[extension](PEOPLE, path)
    query = "SELECT id, name FROM people WHERE id < 3 ORDER BY id"
    code, out, err = run(capfd, "--table", f"people={path}", "--output", "csv", query)
    assert (code, err) == (0, "")
    assert out == '"id","name"\n1,"Ada"\n2,"Grace"\n'


@pytest.mark.parametrize("extension", FORMATS)
def test_a_table_is_a_directory_of_one_format(capfd, tmp_path, extension):
    for year in (2025, 2026):
        folder = tmp_path / "people" / f"year={year}"
        folder.mkdir(parents=True)
        FORMATS[extension](PEOPLE, folder / f"part{extension}")
    (tmp_path / "people" / "_SUCCESS").touch()
    (tmp_path / "people" / "README.txt").touch()
    query = "SELECT year, sum(id) AS ids FROM people GROUP BY year ORDER BY year"
    table = f"people={tmp_path / 'people'}"
    code, out, err = run(capfd, "--table", table, "--output", "json", query)
    assert (code, err) == (0, "")
    assert out == '{"year":"2025","ids":6}\n{"year":"2026","ids":6}\n'


def test_a_table_name_is_as_in_sql(capfd, tmp_path):
    parquet.write_table(PEOPLE, tmp_path / "p.parquet")
    file = f"={tmp_path / 'p.parquet'}"
    arguments = ["--table", f"People{file}", "--table", f'"Quoted"{file}', "--output", "json"]
    query = 'SELECT count(*) AS n FROM PEOPLE JOIN "Quoted" USING (id)'
    assert run(capfd, *arguments, query)[1] == '{"n":3}\n'


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("people", "NAME=PATH"),
        ("=people.csv", "NAME=PATH"),
        ("people=", "NAME=PATH"),
        ("people={}/nothing", "there is no file or directory"),
        ("people={}/notes.txt", ".csv, .json, .ndjson or .arrow"),
        ("people={}/empty", "no .parquet, .csv"),
        ("people={}/empty", "files; give a file, or a directory of such"),
        ("people={}/mixed", "both .csv and .parquet files; give each format its own directory"),
    ],
)
def test_a_table_that_cannot_be_one_is_refused(capfd, tmp_path, table, message):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.csv").touch()
    (tmp_path / "mixed" / "b.parquet").touch()
    code, out, err = run(capfd, "--table", table.format(tmp_path), "SELECT 1")
    assert (code, out) == (2, "")
    assert err.startswith("resolver: ")
    assert message in err
    assert err.count("\n") == 1


def test_hidden_files_do_not_decide_the_format(tmp_path):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.csv").touch()
    (tmp_path / "_b.json").touch()
    (tmp_path / "c.arrow").touch()
    assert NamedTable.parse(f"t={tmp_path}") == NamedTable("t", tmp_path, ".arrow")


# Outputs.


def test_a_result_is_a_file_of_the_format_of_its_name(capfd, people, tmp_path):
    for extension in ("csv", "ndjson", "parquet", "arrow"):
        path = tmp_path / f"result.{extension}"
        query = "SELECT id, name FROM people ORDER BY id"
        code, out, err = run(capfd, "--table", people, "--output-file", str(path), query)
        assert (code, out, err) == (0, "", "")
    assert (tmp_path / "result.csv").read_text() == '"id","name"\n1,"Ada"\n2,"Grace"\n3,\n'
    assert json.loads((tmp_path / "result.ndjson").read_text().splitlines()[2]) == {
        "id": 3,
        "name": None,
    }
    assert parquet.read_table(tmp_path / "result.parquet").equals(PEOPLE)
    with pa.ipc.open_file(tmp_path / "result.arrow") as reader:
        assert reader.read_all().equals(PEOPLE)
    assert names(tmp_path) == [
        "people.parquet", *(f"result.{kind}" for kind in ("arrow", "csv", "ndjson", "parquet"))
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_binary_formats_go_into_a_pipe(people, capfdbinary, kind):
    query = "SELECT id, name FROM people ORDER BY id"
    assert main(["sql", "--table", people, "--output", kind, query]) == 0
    data = pa.BufferReader(capfdbinary.readouterr().out)
    read = parquet.read_table(data) if kind == "parquet" else pa.ipc.open_stream(data).read_all()
    assert read.equals(PEOPLE)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_binary_formats_do_not_go_to_a_terminal(capfd, monkeypatch, kind):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, _, err = run(capfd, "--output", kind, "SELECT 1")
    assert code == 2
    assert f"{kind} is not for a terminal; give --output-file" in err


def test_a_failed_query_leaves_the_file_as_it_was(capfd, people, tmp_path):
    path = tmp_path / "result.csv"
    path.write_text("precious")
    query = "SELECT 1 / (id - 3) AS n FROM people"
    code, _, err = run(capfd, "--table", people, "--output-file", str(path), query)
    assert code == 1
    assert "Divide by zero" in err
    assert path.read_text() == "precious"
    assert names(tmp_path) == ["people.parquet", "result.csv"]


def test_a_device_stays_what_it_is(capfd, people):
    arguments = ["--output", "csv", "--output-file", os.devnull]
    assert run(capfd, "--table", people, *arguments, "SELECT id FROM people")[0] == 0
    assert not Path(os.devnull).is_file()


def test_one_file_holds_one_result(capfd, tmp_path):
    path = tmp_path / "result.csv"
    code, _, err = run(capfd, "--output-file", str(path), "SELECT 1; SELECT 2")
    assert code == 1
    assert "statement 2: this is the second statement with a result" in err
    assert path.read_text() == '"Int64(1)"\n1\n'


TYPES = {
    "n": pa.array([None, 2**60], pa.int64()),
    "f": pa.array([float("nan"), 0.1], pa.float64()),
    "d": pa.array([None, Decimal("1234567890123456789.01")], pa.decimal128(21, 2)),
    "day": pa.array([None, dt.date(2026, 2, 28)], pa.date32()),
    "at": pa.array([None, 1_000_000_001], pa.timestamp("ns")),
    "took": pa.array([None, 5], pa.duration("s")),
    "s": pa.array(['"\n', "é"], pa.string_view()),
    "raw": pa.array([None, b"\x00\xff"], pa.binary_view()),
    "tags": pa.array([None, ["a"]], pa.list_(pa.string_view())),
    "point": pa.array([None, {"x": 1.5, "y": None}]),
    "facts": pa.array([None, [("k", 1)]], pa.map_(pa.string(), pa.int64())),
    "kind": pa.array([None, "x"]).dictionary_encode(),
    "yes": pa.array([None, True]),
}


def test_every_type_has_a_json_form():
    batch = pa.RecordBatch.from_pydict(TYPES)
    sink = io.BytesIO()
    assert write("json", sink, batch.schema, [batch]) == 2
    first, second = sink.getvalue().decode().splitlines()
    assert json.loads(first) == dict.fromkeys(TYPES) | {"s": '"\n'}
    assert json.loads(second, parse_float=str) == {
        "n": 2**60,
        "f": "0.1",
        "d": "1234567890123456789.01",
        "day": "2026-02-28",
        "at": "1970-01-01 00:00:01.000000001",
        "took": 5,
        "s": "é",
        "raw": "00ff",
        "tags": ["a"],
        "point": {"x": "1.5", "y": None},
        "facts": [["k", 1]],
        "kind": "x",
        "yes": True,
    }


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_every_type_survives_a_file(kind):
    batch = pa.RecordBatch.from_pydict(TYPES)
    sink = io.BytesIO()
    assert write(kind, sink, batch.schema, [batch, batch.slice(1)]) == 3
    data = pa.BufferReader(sink.getvalue())
    read = parquet.read_table(data) if kind == "parquet" else pa.ipc.open_file(data).read_all()
    assert repr(read.to_pylist()) == repr([*batch.to_pylist(), *batch.slice(1).to_pylist()])


def test_nested_columns_are_no_csv():
    batch = pa.RecordBatch.from_pydict({"tags": TYPES["tags"]})
    sink = io.BytesIO()
    with pytest.raises(ValueError, match=r"column tags is a list.*json"):
        write("csv", sink, batch.schema, [batch])
    assert sink.getvalue() == b""


def test_columns_of_one_name_are_no_json():
    batch = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    with pytest.raises(ValueError, match=r"columns are called a.*AS"):
        write("json", io.BytesIO(), batch.schema, [batch])
    sink = io.BytesIO()
    write("csv", sink, batch.schema, [batch])
    assert sink.getvalue() == b'"a","a"\n1,2\n'


def test_a_plan_may_be_surer_of_nulls_than_the_query_was():
    schema = pa.schema([pa.field("a", pa.string_view(), nullable=False)])
    batch = pa.RecordBatch.from_pydict({"a": ["x", None]})
    sink = io.BytesIO()
    write("arrow", sink, schema, [batch], seekable=False)
    assert pa.ipc.open_stream(sink.getvalue()).read_all()["a"].to_pylist() == ["x", None]


def test_small_batches_become_few_row_groups():
    batch = pa.RecordBatch.from_pydict({"a": list(range(100))})
    sink = io.BytesIO()
    assert write("parquet", sink, batch.schema, [batch] * 20) == 2_000
    assert parquet.ParquetFile(pa.BufferReader(sink.getvalue())).num_row_groups == 1


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="there are csv, json, parquet, arrow"):
        write("xlsx", io.BytesIO(), PEOPLE.schema, [])


def test_only_what_is_shown_of_a_long_table_is_held():
    given = 0

    def batches():
        nonlocal given
        for _ in range(50):
            given += 1
            yield pa.RecordBatch.from_pydict({"a": list(range(100))})

    text, rows = table_text(pa.schema([("a", pa.int64())]), batches(), 5)
    assert (given, rows) == (50, 5_000)
    assert len(text.splitlines()) == 5 + 4


# Statements.


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("", []),
        (" ; ;; ", []),
        ("-- nothing; at all\n/* ; /* nested; */ ; */", []),
        ("SELECT 1", ["SELECT 1"]),
        ("SELECT 1;", ["SELECT 1"]),
        ("SELECT 1; SELECT 2;\n", ["SELECT 1", "SELECT 2"]),
        ("SELECT ';'; SELECT 'it''s;'", ["SELECT ';'", "SELECT 'it''s;'"]),
        (r"SELECT E'\';'; SELECT 2", [r"SELECT E'\';'", "SELECT 2"]),
        (r"SELECT DATE'\'; SELECT 2", [r"SELECT DATE'\'", "SELECT 2"]),
        ('SELECT ";" ; SELECT `;`', ['SELECT ";"', "SELECT `;`"]),
        ("SELECT $$;$$; SELECT $a$;$$;$a$", ["SELECT $$;$$", "SELECT $a$;$$;$a$"]),
        ("SELECT 1 -- a;\n; SELECT 2", ["SELECT 1 -- a;", "SELECT 2"]),
        ("SELECT /* ; */ 1; SELECT 2", ["SELECT /* ; */ 1", "SELECT 2"]),
        ("-- why\nSELECT 1", ["-- why\nSELECT 1"]),
        ("SELECT 'unfinished; SELECT 2", ["SELECT 'unfinished", "SELECT 2"]),
        ("SELECT 1 /* unfinished; SELECT 2", ["SELECT 1 /* unfinished; SELECT 2"]),
    ],
)
def test_statements_end_at_semicolons_outside_quotes_and_comments(text, statements):
    assert split(text) == statements


# Errors.


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT * FROM nobody", "there is no table nobody; give it with --table nobody=PATH"),
        ("SELEKT 1", "SELEKT"),
        ("SELECT 1; SELECT nothing", "statement 2: "),
        ("SELECT 1 / 0 AS n", "Divide by zero"),
    ],
)
def test_a_failed_statement_says_why(capfd, query, message):
    code, _, err = run(capfd, query)
    assert code == 1
    assert err.startswith("resolver: ")
    assert message in err


def test_a_traceback_of_a_statement_is_shown_on_demand():
    with pytest.raises(_sql.QueryError, match="Divide by zero"):
        main(["--traceback", "sql", "SELECT 1 / 0"])


def test_a_file_that_is_not_what_it_says_is_an_error(capfd, tmp_path):
    (tmp_path / "people.parquet").write_text("id,name\n")
    code, _, err = run(capfd, "--table", f"people={tmp_path / 'people.parquet'}", "SELECT 1")
    assert code == 1
    assert f"table people: {tmp_path / 'people.parquet'}: " in err


def test_the_file_of_a_directory_that_is_not_what_it_says_is_named(capfd, tmp_path):
    for name in "abc":
        parquet.write_table(PEOPLE, tmp_path / f"{name}.parquet")
    (tmp_path / "b.parquet").write_text("id,name\n")
    code, _, err = run(capfd, "--table", f"people={tmp_path}", "SELECT 1")
    assert code == 1
    assert f"table people: {tmp_path / 'b.parquet'}: " in err


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_result_without_columns_is_an_error_that_says_why(capfd, tmp_path, kind):
    path = tmp_path / f"people.{kind}"
    path.touch()
    table = f"people={path}"
    code, out, err = run(capfd, "--table", table, "SELECT * FROM people")
    assert (code, out) == (1, "")
    assert "the result has no columns; a table has none when its file is empty" in err
    query = "SELECT count(*) AS n FROM people"
    assert run(capfd, "--table", table, "--output", "json", query)[1] == '{"n":0}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the SQL"),
        (["SELECT 1", "--file", "query.sql"], "give the SQL"),
        ([";"], "there is no SQL to run"),
        (["--file", "/no/such/query.sql"], "--file /no/such/query.sql cannot be read (No such"),
        (["--explain", "--output-file", "x", "SELECT 1"], "--explain prints"),
        (["--output-file", "x.xlsx", "SELECT 1"], "x.xlsx ends in no known format; say --output"),
        (["--output-file", "/no/such/x.csv", "SELECT 1"], "no folder for --output-file /no/such/"),
        (["--token-file", "token", "SELECT 1"], "--workers"),
        (["--tls-key", "key", "SELECT 1"], "--workers"),
        (["--workers", "http://user:pw@host:1", "SELECT 1"], "user"),
        ([*AT_A_WORKER, "--token-file", "/no/such"], "--token-file /no/such cannot be read"),
        ([*AT_A_WORKER, "--tls-root-certs", "no.pem"], "--tls-root-certs no.pem cannot be read"),
        ([*AT_A_WORKER, "--tls-root-certs", __file__], f"--tls-root-certs in {__file__} could"),
        ([*AT_A_WORKER, "--tls-key", "no.pem"], "--tls-key goes with --tls-certificate"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(capfd, arguments, message):
    code, out, err = run(capfd, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "pw" not in err


def test_without_a_stdout_it_says_so(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where it was closed
    assert main(["sql", "SELECT 1"]) == 2
    assert capfd.readouterr().err == "resolver: stdout is closed, and there is nowhere to write\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workers", "none", "SELECT 1"],
        ["--workers", "0", "SELECT 1"],
        ["--output", "xlsx", "SELECT 1"],
        ["--explain", "--analyze", "SELECT 1"],
        ["--explain", "--output", "csv", "SELECT 1"],
    ],
)
def test_bad_options_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(["sql", *arguments])
    assert left.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit):
        main(["sql", "--help"])
    out = capsys.readouterr().out
    for part in ("--table lineitem=data/lineitem", "--workers https://", "Exit code"):
        assert part in out


# Running workers.


def test_running_workers_are_used_with_tls_and_a_token(capfd, people, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "token").write_text("secret\n")
    server = Worker().into_flight_server(
        "grpc+tls://127.0.0.1:0",
        exchange_dir=tmp_path / "exchange",
        tls_certificate=certificate.cert_chain_pems[0].bytes(),
        tls_key=certificate.private_key_pem.bytes(),
        token="secret",
    )
    query = "SELECT count(*) AS n FROM people WHERE id > 1"
    with server:
        arguments = ["--workers", server.url, "--tls-root-certs", str(tmp_path / "ca.pem")]
        arguments += ["--table", people, "--output", "json", query]
        assert run(capfd, "--token-file", str(tmp_path / "token"), *arguments)[:2] == (
            0,
            '{"n":2}\n',
        )
        (tmp_path / "token").write_text("wrong-token")
        code, _, err = run(capfd, "--token-file", str(tmp_path / "token"), *arguments)
        assert code == 1
        assert "check --token-file and --tls-certificate" in err
        assert "wrong-token" not in err


def test_workers_with_certificates_are_started_and_used_by_options_alone(people, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    options = []
    for name, purpose in (("127.0.0.1", "tls"), ("client@example.org", "client")):
        certificate = authority.issue_cert(name)
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{purpose}.pem")
        certificate.private_key_pem.write_to_path(tmp_path / f"{purpose}.key")
        options += [f"--{purpose}-certificate", str(tmp_path / f"{purpose}.pem")]
        options += [f"--{purpose}-key", str(tmp_path / f"{purpose}.key")]
    roots = ["--tls-root-certs", str(tmp_path / "ca.pem")]
    worker = [sys.executable, "-m", "resolver", "worker", "--client-ca", str(tmp_path / "ca.pem")]
    worker += ["--listen", "grpc+tls://127.0.0.1:0", "--exchange-dir", str(tmp_path / "exchange")]
    processes = [
        subprocess.Popen([*worker, *roots, *options], cwd=REPOSITORY, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        urls = [json.loads(process.stdout.readline())["url"] for process in processes]
        query = "SELECT a.id, count(*) AS n FROM people a JOIN people b USING (id) GROUP BY a.id"

        def ask(*more):
            asked = command("--workers", ",".join(urls), "--table", people, "--output", "csv")
            return subprocess.run(
                [*asked, *more, query], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
            )

        own = ["--tls-certificate", options[5], "--tls-key", options[7]]
        shown = ask(*roots, *own)
        assert (shown.returncode, len(shown.stdout.splitlines()), shown.stderr) == (0, 4, "")
        assert "pass --tls-certificate and --tls-key" in ask(*roots).stderr
        distrusted = ask(*own)
        assert "pass that authority as --tls-root-certs" in distrusted.stderr
        assert distrusted.stderr.count("\n") == 1, "gRPC must not talk, too"
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=30)


def test_workers_that_are_gone_are_named(capfd, people):
    query = "SELECT id, count(*) AS n FROM people GROUP BY id"
    code, _, err = run(capfd, "--workers", "http://127.0.0.1:1", "--table", people, query)
    assert code == 1
    assert "http://127.0.0.1:1" in err


# In a process of its own: signals, pipes, terminals.


def command(*arguments):
    return [sys.executable, "-m", "resolver", "sql", *arguments]


@pytest.mark.parametrize("urls", ["http://127.0.0.1:1", "http://127.0.0.1:1,http://127.0.0.1:2"])
def test_workers_that_are_gone_take_one_line_of_stderr(people, urls):
    """No line of a log above it: the sentence says it all."""
    query = "SELECT id, count(*) AS n FROM people GROUP BY id"
    done = subprocess.run(
        command("--workers", urls, "--table", people, query),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("resolver: ")
    for url in urls.split(","):
        assert url in line


SLOW = (
    "SELECT sum(sin(a.l_extendedprice * b.l_extendedprice)) AS n "
    "FROM lineitem a JOIN lineitem b ON a.l_linenumber <> b.l_linenumber"
)


def children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text().split() if path.exists() else []


@contextlib.contextmanager
def started(folder, *arguments):
    """The command in a process group of its own, as a terminal has it; files go to ``folder``."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_interrupt_ends_the_query_and_the_cluster(tpch, tmp_path):
    with started(tmp_path, "--workers", "2", *tables(tpch, "lineitem"), SLOW) as process:
        # Files of a query are there only while it runs.
        eventually(lambda: any(tmp_path.glob("*/*/*.arrow")), 60)
        workers = children(process.pid)
        assert len(workers) == 2
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    eventually(lambda: not any(Path("/proc", worker).exists() for worker in workers))
    assert names(tmp_path) == []


ENDLESS = (
    "SELECT sum(sin(a.v * b.v)) AS n FROM generate_series(1, 10000000) a(v), "
    "generate_series(1, 10000000) b(v)"
)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_query_that_computes_in_this_process_can_be_ended(tmp_path, stop):
    """Python's own handler would wait for DataFusion to come back."""
    output = tmp_path / "n.csv"
    with started(tmp_path, "--workers", "1", "--output-file", str(output), ENDLESS) as process:
        eventually(lambda: any(tmp_path.glob(".n.csv.*")), 60)
        workers = children(process.pid)
        process.send_signal(stop)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + stop, "", "")
    eventually(lambda: not any(Path("/proc", worker).exists() for worker in workers))
    eventually(lambda: names(tmp_path) == [])


def test_a_cluster_that_is_starting_ends_with_the_command(tmp_path):
    with started(tmp_path, "--workers", "2", "SELECT 1") as process:
        eventually(lambda: any(tmp_path.glob("resolver-cluster-*/worker-1.log")), 60)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + signal.SIGTERM, "", "")
    assert names(tmp_path) == []


def test_a_reader_that_has_enough_ends_it_quietly(tpch):
    process = subprocess.Popen(
        command(
            "--workers", "1", "--output", "csv", *tables(tpch, "lineitem"), "SELECT * FROM lineitem"
        ),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline().startswith(b'"l_orderkey"')
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), err) == (128 + signal.SIGPIPE, b"")


def test_progress_is_shown_on_a_terminal_and_gone_at_the_end(tpch):
    leader, follower = pty.openpty()
    try:
        done = subprocess.run(
            command("--workers", "2", *tables(tpch, "customer", "nation"), JOIN),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=follower,
            check=True,
            timeout=60,
        )
    finally:
        os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert b"customers" in done.stdout
    assert "stage " in shown
    assert shown.endswith(" \r")


def test_a_result_is_printed_in_pieces(capfd, monkeypatch, tpch, cluster):
    """Otherwise the workers would keep all of it before the first row is printed."""
    arguments = ["--workers", "1", *tables(tpch, "lineitem"), "--output", "csv"]
    arguments += ["SELECT l_orderkey, count(*) FROM lineitem GROUP BY l_orderkey"]
    whole = run(capfd, *arguments)[1]
    heads = []
    builder = SessionStateBuilder()
    for name, value in {"stream_bytes": 100_000, "coordinator_threshold": 0}.items():
        builder.with_distributed_option(name, value)
    next_head = QueryRun.next_head
    monkeypatch.setattr(cluster, "session", functools.partial(cluster.session, builder=builder))
    monkeypatch.setattr(QueryRun, "next_head", lambda query: heads.append(1) or next_head(query))
    assert sorted(run(capfd, *arguments)[1].split()) == sorted(whole.split())
    assert len(heads) > 1


def test_a_terminal_without_unicode_still_gets_the_plan(tpch):
    done = subprocess.run(
        command("--workers", "1", *tables(tpch, "customer", "nation"), "--explain", JOIN),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Head stage" in done.stdout


def test_sql_that_is_no_text_is_refused():
    done = subprocess.run(
        command("-"), cwd=REPOSITORY, input=b"SELECT '\xff'", capture_output=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"resolver: the SQL is no text")


def test_progress_can_be_had_and_not_had(capfd, tpch):
    arguments = [*tables(tpch, "customer", "nation"), "--output", "csv", JOIN]
    assert "stage " in run(capfd, "--progress", *arguments)[2]
    assert run(capfd, "--no-progress", *arguments)[2] == ""
