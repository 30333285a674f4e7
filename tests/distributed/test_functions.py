"""Functions and headers that both sides know: by name, over real Flight servers."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import udf

from resolver import DefaultChannelResolver
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    DistributedPlan,
    SessionContext,
    SessionStateBuilder,
    SingleNodePlan,
    StaticWorkerResolver,
    Worker,
)
from tests.support.distributed import DirectResolver, rows

INCREMENT = udf(
    lambda values: pc.add(values, 1), [pa.int64()], pa.int64(), "immutable", name="increment"
)
QUERY = "SELECT sum(increment(l_orderkey)) AS s FROM lineitem"


@pytest.fixture
def session_on(tmp_path, register):
    """A session on two workers made with ``worker``; ``builder`` brings more."""
    with DefaultChannelResolver() as resolver:
        servers = []

        def session_on(worker, builder):
            for number in range(2):
                folder = tmp_path / str(number)
                servers.append(worker.into_flight_server(exchange_dir=folder))
            session = SessionContext(
                builder.with_distributed_worker_resolver(
                    StaticWorkerResolver([server.url for server in servers])
                )
                .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
                .with_distributed_channel_resolver(resolver)
                .with_exchange_dir(tmp_path / "coordinator")
                .build()
            )
            register(session)
            return session

        yield session_on
        for server in servers:
            server.shutdown()


def expected(single):
    return single.sql("SELECT sum(l_orderkey + 1) AS s FROM lineitem").to_pydict()


def test_a_function_that_both_sides_have_is_called_by_name(session_on, single):
    worker = Worker.from_session_builder(lambda query: query.builder.with_udf(INCREMENT).build())
    session = session_on(worker, SessionStateBuilder().with_udf(INCREMENT))
    frame = session.sql(QUERY)
    assert isinstance(frame.distributed_plan(), DistributedPlan)
    assert frame.to_pydict() == expected(single)


def test_a_function_that_only_the_session_has_is_called_here(session_on, single):
    session = session_on(Worker(), SessionStateBuilder())
    session.register_udf(INCREMENT)
    frame = session.sql(QUERY)
    plan = frame.distributed_plan()
    assert isinstance(plan, SingleNodePlan)
    assert "with_udf" in plan.reason
    assert frame.to_pydict() == expected(single)


def test_a_function_travels_where_both_sides_say_so(session_on, single):
    builder = SessionStateBuilder().with_distributed_option("python_udfs", True)
    session = session_on(Worker(allow_python_udfs=True), builder)
    session.register_udf(INCREMENT)
    frame = session.sql(QUERY)
    assert isinstance(frame.distributed_plan(), DistributedPlan)
    assert frame.to_pydict() == expected(single)


def test_a_function_that_travelled_may_leave_no_rows(session_on, single):
    """Without a batch the plan is asked for its schema, functions and all."""
    builder = SessionStateBuilder().with_distributed_option("python_udfs", True)
    session = session_on(Worker(allow_python_udfs=True), builder)
    session.register_udf(INCREMENT)
    frame = session.sql(
        "SELECT increment(l_orderkey) AS k, count(*) AS n FROM lineitem "
        "WHERE increment(l_linenumber) > 100 GROUP BY 1"
    )
    assert isinstance(frame.distributed_plan(), DistributedPlan)
    table = frame.to_arrow_table()
    assert (table.num_rows, table.column_names) == (0, ["k", "n"])


def test_headers_reach_every_worker_once_per_query(session_on):
    seen = []

    def build(query):
        seen.append(query.headers.get("x-tenant"))
        return query.builder.build()

    builder = SessionStateBuilder().with_distributed_passthrough_headers({"x-tenant": "blue"})
    builder.with_distributed_option("scan_bytes_per_task", 0)
    session = session_on(Worker.from_session_builder(build), builder)
    assert session.sql("SELECT sum(l_tax) AS n FROM lineitem").to_pydict()["n"][0]
    assert seen.count("blue") == 2, "once for each worker"


def test_workers_fetch_from_one_another_through_their_own_resolver(session_on, single):
    """More than goes along with a report, shuffled: each worker reads from the other."""
    own = DirectResolver()
    worker = Worker.from_session_builder(
        lambda query: query.builder.with_distributed_channel_resolver(own).build()
    ).with_slots(1)
    builder = SessionStateBuilder().with_distributed_option("broadcast_threshold", 0)
    for option in ("bytes_per_task", "scan_bytes_per_task"):
        builder.with_distributed_option(option, 0)
    session = session_on(worker, builder)
    query = "SELECT o_comment, c_comment FROM orders JOIN customer ON o_custkey = c_custkey"
    report = session._start(frame := session.sql(query)).report
    assert report.fetched_bytes > report.head_fetched_bytes
    urls = {task.url for stage in report.stages.values() for task in stage.tasks}
    assert set(own.asked) == urls
    # Both sides of the join, each worker from the other: what is its own is read in place.
    assert len(own.asked) == 4
    assert rows(frame.to_arrow_table()) == rows(single.sql(query).to_arrow_table())
