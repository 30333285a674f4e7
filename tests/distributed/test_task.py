"""One task: plan bytes in, files out, and nothing a plan does gets past the edge."""

from __future__ import annotations

import threading
from pathlib import Path

import cloudpickle
import datafusion
import pyarrow as pa
import pytest
from datafusion import ExecutionPlan, col, udf

from resolver.distributed import _task
from resolver.distributed._exchange import Exchange, QueryReleasedError, read
from resolver.distributed._plan_proto import PlanNode
from resolver.distributed._settings import EXECUTION
from resolver.distributed._task import InvalidPlanError, decode_plan, run_task
from resolver.distributed._wire import OutputKey, PartitionTicket, TaskRequest
from tests.support.distributed import DirectResolver, configured, names, rows

KEY = OutputKey("0" * 32, 1, 0, 0)


@pytest.fixture
def exchange(tmp_path):
    exchange = Exchange(tmp_path / "exchange")
    yield exchange
    exchange.close()


def request(planning, query):
    plan = query if isinstance(query, ExecutionPlan) else planning.sql(query).execution_plan()
    return TaskRequest(KEY, plan.to_bytes(planning), {})


def run(planning, executing, exchange, query, is_cancelled=lambda: False):
    report = run_task(
        request(planning, query), executing, exchange, is_cancelled, resolver=DirectResolver()
    )
    stored = [exchange.partition(PartitionTicket(KEY, k)) for k in range(len(report.partitions))]
    return report, [list(read(partition)) for partition in stored]


def test_every_partition_is_stored_and_reported(planning, executing, exchange, single):
    query = "SELECT l_orderkey, l_comment FROM lineitem WHERE l_quantity < 3"
    report, partitions = run(planning, executing, exchange, query)
    assert len(partitions) == 3
    assert [p.rows for p in report.partitions] == [
        sum(batch.num_rows for batch in batches) for batches in partitions
    ]
    table = pa.Table.from_batches([batch for batches in partitions for batch in batches])
    assert table.schema.field("l_comment").type == pa.string_view(), "a scan insists on it"
    assert rows(table) == rows(single.sql(query).to_arrow_table())
    declared = pa.ipc.read_schema(pa.py_buffer(report.schema))
    assert declared.field("l_comment").type == pa.string_view()


def test_work_stealing_is_off(planning, exchange, single):
    """With it, one partition reads the files of all, here and in every other task."""
    scan = PlanNode.parse(request(planning, "SELECT l_orderkey FROM lineitem").plan)
    plan = ExecutionPlan.from_bytes(planning, scan.to_bytes())
    counts = {}
    for name, context in (
        ("on", configured({"datafusion.execution.enable_file_stream_work_stealing": "true"})),
        ("off", configured(dict(EXECUTION))),
    ):
        decoded = ExecutionPlan.from_bytes(context, scan.to_bytes())
        counts[name] = sum(b.to_pyarrow().num_rows for b in context.execute(decoded, 0))
    whole = single.table("lineitem").count()
    assert counts["on"] == whole, "DataFusion no longer steals work: the guard can go"
    assert 0 < counts["off"] < whole
    assert plan.partition_count == 3


def test_batches_without_columns_keep_their_count(planning, executing, exchange, single):
    query = "SELECT count(*) FROM (SELECT 1 FROM lineitem WHERE l_quantity < 3 LIMIT 100000)"
    plan = planning.sql(query).execution_plan()
    while plan.display().strip().partition(":")[0] != "FilterExec":
        (plan,) = plan.children()
    _, partitions = run(planning, executing, exchange, plan)
    assert partitions[0][0].num_columns == 0
    expected = single.sql("SELECT l_tax FROM lineitem WHERE l_quantity < 3").count()
    assert sum(batch.num_rows for batches in partitions for batch in batches) == expected


def test_a_task_without_a_batch_reports_its_schema_all_the_same(planning, executing, exchange):
    report, partitions = run(
        planning, executing, exchange, "SELECT l_tax FROM lineitem WHERE l_quantity < 0"
    )
    assert report.probed
    assert pa.ipc.read_schema(pa.py_buffer(report.schema)).names == ["l_tax"]
    assert partitions == [[], [], []]
    assert [(p.rows, p.batches, p.bytes) for p in report.partitions] == [(0, 0, 0)] * 3


def test_all_partitions_run_at_the_same_time(planning, executing, exchange, monkeypatch):
    """One at a time, a repartition would have to buffer the rows of all the others."""
    plan = planning.sql("SELECT l_shipmode, count(*) FROM lineitem GROUP BY 1").execution_plan()
    barrier = threading.Barrier(plan.partition_count, timeout=20)
    written = _task._written

    async def meet(*arguments):
        barrier.wait()
        return await written(*arguments)

    monkeypatch.setattr(_task, "_written", meet)
    report, _ = run(planning, executing, exchange, plan)
    assert sum(p.rows for p in report.partitions) == 7


def test_a_failing_partition_ends_the_task_with_datafusions_words(planning, executing, exchange):
    query = "SELECT CAST(l_comment AS INT) FROM lineitem"
    with pytest.raises(Exception, match="Cannot cast string"):
        run(planning, executing, exchange, query)
    assert names(exchange.path) == [".lock"]


def test_a_panic_is_an_error_of_the_task(planning, executing, exchange, monkeypatch):
    plan = planning.sql("SELECT l_shipmode, count(*) FROM lineitem GROUP BY 1").execution_plan()
    written = _task._written

    async def again(plan, index, context, new_writer):
        list(context.execute(plan, 0))
        return await written(plan, 0, context, new_writer)  # once more: DataFusion panics

    monkeypatch.setattr(_task, "_written", again)
    # No Exception, unless its future ends before it is awaited.
    with pytest.raises(BaseException, match=r"partition not used yet|panicked"):
        run(planning, executing, exchange, plan)
    assert names(exchange.path) == [".lock"]


