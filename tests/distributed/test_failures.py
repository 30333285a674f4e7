"""Workers that die, hang, fill up or are replaced, as real processes: never a partial answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pyarrow as pa
import pytest

from resolver import DefaultChannelResolver, FlightConnector, ResolverError
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    LocalCluster,
    SessionContext,
    SessionStateBuilder,
    TaskFailedError,
    Worker,
)
from tests.support.distributed import names, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Two shuffles of more than what is sent along with a task's report.
JOIN = "SELECT o_orderkey, o_comment, c_comment FROM orders JOIN customer ON o_custkey = c_custkey"
SHUFFLED = {
    "broadcast_threshold": 0,
    "bytes_per_task": 0,
    "scan_bytes_per_task": 0,
    "coordinator_threshold": 0,
}


@pytest.fixture
def resolver() -> Iterator[DefaultChannelResolver]:
    with DefaultChannelResolver(FlightConnector(connect_timeout=1.0)) as resolver:
        yield resolver


@pytest.fixture
def three() -> Iterator[LocalCluster]:
    with LocalCluster(workers=3) as cluster:
        yield cluster
        for process in cluster.processes:
            process.send_signal(signal.SIGCONT)


@pytest.fixture
def session_on(resolver, register):
    def session_on(cluster, **options) -> SessionContext:
        builder = SessionStateBuilder()
        for name, value in options.items():
            builder.with_distributed_option(name, value)
        session = cluster.session(resolver, builder=builder)
        register(session)
        return session

    return session_on


def victim(cluster, url):
    return cluster.processes[list(cluster.get_urls()).index(url)]


def run(session, query, progress=None):
    """The rows and the report of a query."""
    head = session._start(session.sql(query), progress)
    try:
        return [b.to_pyarrow() for b in head.stream()], head.report
    finally:
        head.close()


@pytest.mark.parametrize("stage", [1, 2])
def test_outputs_that_are_lost_between_stages_are_made_again(three, session_on, single, stage):
    session = session_on(three, **SHUFFLED)
    killed = []

    def kill(progress):
        if progress.stage == stage and progress.done == progress.tasks and not killed:
            killed.append(three.processes[-1])
            killed[0].kill()
            killed[0].wait(10)

    batches, report = run(session, JOIN, kill)
    assert killed, "the stage did not run"
    assert report.retries, "nothing was lost: the test is about something else"
    expected = single.sql(JOIN).to_arrow_table()
    assert rows(pa.Table.from_batches(batches)) == rows(expected)
    assert session.sql(JOIN).count() == expected.num_rows, "the next query has two workers"


def test_a_task_whose_worker_is_killed_runs_elsewhere(three, session_on, single):
    session = session_on(three, **SHUFFLED)
    started = []

    def kill(progress):
        if progress.done == 0 and not started:
            started.append(progress.stage)
            three.processes[0].kill()

    batches, report = run(session, JOIN, kill)
    assert report.retries
    expected = single.sql(JOIN).to_arrow_table()
    assert rows(pa.Table.from_batches(batches)) == rows(expected)
    text = session._analyzed(session.sql(JOIN))
    assert "retr" in text


def test_a_stopped_worker_costs_its_timeout_and_no_row(three, session_on, single):
    session = session_on(three, **SHUFFLED, worker_timeout=1.0)
    expected = rows(single.sql(JOIN).to_arrow_table())
    assert rows(session.sql(JOIN).to_arrow_table()) == expected
    three.processes[1].send_signal(signal.SIGSTOP)
    assert rows(session.sql(JOIN).to_arrow_table()) == expected
    three.processes[1].send_signal(signal.SIGCONT)
    assert rows(session.sql(JOIN).to_arrow_table()) == expected, "what it does late does no harm"


def test_a_worker_that_stops_in_the_middle_costs_no_row(three, session_on, single):
    session = session_on(three, **SHUFFLED, worker_timeout=1.0)
    stopped = []

    def stop(progress):
        if progress.stage == 2 and progress.done == progress.tasks and not stopped:
            stopped.append(three.processes[0])
            stopped[0].send_signal(signal.SIGSTOP)

    batches, report = run(session, JOIN, stop)
    assert stopped
    assert report.retries
    expected = single.sql(JOIN).to_arrow_table()
    assert rows(pa.Table.from_batches(batches)) == rows(expected)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_without_any_worker_left_one_error_names_them(three, session_on, how):
    session = session_on(three, **SHUFFLED, worker_timeout=1.0)
    session.sql(JOIN).count()
    for process in three.processes:
        os.kill(process.pid, how)
    with pytest.raises(ResolverError) as raised:
        session.sql(JOIN).collect()
    for url in three.get_urls():
        assert url in str(raised.value)
    assert names(session._shared.exchange().path) == [".lock"]


def test_a_full_exchange_fails_that_query_only(session_on, single):
    with LocalCluster(workers=2, exchange_quota=200_000) as cluster:
        session = session_on(cluster, **SHUFFLED)
        with pytest.raises(TaskFailedError, match="exchange_quota"):
            session.sql(JOIN).collect()
        query = "SELECT c_nationkey, count(*) AS n FROM customer GROUP BY c_nationkey"
        assert rows(session.sql(query).to_arrow_table()) == rows(single.sql(query).to_arrow_table())
        assert all(process.poll() is None for process in cluster.processes)


def test_a_slow_task_is_tried_elsewhere_and_then_given_up(three, session_on):
    session = session_on(three, task_timeout=0.2, task_retries=1)
    slow = (
        "SELECT sum(sin(a.l_extendedprice * b.l_extendedprice)) AS n "
        "FROM lineitem a JOIN lineitem b ON a.l_linenumber <> b.l_linenumber"
    )
    with pytest.raises(ResolverError, match="task_timeout"):
        session.sql(slow).collect()


def test_the_workers_of_a_query_are_those_of_the_moment(tmp_path, register, single, resolver):
    class Changing:
        urls: tuple[str, ...] = ()

        def get_urls(self):
            return self.urls

    workers = Changing()
    session = SessionContext(
        SessionStateBuilder()
        .with_distributed_worker_resolver(workers)
        .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
        .with_distributed_channel_resolver(resolver)
        .with_exchange_dir(tmp_path / "coordinator")
        .build()
    )
    register(session)
    expected = rows(single.sql(JOIN).to_arrow_table())
    for number in range(3):
        with Worker().into_flight_server(exchange_dir=tmp_path / str(number)) as server:
            workers.urls = (server.url,)
            batches, report = run(session, JOIN)
            assert {task.url for s in report.stages.values() for task in s.tasks} == {server.url}
            assert rows(pa.Table.from_batches(batches)) == expected
