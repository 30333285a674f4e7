"""What a worker answers over real Flight: leases, listings, pieces of partitions, quotas."""

from __future__ import annotations

import functools
import json
import types

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from resolver import DefaultChannelResolver
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    SessionContext,
    SessionStateBuilder,
    StaticWorkerResolver,
    Worker,
    _exchange,
    _worker_calls,
)
from resolver.distributed._calls import worker_info
from resolver.distributed._plan_proto import PlanNode
from resolver.distributed._task import InvalidPlanError, decode_plan
from resolver.distributed._wire import (
    AWAIT_TASK,
    EXECUTE_TASK,
    HEALTH,
    RELEASE_OUTPUTS,
    RELEASE_QUERY,
    RENEW_LEASE,
    WORKER_INFO,
    AwaitRequest,
    OutputKey,
    PartitionTicket,
    ReleaseRequest,
    TaskReport,
    TaskRequest,
)
from tests.support.distributed import DirectResolver, eventually, names, rows

QUERY = "0123456789abcdef" * 2
KEY = OutputKey(QUERY, 1, 0, 0)
SOME = "SELECT l_orderkey, l_shipmode FROM lineitem WHERE l_quantity < 9"
ENDLESS = "SELECT a.l_orderkey FROM lineitem a, lineitem b"  # gives rows all the time


def act(client, action, body=b"", options=None):
    """The one result of an action."""
    (result,) = client.do_action(flight.Action(action, body), options)
    return result.body.to_pybytes()


def request(planning, query, key=KEY, **fields):
    plan = planning.sql(query).execution_plan().to_bytes(planning)
    return TaskRequest(key, plan, {}, **fields)


def execute(client, request):
    """Start a task and wait for it, as a coordinator does."""
    answer = act(client, EXECUTE_TASK, request.to_bytes())
    while not answer:
        answer = act(client, AWAIT_TASK, AwaitRequest(request.output, 1.0).to_bytes())
    return TaskReport.parse(answer)


def get(client, partition, first_batch=0, key=KEY):
    ticket = PartitionTicket(key, partition, first_batch)
    return client.do_get(flight.Ticket(ticket.to_bytes()))


def output_of(server):
    """The queries that have files in the exchange directory."""
    return sorted(
        {name.partition("-")[0] for name in names(server._exchange.path) if name != ".lock"}
    )


@pytest.fixture
def clock(monkeypatch):
    """The time by which leases run out; goes on only when it is told to."""
    clock = types.SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(
        _exchange, "time", types.SimpleNamespace(monotonic=lambda: clock.now), raising=True
    )
    return clock


def test_a_lease_that_runs_out_ends_a_query_and_its_files(server, client, planning, clock):
    execute(client, request(planning, SOME, lease=60.0))
    assert output_of(server) == [QUERY]
    clock.now += 61.0
    eventually(lambda: server._exchange.queries() == 0)
    eventually(lambda: output_of(server) == [])
    with pytest.raises(pa.ArrowKeyError, match="does not hold"):
        get(client, 0).read_all()
    assert json.loads(act(client, WORKER_INFO))["exchange_bytes"] == 0


def test_a_renewed_lease_counts_from_its_renewal(server, client, planning, clock):
    execute(client, request(planning, SOME, lease=60.0))
    for _ in range(3):
        clock.now += 50.0
        assert act(client, RENEW_LEASE, QUERY.encode()) == b""
        server._calls.end_abandoned_queries()
        assert output_of(server) == [QUERY]
    clock.now += 61.0
    eventually(lambda: output_of(server) == [])


def test_reading_and_awaiting_keep_a_query(server, client, planning, clock):
    execute(client, request(planning, SOME, lease=60.0))
    for use in (
        lambda: get(client, 0).read_all(),
        lambda: act(client, AWAIT_TASK, AwaitRequest(KEY, 0.0).to_bytes()),
    ):
        clock.now += 50.0
        use()
        server._calls.end_abandoned_queries()
        assert output_of(server) == [QUERY]


def test_a_lease_that_runs_out_stops_a_running_task(server, client, planning, clock):
    assert act(client, EXECUTE_TASK, request(planning, ENDLESS, wait=0.0).to_bytes()) == b""
    eventually(lambda: json.loads(act(client, WORKER_INFO))["running"] == 1)
    clock.now += 61.0
    eventually(lambda: json.loads(act(client, WORKER_INFO))["running"] == 0)
    eventually(lambda: output_of(server) == [])


