"""Queries through a session, on three worker processes, against single-node DataFusion."""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import inspect
from itertools import chain
from pathlib import Path

import datafusion
import duckdb
import duckdb_extension_tpch
import pyarrow as pa
import pytest
from datafusion import col, functions, lit, udf
from datafusion.functions import spark

from resolver import default_channel_resolver
from resolver.distributed import (
    DataFrame,
    DistributedPhysicalOptimizerRule,
    DistributedPlan,
    SessionContext,
    SessionState,
    SessionStateBuilder,
    SingleNodePlan,
    StaticWorkerResolver,
    _lookalikes,
)
from resolver.distributed._calls import worker_info
from resolver.distributed._dataframe import returns_frame
from resolver.distributed._tpch import QUERIES
from tests.support.distributed import DirectResolver, eventually, names, rows

DISTRIBUTED = {
    "Q1": QUERIES[1],
    "Q6": QUERIES[6],
    "rows": "SELECT * FROM lineitem WHERE l_quantity < 3",
    "strings": "SELECT l_shipmode, min(l_comment) AS c FROM lineitem GROUP BY l_shipmode",
    "distinct": "SELECT DISTINCT l_shipmode, l_returnflag FROM lineitem",
    "count distinct": "SELECT count(DISTINCT l_suppkey) AS n FROM lineitem",
    "having": "SELECT l_suppkey, avg(l_tax) AS t FROM lineitem GROUP BY 1 HAVING count(*) > 610",
    "top k": "SELECT l_orderkey, l_linenumber, l_comment FROM lineitem ORDER BY 1 DESC, 2 LIMIT 7",
    "offset": "SELECT l_orderkey, l_linenumber FROM lineitem ORDER BY 1, 2 LIMIT 7 OFFSET 9",
    "sorted": "SELECT o_orderkey, o_comment FROM orders WHERE o_orderkey < 900 ORDER BY 1",
    "rollup": "SELECT l_returnflag, l_shipmode, sum(l_tax) AS t FROM lineitem GROUP BY ROLLUP (l_returnflag, l_shipmode)",
    "ordered aggregate": (
        "SELECT l_shipmode, array_agg(l_orderkey ORDER BY l_orderkey, l_linenumber) AS keys "
        "FROM lineitem WHERE l_quantity < 2 GROUP BY 1"
    ),
    "nested": "SELECT struct(l_shipmode, l_tax) AS s, [l_comment] AS l FROM lineitem WHERE l_tax > 0.07",
    "dictionary": (
        "SELECT arrow_cast(l_comment, 'Dictionary(Int32, Utf8)') AS d FROM lineitem WHERE l_tax > 0.07"
    ),
    "no rows": "SELECT l_comment, l_tax FROM lineitem WHERE l_quantity < 0",
    "no groups": "SELECT l_shipmode, count(*) AS n FROM lineitem WHERE l_quantity < 0 GROUP BY 1",
    "no rows, one answer": "SELECT count(l_tax) AS n, sum(l_tax) AS s FROM lineitem WHERE l_quantity < 0",
    "no columns": "SELECT count(*) AS n FROM (SELECT 1 FROM lineitem WHERE l_quantity < 3 LIMIT 9)",
    "join": "SELECT count(*) AS n FROM orders JOIN customer ON o_custkey = c_custkey",
    "window": "SELECT l_orderkey, rank() OVER (ORDER BY l_orderkey) AS r FROM lineitem WHERE l_tax > 0.07",
    "union": "SELECT o_comment AS c FROM orders UNION ALL SELECT c_comment FROM customer",
}
SINGLE = {
    "small": "SELECT * FROM nation",
    "values": "VALUES (1, 'a'), (2, 'b')",
    "nothing": "SELECT 1 AS one",
}


