"""Worker processes that are told to stop, and coordinators that are killed, in mid-query."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pyarrow.flight as flight
import pytest

import resolver
from resolver import DefaultChannelResolver
from resolver.distributed import LocalCluster, SessionStateBuilder
from resolver.distributed._calls import worker_info
from resolver.distributed._wire import (
    AWAIT_TASK,
    EXECUTE_TASK,
    HEALTH,
    RELEASE_QUERY,
    AwaitRequest,
    OutputKey,
    PartitionTicket,
    TaskReport,
    TaskRequest,
)
from tests.support.distributed import eventually, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

REPOSITORY = Path(resolver.__file__).parents[1]
JOIN = "SELECT o_orderkey, o_comment, c_comment FROM orders JOIN customer ON o_custkey = c_custkey"
SHUFFLED = {
    "broadcast_threshold": 0,
    "bytes_per_task": 0,
    "scan_bytes_per_task": 0,
    "coordinator_threshold": 0,
}

# The first task of a query waits for the gate, as one does that takes its time.
GATED = """
    import os, pathlib, time

    def build(query):
        if not query.headers:  # of no call, but to tell about the worker
            return query.builder.build()
        folder = pathlib.Path(os.environ["GATE"])
        (folder / f"began-{os.getpid()}").touch()
        while not (folder / "open").exists():
            time.sleep(0.01)
        return query.builder.build()
"""


class Gate:
    def __init__(self, folder):
        self.folder = folder

    def open(self):
        (self.folder / "open").touch()

    def wait_for(self, processes):
        paths = [self.folder / f"began-{process.pid}" for process in processes]
        eventually(lambda: all(path.exists() for path in paths))


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    (tmp_path / "gated.py").write_text(textwrap.dedent(GATED))
    yield gate
    gate.open()


@pytest.fixture
def gated(gate):
    """Two workers whose tasks begin when the gate is open."""
    environment = {"GATE": str(gate.folder), "PYTHONPATH": str(gate.folder)}
    with LocalCluster(workers=2, session_builder="gated:build", environment=environment) as cluster:
        yield cluster


@pytest.fixture
def running(gated, gate, register):
    """A query whose first tasks run on both workers; its result is the function's."""
    builder = SessionStateBuilder()
    for name, value in SHUFFLED.items():
        builder.with_distributed_option(name, value)
    with DefaultChannelResolver() as channels:
        session = gated.session(channels, builder=builder)
        register(session)
        outcome = []

        def run():
            try:
                head = session._start(session.sql(JOIN))
                batches = [batch.to_pyarrow() for batch in head.stream()]
                outcome.append((batches, head.report))
                head.close()
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        gate.wait_for(gated.processes)

        def result():
            gate.open()
            thread.join(60)
            assert not thread.is_alive()
            assert isinstance(outcome[0], tuple), outcome
            return outcome[0]

        yield result
        gate.open()
        thread.join(60)


def health(client):
    return json.loads(act(client, HEALTH))["status"]


def all_rows(batches):
    return sorted(repr(list(row.values())) for batch in batches for row in batch.to_pylist())


def act(client, action, body=b""):
    (answer,) = client.do_action(flight.Action(action, body))
    return answer.body.to_pybytes()


def test_a_worker_told_to_stop_finishes_what_runs(gated, gate, planning, single):
    """Its output is there to be fetched until the query ends; then the process does."""
    query = "SELECT o_orderkey, o_comment FROM orders"
    process, key = gated.processes[0], OutputKey("e" * 32, 1, 0, 0)
    with flight.connect(gated.get_urls()[0].replace("http", "grpc")) as client:
        plan = planning.sql(query).execution_plan().to_bytes(planning)
        assert act(client, EXECUTE_TASK, TaskRequest(key, plan, {}, wait=0.0).to_bytes()) == b""
        gate.wait_for([process])
        process.send_signal(signal.SIGTERM)
        eventually(lambda: health(client) == "draining")
        assert act(client, AWAIT_TASK, AwaitRequest(key, 0.0).to_bytes()) == b"", "it still runs"
        gate.open()
        report = TaskReport.parse(act(client, AWAIT_TASK, AwaitRequest(key, 20.0).to_bytes()))
        batches = []
        for partition in range(len(report.partitions)):
            ticket = flight.Ticket(PartitionTicket(key, partition).to_bytes())
            batches += client.do_get(ticket).read_all().to_batches()
        assert all_rows(batches) == rows(single.sql(query).to_arrow_table())
        assert process.poll() is None, "a query still has output here"
        act(client, RELEASE_QUERY, key.query.encode())
    assert process.wait(30) == 0