@pytest.mark.parametrize(
    ("body", "error"),
    [(b"f" * 32, pa.ArrowKeyError), (b"../../etc", pa.ArrowInvalid), (b"", pa.ArrowInvalid)],
)
def test_only_a_query_that_is_kept_can_be_renewed(client, body, error):
    with pytest.raises(error):
        act(client, RENEW_LEASE, body)
    assert json.loads(act(client, WORKER_INFO))["queries"] == 0


def test_a_query_that_is_over_cannot_be_renewed(client, planning):
    execute(client, request(planning, SOME))
    act(client, RELEASE_QUERY, QUERY.encode())
    with pytest.raises((pa.ArrowKeyError, flight.FlightCancelledError)):
        act(client, RENEW_LEASE, QUERY.encode())


def test_actions_are_listed_with_what_they_do(client):
    actions = {action.type: action.description for action in client.list_actions()}
    assert set(actions) == {
        EXECUTE_TASK,
        AWAIT_TASK,
        RELEASE_OUTPUTS,
        RELEASE_QUERY,
        RENEW_LEASE,
        WORKER_INFO,
        HEALTH,
    }
    assert all(actions.values())


def test_flights_are_the_stored_partitions(server, client, planning):
    assert list(client.list_flights()) == []
    report = execute(client, request(planning, SOME))
    flights = list(client.list_flights())
    assert len(flights) == len(report.partitions) == 3
    assert sorted(info.total_records for info in flights) == sorted(
        partition.rows for partition in report.partitions
    )
    for info in flights:
        (endpoint,) = info.endpoints
        assert [location.uri.decode() for location in endpoint.locations] == [server.location]
        table = client.do_get(endpoint.ticket).read_all()
        assert table.num_rows == info.total_records
        assert table.schema == info.schema
        assert info.descriptor.path[0] == QUERY.encode()
    act(client, RELEASE_QUERY, QUERY.encode())
    assert list(client.list_flights()) == []


def test_an_output_is_removed_while_its_query_goes_on(server, client, planning):
    other = OutputKey(QUERY, 1, 1, 0)
    for key in (KEY, other):
        execute(client, request(planning, SOME, key))
    files, size = names(server._exchange.path), server._exchange.bytes
    for _ in range(2):  # it may be told twice
        act(client, RELEASE_OUTPUTS, ReleaseRequest((KEY,)).to_bytes())
        assert server._exchange.bytes == size / 2
    assert len(names(server._exchange.path)) - 1 == (len(files) - 1) / 2
    with pytest.raises(pa.ArrowKeyError):
        get(client, 0)
    assert get(client, 0, key=other).read_all().num_rows
    with pytest.raises(pa.ArrowInvalid, match="already"):
        execute(client, request(planning, SOME))
    act(client, RELEASE_QUERY, QUERY.encode())
    assert server._exchange.bytes == 0


def test_health_and_refusals_while_draining(server, client, planning):
    """What runs may be waited for and fetched; what is new has to go elsewhere."""
    execute(client, request(planning, SOME))
    assert json.loads(act(client, HEALTH)) == {"status": "serving"}
    server.start_draining()
    assert json.loads(act(client, HEALTH)) == {"status": "draining"}
    with pytest.raises(flight.FlightUnavailableError, match="another one"):
        execute(client, request(planning, SOME, OutputKey(QUERY, 1, 1, 0)))
    assert get(client, 0).read_all().num_rows
    assert act(client, AWAIT_TASK, AwaitRequest(KEY, 0.0).to_bytes())


def test_a_worker_tells_its_version_slots_and_load(tmp_path, planning):
    worker = Worker().with_version("build-7").with_slots(1)
    with (
        worker.into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
        DefaultChannelResolver() as resolver,
    ):
        first = worker_info(resolver, server.url)
        assert (first["version"], first["slots"]) == ("build-7", 1)
        assert (first["running"], first["queued"], first["exchange_bytes"]) == (0, 0, 0)
        for task in range(3):
            key = OutputKey(QUERY, 1, task, 0)
            act(client, EXECUTE_TASK, request(planning, ENDLESS, key, wait=0.0).to_bytes())
        busy = worker_info(resolver, server.url)
        assert (busy["running"], busy["queued"], busy["queries"]) == (1, 2, 1)
        assert busy["uptime"] > first["uptime"]
        act(client, RELEASE_QUERY, QUERY.encode())
        eventually(lambda: worker_info(resolver, server.url)["running"] == 0)
        assert worker_info(resolver, server.url)["queued"] == 0