@pytest.mark.parametrize("query", DISTRIBUTED.values(), ids=DISTRIBUTED)
def test_a_distributed_answer_is_datafusions_answer(session, resolver, single, query):
    frame = session.sql(query)
    plan = frame.distributed_plan()
    assert isinstance(plan, DistributedPlan), plan
    answer, expected = frame.to_arrow_table(), single.sql(query).to_arrow_table()
    answer.validate(full=True)
    assert answer.schema.equals(expected.schema, check_metadata=True)
    assert rows(answer) == rows(expected)
    if "ORDER BY" in query.rpartition(")")[2]:
        assert answer.to_pylist() == expected.to_pylist()
    assert set(resolver.asked) == set(plan.urls)


@pytest.mark.parametrize("query", SINGLE.values(), ids=SINGLE)
def test_any_other_answer_is_datafusions_answer_too(session, resolver, single, query):
    frame = session.sql(query)
    assert isinstance(frame.distributed_plan(), SingleNodePlan)
    resolver.asked.clear()
    assert rows(frame.to_arrow_table()) == rows(single.sql(query).to_arrow_table())
    assert resolver.asked == []


TYPES = [
    "arrow_cast(l_orderkey, 'Float16')",
    "arrow_cast(l_orderkey, 'UInt8')",
    "arrow_cast(l_tax, 'Decimal32(9, 2)')",
    "arrow_cast(l_tax, 'Decimal256(50, 2)')",
    "arrow_cast(l_shipdate, 'Timestamp(Nanosecond, Some(\"+02:00\"))')",
    "arrow_cast(l_shipdate, 'Date64')",
    "arrow_cast(l_orderkey, 'Duration(Second)')",
    "arrow_cast(l_linenumber, 'Time32(Second)')",
    "arrow_cast(l_comment, 'LargeUtf8')",
    "arrow_cast(l_comment, 'BinaryView')",
    "arrow_cast(l_comment, 'Dictionary(Int8, Utf8View)')",
    "arrow_cast([l_comment], 'LargeList(Utf8View)')",
    "arrow_cast([l_comment], 'FixedSizeList(1, Utf8View)')",
    "[[l_comment], NULL]",
    "map([l_comment], [l_tax])",
    "struct(l_comment, [struct(l_tax)])",
    "l_quantity > 2",
    "INTERVAL '1 month 2 days'",
    "NULL",
    "CASE WHEN l_linenumber > 3 THEN l_comment END",
]


@pytest.mark.parametrize("expression", TYPES)
def test_every_type_crosses_the_boundary(session, single, expression):
    query = f"SELECT {expression} AS c FROM lineitem WHERE l_quantity < 2 AND l_orderkey < 250"
    frame = session.sql(query)
    assert isinstance(frame.distributed_plan(), DistributedPlan), frame.distributed_plan()
    answer, expected = frame.to_arrow_table(), single.sql(query).to_arrow_table()
    answer.validate(full=True)
    assert answer.schema.equals(expected.schema, check_metadata=True)
    assert len(rows(expected)) > 5
    assert rows(answer) == rows(expected)


@pytest.mark.parametrize("number", QUERIES)
def test_the_demos_queries_give_the_reference_answers(session, number):
    extension = next(Path(duckdb_extension_tpch.__file__).parent.rglob("*.duckdb_extension"))
    with duckdb.connect(config={"allow_unsigned_extensions": "true"}) as connection:
        connection.execute(f"LOAD '{extension}'")
        (answer,) = connection.execute(
            "SELECT answer FROM tpch_answers() WHERE query_nr = ? AND scale_factor = 0.01", [number]
        ).fetchone()
    header, *lines = answer.strip().splitlines()
    table = session.sql(QUERIES[number]).to_arrow_table()
    assert table.column_names == header.split("|")
    got = [list(row.values()) for row in table.to_pylist()]
    assert len(got) == len(lines)
    for row, line in zip(got, lines, strict=True):
        for value, text in zip(row, line.split("|"), strict=True):
            if isinstance(value, str | dt.date):
                assert str(value) == text
            else:
                assert float(value) == pytest.approx(float(text), rel=1e-9, abs=1e-6)


def frame_and_twin(session, single):
    query = "SELECT l_orderkey, l_shipmode FROM lineitem WHERE l_quantity < 3"
    return session.sql(query), single.sql(query)