def test_a_release_ends_a_running_task(planning, executing, exchange):
    def release():
        exchange.release(KEY.query)
        return False

    with pytest.raises(QueryReleasedError):
        run(planning, executing, exchange, "SELECT * FROM lineitem, nation", release)
    assert names(exchange.path) == [".lock"]


def test_a_caller_that_has_gone_ends_a_running_task(planning, executing, exchange):
    with pytest.raises(QueryReleasedError, match="gone away"):
        run(planning, executing, exchange, "SELECT * FROM lineitem, nation, region", lambda: True)
    assert names(exchange.path) == [".lock"]


def test_partitions_that_disagree_about_the_schema_are_an_error(
    planning, executing, exchange, monkeypatch
):
    written = _task._written

    async def odd(plan, index, *rest):
        partition, schema = await written(plan, index, *rest)
        return partition, schema if index else schema.remove(0)

    monkeypatch.setattr(_task, "_written", odd)
    with pytest.raises(ValueError, match="disagree"):
        run(planning, executing, exchange, "SELECT l_tax FROM lineitem")


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x0a\x00", b"\x22\x00", b"\xff" * 99])
def test_garbage_is_no_plan(executing, data):
    with pytest.raises(InvalidPlanError, match="refused"):
        decode_plan(data, executing)


@pytest.mark.parametrize(
    "query",
    [
        "COPY (SELECT l_tax FROM lineitem) TO '{folder}/stolen.csv' STORED AS CSV",
        "COPY (SELECT l_tax FROM lineitem) TO '{folder}/stolen.parquet' STORED AS PARQUET",
        "COPY (SELECT l_tax FROM lineitem) TO '{folder}/stolen.json' STORED AS JSON",
        "SELECT * FROM generate_series(1, 1000000000)",
    ],
)
def test_a_task_only_reads_files_and_computes(planning, executing, exchange, tmp_path, query):
    with pytest.raises(InvalidPlanError, match="no part of a task"):
        run(planning, executing, exchange, query.format(folder=tmp_path))
    assert not list(tmp_path.glob("stolen*"))


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 99])
def test_garbage_is_no_task(executing, exchange, data):
    with pytest.raises(InvalidPlanError, match="refused"):
        run_task(
            TaskRequest(KEY, data, {}),
            executing,
            exchange,
            lambda: False,
            resolver=DirectResolver(),
        )


def test_a_panic_while_decoding_is_a_refusal(executing, monkeypatch):
    class Panic(BaseException):
        pass

    def panic(*_):
        raise Panic("rust says no")

    monkeypatch.setattr(datafusion.ExecutionPlan, "from_bytes", panic)
    with pytest.raises(InvalidPlanError, match="rust says no"):
        decode_plan(b"", executing)


def test_an_interrupt_while_decoding_is_passed_on(executing, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(datafusion.ExecutionPlan, "from_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode_plan(b"", executing)


def test_too_many_partitions_are_refused(executing, planning, monkeypatch):
    monkeypatch.setattr(_task, "MAX_PARTITIONS", 2)
    with pytest.raises(InvalidPlanError, match="3 partitions"):
        decode_plan(request(planning, "SELECT l_tax FROM lineitem").plan, executing)


@pytest.mark.parametrize("partitions", [0, 1_025])
def test_a_plan_that_divides_rows_into_too_many_partitions_is_refused(
    executing, planning, exchange, partitions
):
    plan = PlanNode.parse(request(planning, "SELECT l_tax FROM lineitem").plan)
    divided = PlanNode.hash_repartition([], partitions).over(plan).coalesced()
    sent = TaskRequest(KEY, divided.to_bytes(), {})
    with pytest.raises(InvalidPlanError, match=r"partitions; 1 to 1024 can run"):
        run_task(sent, executing, exchange, lambda: False, resolver=DirectResolver())


def test_garbage_in_an_in_memory_table_does_not_reach_datafusion(executing, exchange):
    """Which would end the process over a size that there is no memory for."""
    session = datafusion.SessionContext()
    session.from_arrow(pa.table({"a": [1, 2, None]}), "t")
    plan = PlanNode.parse(request(session, "SELECT a FROM t").plan)
    for garbage in (b"garbage", b"\xff" * 400):
        sent = TaskRequest(KEY, plan.with_memory(lambda _, found=garbage: found).to_bytes(), {})
        with pytest.raises(InvalidPlanError, match="an in-memory table cannot be read"):
            run_task(sent, executing, exchange, lambda: False, resolver=DirectResolver())


class Bomb:
    """A callable that leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return _explode, (self.mark,)

    def __call__(self, values):
        return values


def _explode(mark):
    Path(mark).write_text("code of the plan's sender ran")
    return abs


@pytest.mark.parametrize("allowed", [False, True])
def test_pickled_python_functions_run_only_where_allowed(planning, executing, tmp_path, allowed):
    mark = tmp_path / "mark"
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
    bomb = udf(Bomb(str(mark)), [pa.int64()], pa.int64(), "volatile", name="bomb")
    frame = planning.table("lineitem").select(bomb(col("l_orderkey")))
    data = frame.execution_plan().to_bytes(planning.with_python_udf_inlining(enabled=True))
    mark.unlink(missing_ok=True)
    if allowed:
        decode_plan(data, executing, allow_python_udfs=True)
    else:
        with pytest.raises(InvalidPlanError, match="Python"):
            decode_plan(data, executing)
    assert mark.exists() == allowed