class TellingResolver(DirectResolver):
    """A resolver that tells of itself something else than ours."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def stats(self):
        return self.told()


@pytest.mark.parametrize("told", [lambda: {"hits": 1}, object, lambda: 1 / 0])
def test_a_worker_answers_whatever_its_resolver_tells(tmp_path, planning, told):
    worker = Worker.from_session_builder(
        lambda query: query.builder.with_distributed_channel_resolver(TellingResolver(told)).build()
    )
    with (
        worker.into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
    ):
        execute(client, request(planning, SOME))
        info = json.loads(act(client, WORKER_INFO))
    assert (info["resolver"], info["resolver_stats"]) == ("TellingResolver", {})


DICTIONARIES = (
    "SELECT l_orderkey, arrow_cast(l_shipmode, 'Dictionary(Int32, Utf8)') AS mode, "
    "arrow_cast(l_comment, 'Dictionary(Int32, Utf8)') AS comment FROM lineitem"
)


@pytest.mark.parametrize("query", ["SELECT l_orderkey, l_comment FROM lineitem", DICTIONARIES])
def test_a_partition_is_served_in_pieces(client, planning, single, monkeypatch, query):
    """A reader asks for the batch that it has not seen yet, until it has them all."""
    monkeypatch.setattr(_worker_calls, "PIECE_BYTES", 400_000)
    report = execute(client, request(planning, query))
    tables, pieces = [], 0
    for index, partition in enumerate(report.partitions):
        seen = 0
        while seen < partition.batches:
            batches = [chunk.data for chunk in get(client, index, seen)]
            assert batches, "a piece has one batch at least"
            seen += len(batches)
            pieces += 1
            tables += [pa.Table.from_batches([batch]) for batch in batches]
        assert seen == partition.batches
        assert get(client, index, seen).read_all().num_rows == 0
        with pytest.raises(pa.ArrowInvalid, match="first_batch"):
            get(client, index, seen + 1).read_all()
    assert pieces > 2 * len(report.partitions)
    expected = single.sql(query).to_arrow_table()
    assert sorted(n for t in tables for n in rows(t)) == rows(expected)


@pytest.fixture
def two(tmp_path, register):
    """A session on two workers in this process, and the workers."""
    servers = [Worker().into_flight_server(exchange_dir=tmp_path / f"w{n}") for n in range(2)]

    def session(**options):
        builder = (
            SessionStateBuilder()
            .with_distributed_worker_resolver(StaticWorkerResolver([s.url for s in servers]))
            .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
            .with_distributed_channel_resolver(DirectResolver())
            .with_exchange_dir(tmp_path / "coordinator")
        )
        for name, value in options.items():
            builder.with_distributed_option(name, value)
        context = SessionContext(builder.build())
        register(context)
        return context

    yield session
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_dictionaries_survive_pieces_and_shuffles(two, single, monkeypatch, compression):
    monkeypatch.setattr(_worker_calls, "PIECE_BYTES", 300_000)
    query = f"SELECT mode, comment, count(*) AS n FROM ({DICTIONARIES}) GROUP BY mode, comment"
    session = two(bytes_per_task=0, coordinator_threshold=0, compression=compression)
    assert rows(session.sql(query).to_arrow_table()) == rows(single.sql(query).to_arrow_table())


def test_output_that_somebody_removed_is_made_again(two, single, monkeypatch):
    """Whether it is read in place or fetched."""
    publish, removed = _exchange.Exchange.publish, []

    def publish_and_lose(exchange, key, partitions):
        publish(exchange, key, partitions)
        if not removed:
            removed.extend(path for each in partitions for path in each.files)
            for path in removed:
                path.unlink()

    monkeypatch.setattr(_exchange.Exchange, "publish", publish_and_lose)
    query = "SELECT l_orderkey, min(l_comment) AS c FROM lineitem GROUP BY 1"
    session = two(scan_bytes_per_task=0, bytes_per_task=0, coordinator_threshold=0)
    assert rows(session.sql(query).to_arrow_table()) == rows(single.sql(query).to_arrow_table())
    assert removed


def test_a_call_that_ends_early_cancels_its_task(server, client, planning):
    """Its deadline passes here; the worker sees that nobody waits and stops."""
    body = request(planning, ENDLESS, wait=60.0).to_bytes()
    with pytest.raises(flight.FlightTimedOutError):
        act(client, EXECUTE_TASK, body, flight.FlightCallOptions(timeout=0.5))
    eventually(lambda: json.loads(act(client, WORKER_INFO))["running"] == 0)
    with pytest.raises((flight.FlightCancelledError, flight.FlightServerError)):
        act(client, AWAIT_TASK, AwaitRequest(KEY, 1.0).to_bytes())
    assert output_of(server) in ([], [QUERY])
    act(client, RELEASE_QUERY, QUERY.encode())
    eventually(lambda: output_of(server) == [])


def test_a_full_exchange_is_told_and_emptied(tmp_path, planning):
    worker = Worker(exchange_quota=50_000)
    with (
        worker.into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
    ):
        with pytest.raises(flight.FlightServerError, match="exchange_quota=50,000"):
            execute(client, request(planning, "SELECT * FROM lineitem"))
        assert json.loads(act(client, WORKER_INFO))["exchange_bytes"] == 0
        assert list(server._exchange.path.rglob("*.arrow")) == []
        small = OutputKey("f" * 32, 1, 0, 0)
        execute(client, request(planning, "SELECT n_name FROM nation", small))
        held = json.loads(act(client, WORKER_INFO))["exchange_bytes"]
        files = server._exchange.path.rglob("*.arrow")
        assert 0 < held == sum(path.stat().st_size for path in files)


def test_a_worker_with_too_many_waiting_tasks_sends_them_elsewhere(tmp_path, planning, monkeypatch):
    worker = Worker().with_slots(1)
    with (
        worker.into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
    ):
        monkeypatch.setattr(server._pool, "_max_queued", 1)
        start = functools.partial(request, planning, ENDLESS, wait=0.0)
        act(client, EXECUTE_TASK, start(OutputKey(QUERY, 1, 0, 0)).to_bytes())
        eventually(lambda: json.loads(act(client, WORKER_INFO))["queued"] == 0)
        act(client, EXECUTE_TASK, start(OutputKey(QUERY, 1, 1, 0)).to_bytes())
        with pytest.raises(flight.FlightUnavailableError, match="another one, or later"):
            act(client, EXECUTE_TASK, start(OutputKey(QUERY, 1, 2, 0)).to_bytes())
        act(client, RELEASE_QUERY, QUERY.encode())
        eventually(lambda: json.loads(act(client, WORKER_INFO))["running"] == 0)
        later = OutputKey("f" * 32, 1, 0, 0)
        assert execute(client, request(planning, SOME, later)).partitions


def test_a_task_that_was_stopped_gives_its_threads_back(client, planning):
    """A join that makes rows without end of one batch, and a sum that never gives any."""
    endless = (
        "SELECT sum(sin(a.l_tax * b.l_tax * c.l_tax)) AS n FROM lineitem a, lineitem b, lineitem c"
    )
    for number in range(2):
        key = OutputKey(f"{number:032x}", 1, 0, 0)
        act(client, EXECUTE_TASK, request(planning, endless, key, wait=0.3).to_bytes())
        act(client, RELEASE_QUERY, key.query.encode())
    assert execute(client, request(planning, SOME)).partitions


def test_what_makes_a_join_stop_is_not_among_its_metrics(client, planning):
    sent = request(planning, "SELECT n_name FROM nation JOIN region ON n_regionkey = r_regionkey")
    nodes = [node.kind for node in PlanNode.parse(sent.plan).walk()]
    assert any("join" in kind for kind in nodes)
    assert "cooperative" in [n.kind for n in PlanNode.parse(sent.plan).cooperating().walk()]
    assert len(execute(client, sent).nodes) == len(nodes)


def test_a_plan_of_as_many_levels_as_datafusion_decodes_runs(client, planning):
    joins = " ".join(
        f"LEFT JOIN nation n{i} ON n{i}.n_nationkey = n0.n_nationkey" for i in range(1, 36)
    )
    sent = request(planning, f"SELECT n0.n_name FROM nation n0 {joins}")
    cooperating = PlanNode.parse(sent.plan).cooperating().to_bytes()
    with pytest.raises(InvalidPlanError, match="recursion limit"):
        decode_plan(cooperating, planning)
    assert sum(partition.rows for partition in execute(client, sent).partitions) == 25