def test_every_way_of_getting_rows_is_distributed(session, resolver, single):
    frame, twin = frame_and_twin(session, single)
    expected = rows(twin.to_arrow_table())

    def as_rows(batches):
        return rows(pa.Table.from_batches(batches, schema=frame.schema()))

    def stream(items):
        return as_rows([item.to_pyarrow() for item in items])

    async def collected(items):
        return [item async for item in items]

    ways = {
        "collect": lambda: as_rows(frame.collect()),
        "collect_partitioned": lambda: as_rows(list(chain(*frame.collect_partitioned()))),
        "execute_stream": lambda: stream(frame.execute_stream()),
        "partitioned streams": lambda: stream(
            item for items in frame.execute_stream_partitioned() for item in items
        ),
        "iteration": lambda: stream(frame),
        "async iteration": lambda: stream(asyncio.run(collected(frame))),
        "to_arrow_table": lambda: rows(frame.to_arrow_table()),
        "capsule": lambda: rows(pa.table(frame)),
        "to_pylist": lambda: rows(pa.Table.from_pylist(frame.to_pylist())),
        "to_pydict": lambda: rows(pa.table(frame.to_pydict())),
        "to_pandas": lambda: rows(pa.Table.from_pandas(frame.to_pandas())),
    }
    for name, way in ways.items():
        resolver.asked.clear()
        assert way() == expected, name
        assert len(set(resolver.asked)) == 3, f"{name} did not ask the workers"
    resolver.asked.clear()
    assert frame.count() == twin.count()
    assert len(set(resolver.asked)) == 3
    column = frame.collect_column("l_orderkey")
    assert sorted(column.to_pylist()) == sorted(twin.collect_column("l_orderkey").to_pylist())
    assert len(frame.collect_partitioned()) == 3


def test_every_way_of_getting_rows_works_on_a_single_node(session, single):
    frame, twin = session.sql("SELECT * FROM nation"), single.sql("SELECT * FROM nation")
    expected = rows(twin.to_arrow_table())
    assert rows(pa.table(frame)) == expected
    assert rows(pa.Table.from_batches(chain(*frame.collect_partitioned()))) == expected
    assert rows(pa.Table.from_batches(i.to_pyarrow() for i in frame.execute_stream())) == expected
    assert (
        rows(
            pa.Table.from_batches(
                i.to_pyarrow() for s in frame.execute_stream_partitioned() for i in s
            )
        )
        == expected
    )
    assert frame.count() == 25


def test_polars_gets_a_frame(session, monkeypatch):
    class Polars:
        from_arrow = staticmethod(lambda table: ("polars", table.num_rows))

    monkeypatch.setitem(__import__("sys").modules, "polars", Polars)
    assert session.sql(QUERIES[6]).to_polars() == ("polars", 1)


def test_show_prints_what_datafusion_prints(session, single, capfd):
    for query in (QUERIES[1], DISTRIBUTED["no rows"], SINGLE["small"]):
        session.sql(query).show(3)
        ours = capfd.readouterr().out
        single.sql(query).show(3)
        assert ours == capfd.readouterr().out


def test_explain_prints_the_tree(session, capsys):
    session.sql(QUERIES[6]).explain()
    out = capsys.readouterr().out
    assert "⇐ NetworkCoalesce" in out
    assert "…" in out
    session.sql(QUERIES[6]).explain(verbose=True)
    assert "…" not in capsys.readouterr().out


def test_explain_of_a_single_node_plan_says_why(session, capsys):
    session.sql("SELECT 1 AS one").explain()
    out = capsys.readouterr().out
    assert out.startswith("┌───── Single node")
    assert "not distributed: " in out


def test_explain_with_options_is_datafusions_own(session, capfd):
    session.sql("SELECT 1").explain(analyze=True)
    assert "Plan with Metrics" in capfd.readouterr().out


