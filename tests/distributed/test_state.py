"""What SessionStateBuilder collects, and that both sides of a query get it."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datafusion
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from datafusion import udaf, udf, udwf
from datafusion.object_store import AmazonS3, LocalFileSystem
from datafusion.user_defined import Accumulator, WindowEvaluator

from resolver.distributed import SessionContext, SessionState, SessionStateBuilder
from resolver.distributed._options import DistributedOptions
from resolver.distributed._passthrough import PassthroughHeaders
from resolver.distributed._settings import EXECUTION

SECRET = "s3cr3t-v4lue"


class Summed(Accumulator):
    def __init__(self) -> None:
        self._sum = 0

    def state(self) -> list[pa.Scalar]:
        return [pa.scalar(self._sum)]

    def update(self, values: pa.Array) -> None:
        self._sum += pc.sum(values).as_py() or 0

    merge = update

    def evaluate(self) -> pa.Scalar:
        return pa.scalar(self._sum)


class Backwards(WindowEvaluator):
    def evaluate_all(self, values: list[pa.Array], num_rows: int) -> pa.Array:
        return values[0].take(pa.array(range(num_rows - 1, -1, -1)))


INT = pa.int64()


def with_functions(builder: SessionStateBuilder) -> SessionStateBuilder:
    """What a session and a worker would both be built with."""
    return (
        builder.with_udf(udf(lambda a: pc.add(a, 1000), [INT], INT, "immutable", "Plus_1000"))
        .with_udaf(udaf(Summed, INT, INT, [INT], "immutable", "summed"))
        .with_udwf(udwf(Backwards, INT, INT, "immutable", "backwards"))
    )


def travelled(
    context: datafusion.SessionContext, query: str, worker: datafusion.SessionContext
) -> list[Any]:
    """The rows of ``query`` planned in ``context`` and run in ``worker``."""
    plan = context.sql(query).execution_plan()
    data = plan.to_bytes(context.with_python_udf_inlining(enabled=False))
    decoded = datafusion.ExecutionPlan.from_bytes(
        worker.with_python_udf_inlining(enabled=False), data
    )
    return [
        row
        for partition in range(decoded.partition_count)
        for item in worker.execute(decoded, partition)
        for row in item.to_pyarrow().to_pylist()
    ]


CALLS = {
    "scalar": 'SELECT "Plus_1000"(column1) AS x FROM (VALUES (1), (2))',
    "aggregate": "SELECT summed(column1) AS x FROM (VALUES (1), (2))",
    "window": "SELECT backwards(column1) OVER () AS x FROM (VALUES (1), (2))",
}
ANSWERS = {"scalar": [1001, 1002], "aggregate": [3], "window": [2, 1]}


@pytest.mark.parametrize("kind", CALLS)
def test_a_function_of_both_sides_travels_by_name(kind):
    session = SessionContext(with_functions(SessionStateBuilder()).build())
    worker = with_functions(SessionStateBuilder()).build().new_context(EXECUTION)
    assert [row["x"] for row in session.sql(CALLS[kind]).to_pylist()] == ANSWERS[kind]
    assert [row["x"] for row in travelled(session, CALLS[kind], worker)] == ANSWERS[kind]


@pytest.mark.parametrize("kind", CALLS)
def test_a_function_that_the_worker_lacks_does_not_decode(kind):
    session = SessionContext(with_functions(SessionStateBuilder()).build())
    bare = SessionStateBuilder().build().new_context(EXECUTION)
    with pytest.raises(Exception, match=r"Plus_1000|summed|backwards"):
        travelled(session, CALLS[kind], bare)


@pytest.mark.parametrize("kind", CALLS)
def test_a_derived_session_keeps_the_functions(kind):
    """Also those that were registered in the session and not in its state."""
    session = SessionContext()
    for _, function in with_functions(SessionStateBuilder()).build()._functions:
        register = {"ScalarUDF": "udf", "AggregateUDF": "udaf", "WindowUDF": "udwf"}
        getattr(session, f"register_{register[type(function).__name__]}")(function)
    derived = session._derived(EXECUTION)
    assert [row["x"] for row in travelled(session, CALLS[kind], derived)] == ANSWERS[kind]


def test_a_state_names_its_functions():
    state = with_functions(SessionStateBuilder()).build()
    assert state.function_names == {"Plus_1000", "summed", "backwards"}
    assert SessionStateBuilder().build().function_names == frozenset()


def test_a_worker_takes_no_function_for_a_builtin():
    with pytest.raises(ValueError, match="'ABS' is the name of a function of DataFusion's own"):
        SessionStateBuilder().with_udf(udf(lambda a: a, [INT], INT, "immutable", "ABS"))
    with pytest.raises(ValueError, match="'sum'"):
        SessionStateBuilder().with_udaf(udaf(Summed, INT, INT, [INT], "immutable", "sum"))
    with pytest.raises(ValueError, match="'rank'"):
        SessionStateBuilder().with_udwf(udwf(Backwards, INT, INT, "immutable", "rank"))


def test_functions_must_be_of_their_kind():
    with pytest.raises(TypeError, match="with_udaf takes a AggregateUDF"):
        SessionStateBuilder().with_udaf(udf(lambda a: a, [INT], INT, "immutable", "f"))


class S3(BaseHTTPRequestHandler):
    """As much of S3 as reading a few files takes."""

    protocol_version = "HTTP/1.1"
    folder: Path
    ranges: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.folder / self.path.partition("?")[0].removeprefix("/lake/")
        data = path.read_bytes() if path.is_file() else b""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.send_response(206 if wanted else 200 if data else 404)
        self.send_header("Last-Modified", "Mon, 02 Nov 2026 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            self.ranges.append(wanted[0])
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def lake(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    pq.write_table(pa.table({"a": list(range(100))}), tmp_path / "t.parquet")
    S3.folder, S3.ranges = tmp_path, []
    with ThreadingHTTPServer(("127.0.0.1", 0), S3) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def with_lake(server: ThreadingHTTPServer) -> SessionState:
    store = AmazonS3(
        "lake",
        region="nowhere",
        access_key_id="id",
        secret_access_key=SECRET,
        endpoint=f"http://127.0.0.1:{server.server_port}",
        allow_http=True,
    )
    return SessionStateBuilder().with_object_store("s3://", store, "lake").build()


def test_an_object_store_of_both_sides_is_read_by_both(lake):
    state = with_lake(lake)
    session = SessionContext(state)
    session.register_parquet("t", "s3://lake/t.parquet")
    query = "SELECT a FROM t WHERE a > 96"
    expected = [{"a": 97}, {"a": 98}, {"a": 99}]
    assert session.sql(query).to_pylist() == expected
    before = len(S3.ranges)
    assert travelled(session, query, with_lake(lake).new_context(EXECUTION)) == expected
    assert len(S3.ranges) > before
    assert travelled(session, query, session._derived(EXECUTION)) == expected
    with pytest.raises(Exception, match="No suitable object store"):
        travelled(session, query, datafusion.SessionContext())
    plan = session.sql(query).execution_plan().to_bytes(session)
    (url,) = state.object_stores
    assert url.encode() in plan


def test_the_workers_store_is_not_taken_for_one_that_replaced_it(tmp_path):
    store = LocalFileSystem(str(tmp_path))
    state = SessionStateBuilder().with_object_store("mem://", store, "lake").build()
    session = SessionContext(state)
    assert session._stores_of_workers() == state.object_stores == {"mem://lake/"}
    session.register_object_store("mem://", LocalFileSystem(str(tmp_path)), "lake")
    session.register_object_store("mem://", LocalFileSystem(str(tmp_path)), "mine")
    assert session._stores_of_workers() == frozenset()
    again = SessionContext(state)
    again.deregister_object_store("mem://", "lake")
    assert again._stores_of_workers() == frozenset()


def test_a_store_that_came_with_a_table_is_kept_by_derived_sessions(tmp_path):
    (tmp_path / "t.csv").write_text("a\n1\n")
    session = SessionContext()
    session.register_csv("t", "mem://mine/t.csv", object_store=LocalFileSystem(str(tmp_path)))
    assert travelled(session, "SELECT * FROM t", session._derived(EXECUTION)) == [{"a": 1}]
    assert session._stores_of_workers() == frozenset()


@pytest.mark.parametrize(
    ("schema", "host"),
    [
        ("s3", "lake"),
        ("file://", "x"),
        ("S3://", "lake"),
        ("s3://", ""),
        ("s3://", f"u:{SECRET}@h"),
    ],
)
def test_a_store_needs_a_place_in_a_url(schema, host):
    with pytest.raises(ValueError, match=r"schema|host") as caught:
        SessionStateBuilder().with_object_store(schema, LocalFileSystem(), host)
    assert SECRET not in str(caught.value)


def test_options_are_collected_and_checked():
    builder = SessionStateBuilder().with_distributed_option("lease", 4.0)
    state = builder.with_distributed_option("files_per_task", 2).build()
    assert state.options == DistributedOptions(lease=4.0, files_per_task=2)
    assert SessionStateBuilder().build().options == DistributedOptions()
    with pytest.raises(ValueError, match="no option 'leese'; there are broadcast_threshold"):
        builder.with_distributed_option("leese", 4.0)


def test_headers_are_asked_for_at_every_query():
    answers = iter([{"X-Tenant": "a"}, {"X-Tenant": "b"}])
    builder = SessionStateBuilder()
    state = builder.with_distributed_passthrough_headers(lambda: next(answers)).build()
    assert [state.passthrough_headers(), state.passthrough_headers()] == [
        {"x-tenant": "a"},
        {"x-tenant": "b"},
    ]
    assert SessionStateBuilder().build().passthrough_headers() == {}


def test_a_mapping_of_headers_is_copied():
    headers = {"x-tenant": "a"}
    state = SessionStateBuilder().with_distributed_passthrough_headers(headers).build()
    headers["x-tenant"] = "b"
    state.passthrough_headers().clear()
    assert state.passthrough_headers() == {"x-tenant": "a"}


@pytest.mark.parametrize(
    "headers",
    [
        {"": SECRET},
        {"two words": SECRET},
        {"x-\n": SECRET},
        {"grpc-timeout": SECRET},
        {"x-bin": SECRET},
        {"Authorization": SECRET},
        {"x": f"{SECRET}\r\nauthorization: other"},
        {"x": f" {SECRET}"},
        {"x": f"{SECRET}é"},
        {"x": ""},
        {"x": SECRET.encode()},
        {3: SECRET},
        [SECRET],
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_no_header_is_refused_and_not_shown(headers, late):
    def refuse() -> None:
        PassthroughHeaders((lambda: headers) if late else headers)()

    with pytest.raises((TypeError, ValueError)) as caught:
        refuse()
    assert SECRET not in str(caught.value)


def test_no_secret_is_shown(lake, caplog):
    caplog.set_level(logging.DEBUG)
    builder = SessionStateBuilder()
    state = builder.with_distributed_passthrough_headers({"x-key": SECRET}).build()
    shown = [repr(state), str(state), repr(SessionContext(state)), repr(state.passthrough_headers)]
    lake_state = with_lake(lake)
    shown += [repr(lake_state), repr(lake_state.stores), repr(SessionContext(lake_state))]
    assert not [text for text in [*shown, caplog.text] if SECRET in text]


TABLES = {
    "table": pa.table({"a": [1, 2]}),
    "batch": pa.record_batch({"a": [1, 2]}),
    "frame": datafusion.SessionContext().from_pydict({"a": [1, 2]}),
    "dataset": pyarrow.dataset.dataset(pa.table({"a": [1, 2]})),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_are_in_every_session_of_a_state(table):
    state = SessionStateBuilder().with_table("t", table).build()
    for session in (SessionContext(state), SessionContext(state)):
        assert session.sql("SELECT sum(a) AS s FROM t").to_pylist() == [{"s": 3}]


RUNTIME = {
    "set": "SET datafusion.runtime.memory_limit = '1G'",
    "spaces": "-- limit\n/* a /* b */ c */ SET datafusion . \"runtime\".memory_limit = '1G'",
    "reset": "RESET datafusion.runtime.memory_limit",
}


@pytest.mark.parametrize("statement", RUNTIME.values(), ids=RUNTIME)
@pytest.mark.parametrize("method", ["sql", "sql_with_options"])
def test_limits_that_a_statement_set_are_not_lost(statement, method):
    session = SessionContext()
    arguments = () if method == "sql" else (datafusion.SQLOptions(),)
    getattr(session, method)(statement, *arguments)
    assert "memory and disk limits were SET" in session._shared.own_planning


def test_limits_are_noticed_behind_a_parameter():
    session = SessionContext()
    session.sql("SET $option = '1G'", option="datafusion.runtime.memory_limit")
    assert "memory and disk limits were SET" in session._shared.own_planning


@pytest.mark.parametrize(
    "query", ["SET datafusion.execution.batch_size = 100", "SELECT 'set' AS a, 'runtime' AS b"]
)
def test_other_statements_leave_the_limits_alone(query):
    session = SessionContext()
    session.sql(query)
    assert session._shared.own_planning is None


def test_a_session_is_made_from_a_configuration_as_its_base_is():
    config = datafusion.SessionConfig().set("datafusion.execution.batch_size", "100")
    runtime = datafusion.RuntimeEnvBuilder().with_fair_spill_pool(1 << 20)
    for session in (
        SessionContext(config, runtime),
        SessionContext(config=config, runtime=runtime),
    ):
        assert session.state.worker_resolver is None
        assert session.state.runtime is runtime
        copy = session.copied_config().with_information_schema(True)
        shown = datafusion.SessionContext(copy).sql("SHOW datafusion.execution.batch_size")
        assert shown.to_pydict()["value"] == ["100"]
        with pytest.raises(Exception, match="Resources exhausted"):
            session.sql(
                "SELECT array_agg(value) FROM generate_series(1, 1000000) GROUP BY value % 7"
            ).collect()


def test_a_session_is_not_made_from_two_things_or_from_others():
    config = datafusion.SessionConfig()
    with pytest.raises(TypeError, match="not a int"):
        SessionContext(3)
    with pytest.raises(TypeError, match="two configurations"):
        SessionContext(config, config=config)
    with pytest.raises(TypeError, match="a SessionState has a configuration"):
        SessionContext(SessionStateBuilder().build(), config=config)