def test_a_query_goes_on_elsewhere_when_a_worker_is_told_to_stop(gated, running, single):
    process = gated.processes[0]
    with flight.connect(gated.get_urls()[0].replace("http", "grpc")) as client:
        process.send_signal(signal.SIGTERM)
        eventually(lambda: health(client) == "draining")
        request = TaskRequest(OutputKey("f" * 32, 1, 0, 0), b"plan", {})
        with pytest.raises(flight.FlightUnavailableError, match="another one"):
            act(client, EXECUTE_TASK, request.to_bytes())
        assert process.poll() is None, "its task still runs"
    batches, report = running()
    assert all_rows(batches) == rows(single.sql(JOIN).to_arrow_table())
    last = report.stages[max(report.stages)]
    assert {task.url for task in last.tasks} == {gated.get_urls()[1]}
    assert report.retries
    assert all("another one" in why for why in report.retries)
    made_by = {task.url for stage in report.stages.values() for task in stage.tasks}
    assert gated.get_urls()[0] in made_by, "what it had made is not made again"
    assert process.wait(30) == 0


def test_a_second_signal_ends_a_worker_in_mid_task(gated, running, single):
    process = gated.processes[0]
    process.send_signal(signal.SIGTERM)
    with flight.connect(gated.get_urls()[0].replace("http", "grpc")) as client:
        eventually(lambda: health(client) == "draining")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    batches, report = running()
    assert all_rows(batches) == rows(single.sql(JOIN).to_arrow_table())
    assert report.retries


COORDINATOR = """
    import sys
    from resolver.distributed import (
        DistributedPhysicalOptimizerRule, SessionContext, SessionStateBuilder, StaticWorkerResolver
    )

    session = SessionContext(
        SessionStateBuilder()
        .with_distributed_worker_resolver(StaticWorkerResolver(sys.argv[2:]))
        .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
        .with_distributed_option("lease", 2.0)
        .build()
    )
    session.register_parquet("lineitem", sys.argv[1])
    session.sql("SELECT a.l_orderkey FROM lineitem a, lineitem b").collect()
"""


def test_workers_are_empty_and_idle_after_their_coordinator_was_killed(tmp_path, tpch):
    with LocalCluster(workers=2) as cluster, DefaultChannelResolver() as channels:
        urls = cluster.get_urls()

        def infos():
            return [worker_info(channels, url) for url in urls]

        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(COORDINATOR)]
        coordinator = subprocess.Popen(
            [*command, str(tpch / "lineitem"), *urls],
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        try:
            eventually(lambda: all(i["running"] and i["exchange_bytes"] for i in infos()), 60)
        finally:
            coordinator.kill()
            coordinator.wait()
        eventually(lambda: not any(i["running"] or i["queued"] or i["queries"] for i in infos()))
        assert [info["exchange_bytes"] for info in infos()] == [0, 0]
        exchanges = list(cluster._directory.path.glob("resolver-exchange-*"))
        assert len(exchanges) == 2
        eventually(lambda: not any(list(path.glob("*.arrow")) for path in exchanges))
        session = cluster.session(channels)
        session.register_parquet("lineitem", str(tpch / "lineitem"))
        assert session.sql("SELECT * FROM lineitem").count() > 0, "they still serve others"