def test_a_frame_stays_distributed_through_every_method(session, single):
    frame = session.table("lineitem")
    built = (
        frame.filter(col("l_quantity") < lit(3))
        .with_column("double", col("l_tax") * lit(2))
        .aggregate([col("l_shipmode")], [functions.sum(col("double")).alias("s")])
        .sort(col("l_shipmode"))
    )
    twin = single.sql(
        "SELECT l_shipmode, sum(l_tax * 2) AS s FROM lineitem WHERE l_quantity < 3 GROUP BY 1 ORDER BY 1"
    )
    assert isinstance(built.distributed_plan(), DistributedPlan)
    assert rows(built.to_arrow_table()) == rows(twin.to_arrow_table())


@pytest.mark.parametrize(
    ("ours", "base"),
    [
        (DataFrame, datafusion.DataFrame),
        (SessionContext, datafusion.SessionContext),
    ],
)
def test_every_method_that_gives_a_frame_gives_one_of_ours(ours, base):
    giving = [name for name, function in vars(base).items() if returns_frame(function)]
    assert len(giving) > 5
    assert [name for name in giving if getattr(ours, name) is getattr(base, name)] == []


def test_methods_that_give_a_frame_keep_the_session(session):
    frame = session.table("nation")
    for made in (
        frame.limit(1),
        frame.transform(lambda f: f.limit(2)),
        session.from_pydict({"a": [1]}),
        session.sql_with_options("SELECT 1", datafusion.SQLOptions()),
    ):
        assert isinstance(made, DataFrame)
        assert made._session is session


def test_another_handle_on_the_session_is_one_of_ours(session):
    handle = session.with_python_udf_inlining(enabled=False)
    assert isinstance(handle, SessionContext)
    assert handle.state is session.state
    assert isinstance(handle.sql(QUERIES[6]).distributed_plan(), DistributedPlan)
    assert isinstance(session.enable_url_table(), SessionContext)


def test_settings_reach_the_workers(session, single):
    """A plan under another time zone on the workers would give other rows."""
    query = "SELECT max(to_timestamp('2024-01-01T00:00:00' || substr(l_comment, 1, 0))) AS t FROM lineitem"
    try:
        for context in (session, single):
            context.sql("SET datafusion.execution.time_zone = '+05:00'")
        frame = session.sql(query)
        assert isinstance(frame.distributed_plan(), DistributedPlan)
        assert frame.to_pylist() == single.sql(query).to_pylist()
    finally:
        single.sql("RESET datafusion.execution.time_zone")


def test_what_a_user_turns_on_again_does_not_break_a_distributed_plan(session, single):
    session.sql("SET datafusion.execution.enable_file_stream_work_stealing = true")
    session.sql("SET datafusion.optimizer.enable_dynamic_filter_pushdown = true")
    for name in ("top k", "sorted", "Q1", "rows"):
        frame = session.sql(DISTRIBUTED[name])
        assert isinstance(frame.distributed_plan(), DistributedPlan)
        answer, expected = frame.to_arrow_table(), single.sql(DISTRIBUTED[name]).to_arrow_table()
        assert rows(answer) == rows(expected)
        if name != "rows":
            assert answer.to_pylist() == expected.to_pylist()


def test_a_python_function_runs_on_a_single_node(session):
    double = udf(lambda a: a, [pa.int64()], pa.int64(), "volatile", name="identity")
    session.register_udf(double)
    frame = session.sql("SELECT sum(identity(l_orderkey)) AS s FROM lineitem")
    assert "Python function" in frame.distributed_plan().reason
    assert frame.to_pylist() == session.sql("SELECT sum(l_orderkey) AS s FROM lineitem").to_pylist()


def test_text_files_are_distributed_if_a_worker_reads_them_alike(session, single, tmp_path):
    """Terminator, compression and array format are lost on the wire without a trace."""
    for name in ("csv", "terminated", "zipped", "json", "array", "gzjson"):
        (tmp_path / name).mkdir()
    for part in range(3):
        (tmp_path / "csv" / f"{part}.csv").write_text("a\n1\n2\n")
        (tmp_path / "terminated" / f"{part}.csv").write_text("1;2;3;4;")
        (tmp_path / "json" / f"{part}.json").write_text('{"a": 1}\n{"a": 2}\n')
        (tmp_path / "array" / f"{part}.json").write_text('[{"a": 1}, {"a": 2}]')
        for name, text in (("zipped", "a\n1\n2\n"), ("gzjson", '{"a": 1}\n{"a": 2}\n')):
            ending = "csv" if name == "zipped" else "json"
            with gzip.open(tmp_path / name / f"{part}.{ending}.gz", "wt") as file:
                file.write(text)
    terminated = "'format.has_header' 'false', 'format.terminator' ';'"
    for each in (session, single):
        each.register_csv("csv", tmp_path / "csv")
        each.sql(
            f"CREATE EXTERNAL TABLE terminated(a BIGINT) STORED AS CSV "
            f"LOCATION '{tmp_path}/terminated/' OPTIONS({terminated})"
        ).collect()
        each.register_csv(
            "zipped", tmp_path / "zipped", file_extension=".csv.gz", file_compression_type="gzip"
        )
        each.register_json("json", tmp_path / "json")
        each.sql(
            f"CREATE EXTERNAL TABLE array STORED AS JSON LOCATION '{tmp_path}/array/' "
            "OPTIONS('format.newline_delimited' 'false')"
        ).collect()
        each.register_json(
            "gzjson", tmp_path / "gzjson", file_extension=".json.gz", file_compression_type="gzip"
        )
    reasons = {
        "csv": None,
        "json": None,
        "terminated": "CSV with terminator ';'",
        "zipped": "CSV with compression 'gzip'",
        "array": "JSON with newline delimited 'false'",
        "gzjson": "JSON with compression 'gzip'",
    }
    for table, reason in reasons.items():
        query = f'SELECT count(*) AS n, sum(a) AS s FROM "{table}"'
        frame = session.sql(query)
        plan = frame.distributed_plan()
        if reason is None:
            assert isinstance(plan, DistributedPlan), plan
        else:
            assert reason in plan.reason
        assert frame.to_pylist() == single.sql(query).to_pylist()


@pytest.mark.parametrize("arrive", ["enable_spark_functions", "register_udf"])
def test_a_function_that_looks_like_a_builtin_stays_at_home(session, arrive):
    query = "SELECT concat(l_shipmode, l_returnflag) AS c, count(*) AS n FROM lineitem GROUP BY 1"
    assert isinstance(session.sql(query).distributed_plan(), DistributedPlan)
    if arrive == "enable_spark_functions":
        session.enable_spark_functions()
    else:
        session.register_udf(
            udf(lambda text: text, [pa.string()], pa.string(), "immutable", name="Upper")
        )
    assert "take for DataFusion's own" in session.sql(query).distributed_plan().reason


def test_spark_functions_of_a_data_frame_stay_at_home(session, monkeypatch):
    monkeypatch.setattr(_lookalikes._spark, "was_asked", False)
    frame = session.table("lineitem").aggregate([col("l_shipmode")], [])
    assert isinstance(frame.distributed_plan(), DistributedPlan)
    spark.concat(col("l_shipmode"), col("l_returnflag"))
    assert "take for DataFusion's own" in frame.distributed_plan().reason


def test_aggregates_with_an_order_of_their_own_stay_at_home(session, single):
    query = (
        "SELECT l_shipmode, first_value(l_tax ORDER BY l_comment) AS f, "
        "last_value(l_tax ORDER BY l_comment) AS l FROM lineitem GROUP BY l_shipmode"
    )
    frame = session.sql(query)
    assert "ORDER BY of its own" in frame.distributed_plan().reason
    assert rows(frame.to_arrow_table()) == rows(single.sql(query).to_arrow_table())


@pytest.mark.parametrize(
    "query",
    [
        "SELECT version() AS v, 1 AS x",
        "SELECT CASE WHEN l_tax IS NULL THEN 'x' ELSE l_comment END AS c FROM lineitem",
        "SELECT grouping(l_tax) AS g, count(*) AS n FROM lineitem GROUP BY CUBE (l_tax)",
        "SELECT l_shipmode FROM lineitem WHERE l_tax < -1",
    ],
)
def test_every_way_to_a_table_works_where_schemas_differ(session, single, query):
    frame, expected = session.sql(query), rows(single.sql(query).to_arrow_table())
    assert rows(frame.to_arrow_table()) == expected
    assert rows(pa.table(frame)) == expected
    assert len(frame.to_pylist()) == len(expected)
    frame.show()


def test_the_global_session_is_still_to_be_had():
    assert isinstance(SessionContext.global_ctx(), datafusion.SessionContext)


def test_output_is_gone_when_a_query_ends(session):
    path = session._shared.exchange().path

    def nothing_left():
        return names(path) == [".lock"]

    session.sql(QUERIES[1]).collect()
    assert nothing_left()
    stream = session.sql(DISTRIBUTED["rows"]).execute_stream()
    next(stream)
    assert not nothing_left()
    del stream
    eventually(nothing_left)
    for _ in session.sql(DISTRIBUTED["rows"]).execute_stream():
        assert not nothing_left()
    assert nothing_left()
    streams = session.sql(DISTRIBUTED["rows"]).execute_stream_partitioned()
    del streams
    eventually(nothing_left)


def test_workers_hold_nothing_after_a_query(cluster, session, resolver):
    session.sql(QUERIES[1]).collect()
    for url in cluster.get_urls():
        assert worker_info(resolver, url)["queries"] == 0


def state(**parts):
    builder = SessionStateBuilder()
    for name, value in parts.items():
        getattr(builder, f"with_{name}")(value)
    return builder.build()


def test_without_a_rule_or_workers_a_session_is_plain_datafusion(register):
    rule = DistributedPhysicalOptimizerRule()
    none = StaticWorkerResolver([])
    for parts, reason in (
        ({}, "no DistributedPhysicalOptimizerRule"),
        ({"physical_optimizer_rule": rule}, "no worker resolver"),
        (
            {"physical_optimizer_rule": rule, "distributed_worker_resolver": none},
            "names no workers",
        ),
    ):
        plain = SessionContext(state(**parts))
        register(plain)
        assert reason in plain.sql(QUERIES[6]).distributed_plan().reason
        assert len(plain.sql(QUERIES[6]).collect()) == 1
    assert len(SessionContext().sql("SELECT 1").collect()) == 1


def test_sessions_that_plan_in_their_own_way_are_left_alone(session, monkeypatch):
    for name in ("add_physical_optimizer_rule", "set_query_planner"):
        monkeypatch.setattr(datafusion.SessionContext, name, lambda self, what: None)
        session._shared.own_planning = None
        getattr(session, name)(object())
        assert "of its own" in session.sql(QUERIES[6]).distributed_plan().reason
    session._shared.own_planning = None
    monkeypatch.setattr(datafusion.SessionContext, "with_extensions", lambda self, *_: self)
    handle = session.with_extensions(object())
    assert "of its own" in handle.sql(QUERIES[6]).distributed_plan().reason


def test_a_query_that_cannot_be_planned_elsewhere_runs_here(session, monkeypatch):
    def fail(*_):
        raise RuntimeError("no suitable object store")

    monkeypatch.setattr(datafusion.SessionContext, "create_dataframe_from_logical_plan", fail)
    frame = session.sql(QUERIES[6])
    assert "no suitable object store" in frame.distributed_plan().reason
    assert len(frame.collect()) == 1


def test_defaults_of_the_builder():
    built = SessionStateBuilder().build()
    assert isinstance(built, SessionState)
    assert built.channel_resolver is default_channel_resolver()


def test_a_resolver_that_holds_no_client_yet_is_taken():
    class Empty(DirectResolver):
        def __len__(self):
            return 0

    empty = Empty()
    assert not empty
    assert state(distributed_channel_resolver=empty).channel_resolver is empty


def test_the_builder_takes_configuration_and_copies_it(tmp_path):
    config = datafusion.SessionConfig().with_batch_size(111)
    built = (
        SessionStateBuilder()
        .with_config(config)
        .with_options({"datafusion.execution.target_partitions": 5})
        .with_runtime(datafusion.RuntimeEnvBuilder().with_disk_manager_os())
        .with_exchange_dir(tmp_path)
        .build()
    )
    config.with_batch_size(222)
    shown = SessionContext(built)
    shown.sql("SET datafusion.catalog.information_schema = true")
    values = shown.sql(
        "SELECT value FROM information_schema.df_settings WHERE name IN "
        "('datafusion.execution.batch_size', 'datafusion.execution.target_partitions') ORDER BY name"
    ).to_pydict()
    assert values["value"] == ["111", "5"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("distributed_worker_resolver", "get_urls"),
        ("distributed_channel_resolver", "get_flight_client_for_url"),
        ("physical_optimizer_rule", "DistributedPhysicalOptimizerRule"),
    ],
)
def test_the_builder_refuses_what_is_not_what_it_needs(method, message):
    with pytest.raises(TypeError, match=message):
        getattr(SessionStateBuilder(), f"with_{method}")(object())


def test_the_builder_refuses_unknown_options():
    with pytest.raises(ValueError, match="nope"):
        SessionStateBuilder().with_options({"datafusion.nope": 1}).build()


def test_static_workers_are_checked_and_counted_once():
    resolver = StaticWorkerResolver(["grpc://a:1", "http://A:1/", "http://b:2"])
    assert list(resolver.get_urls()) == ["http://a:1", "http://b:2"]
    assert "http://b:2" in repr(resolver)
    with pytest.raises(TypeError, match="list"):
        StaticWorkerResolver("http://a:1")
    with pytest.raises(ValueError, match="scheme"):
        StaticWorkerResolver(["a:1"])


def test_workers_are_asked_for_at_every_query(cluster, register):
    class Workers:
        asked = 0

        def get_urls(self):
            self.asked += 1
            return list(cluster.get_urls())[: self.asked]

    workers = Workers()
    session = SessionContext(
        state(
            distributed_worker_resolver=workers,
            physical_optimizer_rule=DistributedPhysicalOptimizerRule(),
            distributed_channel_resolver=DirectResolver(),
        )
    )
    register(session)
    frame = session.sql(QUERIES[6])
    assert [len(frame.distributed_plan().urls) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("urls", [None, "http://127.0.0.1:1", b"http://127.0.0.1:1"])
def test_what_is_no_list_of_urls_is_refused_by_the_name_of_its_resolver(register, urls):
    class Workers:
        def get_urls(self):
            return urls

    session = SessionContext(
        state(
            distributed_worker_resolver=Workers(),
            physical_optimizer_rule=DistributedPhysicalOptimizerRule(),
        )
    )
    register(session)
    with pytest.raises(TypeError, match=r"^Workers\.get_urls\(\) returned .*, not a list of"):
        session.sql(QUERIES[6]).collect()


def test_the_public_names_are_what_they_say():
    import resolver.distributed as package

    assert list(package.__all__) == sorted(package.__all__)
    for name in package.__all__:
        assert inspect.getdoc(getattr(package, name)), name


def test_a_union_on_a_single_node_is_handed_over_as_it_is(session):
    """DataFusion's own Arrow stream declares the types from before they were made one."""
    session.from_arrow(pa.table({"k": pa.array([1], pa.int32())}), name="narrow")
    frame = session.sql("SELECT k FROM narrow UNION ALL SELECT 2 UNION ALL SELECT 3")
    assert isinstance(frame.distributed_plan(), SingleNodePlan)
    table = pa.table(frame)
    table.validate(full=True)
    assert table.schema.types == [pa.int64()]
    assert sorted(table.column(0).to_pylist()) == [1, 2, 3]


def test_more_slots_than_a_task_may_have_partitions_are_planned_for_as_those(server, register):
    state = SessionStateBuilder().with_distributed_worker_resolver(
        StaticWorkerResolver([server.url])
    )
    rule = DistributedPhysicalOptimizerRule(partitions_per_slot=2_000)
    session = SessionContext(state.with_physical_optimizer_rule(rule).build())
    register(session)
    frame = session.sql("SELECT l_orderkey, sum(l_quantity) FROM lineitem GROUP BY 1")
    plan = session._staged(frame)
    assert isinstance(plan, DistributedPlan), plan
    assert plan.stages[0].tree.partitions == 1_024
