"""A worker's Flight server: whatever it is sent, it answers and stays up."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resolver import DefaultChannelResolver, default_channel_resolver
from resolver.distributed import (
    SessionState,
    Worker,
    WorkerQueryContext,
    _listener,
    _worker_calls,
)
from resolver.distributed._calls import worker_info
from resolver.distributed._wire import (
    AWAIT_TASK,
    EXECUTE_TASK,
    RELEASE_QUERY,
    WORKER_INFO,
    AwaitRequest,
    OutputKey,
    PartitionTicket,
    TaskReport,
    TaskRequest,
)
from tests.support.distributed import DirectResolver, names, rows
from tests.support.threads import wait_until

QUERY = "0123456789abcdef" * 2
KEY = OutputKey(QUERY, 1, 0, 0)


def request(planning, query, key=KEY, settings=None, **fields):
    plan = planning.sql(query).execution_plan().to_bytes(planning)
    return TaskRequest(key, plan, settings or {}, **fields).to_bytes()


def act(client, action, body=b"", options=None):
    """The one result of an action."""
    (result,) = client.do_action(flight.Action(action, body), options)
    return result.body.to_pybytes()


def execute(client, body, options=None):
    """Start a task and wait for it, as a coordinator does."""
    answer = act(client, EXECUTE_TASK, body, options)
    while not answer:
        key = TaskRequest.parse(body).output
        answer = act(client, AWAIT_TASK, AwaitRequest(key, 1.0).to_bytes())
    return TaskReport.parse(answer)


def test_a_task_runs_and_its_output_is_served_and_released(client, server, planning, single):
    query = "SELECT l_orderkey, l_shipmode FROM lineitem WHERE l_quantity < 3"
    report = execute(client, request(planning, query))
    tables = [
        client.do_get(flight.Ticket(PartitionTicket(KEY, k).to_bytes())).read_all()
        for k in range(len(report.partitions))
    ]
    assert [table.num_rows for table in tables] == [p.rows for p in report.partitions]
    assert rows(pa.concat_tables(tables)) == rows(single.sql(query).to_arrow_table())
    assert act(client, RELEASE_QUERY, QUERY.encode()) == b""
    with pytest.raises(pa.ArrowKeyError, match="does not hold"):
        client.do_get(flight.Ticket(PartitionTicket(KEY, 0).to_bytes())).read_all()


def test_an_empty_partition_is_served_empty(client, planning):
    execute(client, request(planning, "SELECT l_tax FROM lineitem WHERE l_quantity < 0"))
    table = client.do_get(flight.Ticket(PartitionTicket(KEY, 0).to_bytes())).read_all()
    assert table.num_rows == 0


def test_settings_of_the_query_reach_the_plan(client, planning):
    query = "SELECT l_orderkey FROM lineitem"
    execute(client, request(planning, query, settings={"datafusion.execution.batch_size": "100"}))
    reader = client.do_get(flight.Ticket(PartitionTicket(KEY, 0).to_bytes()))
    assert max(chunk.data.num_rows for chunk in reader) <= 100


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("", b""),
        ("resolver.no_such_action", b""),
        (EXECUTE_TASK, b""),
        (EXECUTE_TASK, b"\xff" * 100),
        (EXECUTE_TASK, TaskRequest(KEY, b"garbage", {}).to_bytes()),
        (EXECUTE_TASK, TaskRequest(KEY, b"", {}).to_bytes()),
        (EXECUTE_TASK, TaskRequest(KEY, b"", {"datafusion.execution.no": "1"}).to_bytes()),
        (EXECUTE_TASK, TaskRequest(KEY, b"", {"datafusion.catalog.location": "/"}).to_bytes()),
        (EXECUTE_TASK, TaskRequest(KEY, b"", {"datafusion.execution.batch_size": "x"}).to_bytes()),
        (RELEASE_QUERY, b"../../etc"),
        (RELEASE_QUERY, b"\xff"),
    ],
)
def test_garbage_is_an_invalid_argument(client, action, body):
    with pytest.raises(pa.ArrowInvalid):
        list(client.do_action(flight.Action(action, body)))
    assert client.list_actions()


@pytest.mark.parametrize(
    "ticket",
    [
        b"",
        b"../../../../etc/passwd",
        b"/etc/passwd",
        json.dumps({"path": "/etc/passwd"}).encode(),
        PartitionTicket(OutputKey("../" * 10 + "..", 1, 0, 0), 0).to_bytes(),
        PartitionTicket(OutputKey(QUERY, 1, 0, 0), -1).to_bytes(),
    ],
)
def test_a_garbage_ticket_is_an_invalid_argument(client, ticket):
    with pytest.raises(pa.ArrowInvalid):
        client.do_get(flight.Ticket(ticket)).read_all()
    assert client.list_actions()


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=300), action=st.sampled_from([EXECUTE_TASK, RELEASE_QUERY]))
def test_random_bytes_never_harm_a_worker(client, data, action):
    with pytest.raises(pa.ArrowInvalid):
        client.do_get(flight.Ticket(data)).read_all()
    with pytest.raises(pa.ArrowInvalid):
        list(client.do_action(flight.Action(action, data)))


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_plans_never_harm_a_worker(client, planning, position, byte, cut):
    plan = bytearray(
        planning.sql("SELECT l_shipmode, sum(l_tax) FROM lineitem WHERE l_tax < 0 GROUP BY 1")
        .execution_plan()
        .to_bytes(planning)
    )
    position %= len(plan)
    plan[position] = byte
    data = bytes(plan[:position] if cut else plan)
    key = OutputKey(os.urandom(16).hex(), 1, 0, 0)
    try:
        execute(client, TaskRequest(key, data, {}).to_bytes())
    except (pa.ArrowInvalid, flight.FlightServerError):
        pass
    finally:
        act(client, RELEASE_QUERY, key.query.encode())
    assert client.list_actions()


def test_a_replayed_request_is_an_invalid_argument(client, planning):
    body = request(planning, "SELECT l_tax FROM lineitem WHERE l_quantity < 0")
    execute(client, body)
    with pytest.raises(pa.ArrowInvalid):
        execute(client, body)


def test_a_request_after_the_release_is_cancelled(client, planning):
    act(client, RELEASE_QUERY, QUERY.encode())
    with pytest.raises(flight.FlightCancelledError):
        execute(client, request(planning, "SELECT l_tax FROM lineitem"))


def test_the_error_of_a_plan_is_told_in_datafusions_words(client, planning):
    with pytest.raises(flight.FlightServerError, match="Cannot cast string"):
        execute(client, request(planning, "SELECT CAST(l_comment AS INT) FROM lineitem"))


def test_a_panic_is_told_like_any_error(client, planning, monkeypatch):
    class Panic(BaseException):
        pass

    def panic(*_, **__):
        raise Panic("partition not used yet")

    monkeypatch.setattr(_worker_calls, "run_task", panic)
    with pytest.raises(flight.FlightServerError, match="partition not used yet") as told:
        execute(client, request(planning, "SELECT l_tax FROM lineitem"))
    assert "Traceback" not in str(told.value)
    assert client.list_actions()


def test_a_task_whose_query_ended_meanwhile_is_no_failed_plan(
    client, server, planning, monkeypatch
):
    """Its lease ran out, say: its files are gone, and it may well run elsewhere."""
    waited_for = threading.Event()
    wait = server._pool.wait

    def waiting(*arguments):
        waited_for.set()
        return wait(*arguments)

    def run_task(*_, **__):
        assert waited_for.wait(10)
        server._exchange.release(KEY.query)
        raise OSError("Failed to open local file")

    monkeypatch.setattr(server._pool, "wait", waiting)
    monkeypatch.setattr(_worker_calls, "run_task", run_task)
    with pytest.raises(flight.FlightCancelledError, match="is over"):
        execute(client, request(planning, "SELECT l_tax FROM lineitem"))


def test_the_session_builder_is_called_with_builder_and_headers(tmp_path, planning):
    calls: list[WorkerQueryContext] = []
    mine = DirectResolver()

    def build(query):
        calls.append(query)
        return query.builder.with_distributed_channel_resolver(mine).build()

    worker = Worker.from_session_builder(build)
    with (
        worker.into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
    ):
        options = flight.FlightCallOptions(headers=[(b"x-tenant", b"blue")])
        body = request(planning, "SELECT l_tax FROM lineitem WHERE l_quantity < 0")
        act(client, EXECUTE_TASK, body, options)
        info = json.loads(act(client, WORKER_INFO, b""))
    assert calls[0].headers["x-tenant"] == "blue"
    assert worker.build_session({}).channel_resolver is mine
    assert info["resolver"] == "DirectResolver"
    assert info["resolver_stats"] == {}
    assert info["queries"] == 1


def test_the_session_builder_may_be_async(tmp_path, planning):
    async def build(query):
        return query.builder.build()

    with (
        Worker.from_session_builder(build).into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
    ):
        body = request(planning, "SELECT l_tax FROM lineitem")
        assert len(execute(client, body).partitions) == 3


@pytest.mark.parametrize("how", ["released", "left"])
def test_an_async_session_builder_that_hangs_ends_with_its_query(tmp_path, planning, how):
    begun, ended = threading.Event(), threading.Event()

    async def build(query):
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with (
        Worker.from_session_builder(build).into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
    ):
        body = request(planning, "SELECT l_tax FROM lineitem", wait=30.0 * (how == "left"))
        if how == "released":
            assert act(client, EXECUTE_TASK, body) == b""
            assert begun.wait(10)
            act(client, RELEASE_QUERY, QUERY.encode())
        else:
            with pytest.raises(flight.FlightTimedOutError):
                act(client, EXECUTE_TASK, body, flight.FlightCallOptions(timeout=1.0))
        assert ended.wait(10)
        wait_until(lambda: server._pool.running == 0)


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """A worker of two slots whose session builders return when ``go_on`` is set."""
    monkeypatch.setattr(_worker_calls, "_MAX_HANGING", 0)
    began, go_on = threading.Semaphore(0), threading.Event()

    def build(query):
        began.release()
        assert go_on.wait(60)
        return query.builder.build()

    worker = Worker.from_session_builder(build).with_slots(2)
    with worker.into_flight_server(exchange_dir=tmp_path) as server:
        yield server, began, go_on
        go_on.set()


def test_a_session_builder_that_hangs_keeps_no_slot_beyond_its_query(hanging, planning):
    server, began, go_on = hanging
    queries = [f"{number:032x}" for number in range(4)]

    def body(query, **fields):
        key = OutputKey(query, 1, 0, 0)
        return request(planning, "SELECT l_tax FROM lineitem", key, **fields)

    with flight.connect(server.location) as client:
        for query in queries[:2]:
            assert act(client, EXECUTE_TASK, body(query, wait=0.0)) == b""
            assert began.acquire(timeout=10)
        for query in queries[:2]:
            act(client, RELEASE_QUERY, query.encode())
        wait_until(lambda: server._pool.running == 0)
        with pytest.raises(flight.FlightUnavailableError, match="builders have not returned"):
            execute(client, body(queries[2], wait=5.0))
        go_on.set()
        wait_until(lambda: server._calls._sessions._builders.acquire(blocking=False))
        server._calls._sessions._builders.release()
        assert len(execute(client, body(queries[3])).partitions) == 3


def test_a_task_waits_for_no_other_tasks_session_when_it_is_cancelled(hanging, planning):
    server, began, _ = hanging
    first, second = (
        request(planning, "SELECT l_tax FROM lineitem", OutputKey(QUERY, 1, task, 0), wait=wait)
        for task, wait in enumerate([0.0, 30.0])
    )
    with flight.connect(server.location) as client:
        assert act(client, EXECUTE_TASK, first) == b""
        assert began.acquire(timeout=10)
        with pytest.raises(flight.FlightTimedOutError):
            act(client, EXECUTE_TASK, second, flight.FlightCallOptions(timeout=0.5))
        wait_until(lambda: server._pool.running == 1)


def failing(error):
    raise error


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda query: query.builder, "SessionStateBuilder, not the SessionState"),
        (lambda query: 1 // 0, "session builder raised ZeroDivisionError: .* by zero"),
        # Of these types there are some that say that a worker, or its output, is gone.
        (lambda query: query.headers["x-tenant"], "session builder raised KeyError: 'x-tenant'"),
        (lambda query: failing(FileExistsError("x")), "session builder raised FileExistsError: x"),
        (lambda query: failing(flight.FlightUnavailableError("the catalogue")), "the catalogue"),
        (lambda query: failing(OSError("no \udcff here")), r"raised OSError: no \\udcff here"),
    ],
)
def test_a_broken_session_builder_is_told_to_the_caller(tmp_path, planning, build, message):
    with (
        Worker.from_session_builder(build).into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
        pytest.raises(flight.FlightServerError, match=message),
    ):
        execute(client, request(planning, "SELECT l_tax FROM lineitem"))


def test_a_session_builder_may_turn_a_caller_away(tmp_path, planning):
    with (
        Worker.from_session_builder(
            lambda query: failing(flight.FlightUnauthorizedError("not this tenant"))
        ).into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
        pytest.raises(flight.FlightUnauthorizedError, match="not this tenant"),
    ):
        execute(client, request(planning, "SELECT l_tax FROM lineitem"))


def test_a_resolver_that_knows_no_url_is_no_lost_output(tmp_path, planning, monkeypatch):
    def run_task(*_arguments, **_options):
        raise KeyError("grpc://elsewhere:1")

    monkeypatch.setattr(_worker_calls, "run_task", run_task)
    with (
        Worker().into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
        pytest.raises(flight.FlightServerError, match=r"^KeyError: 'grpc://elsewhere:1'"),
    ):
        execute(client, request(planning, "SELECT l_tax FROM lineitem"))


def test_a_session_built_for_a_query_that_is_over_is_let_go(tmp_path, planning, monkeypatch):
    """The query ends after its task has left the queue and before that has a session."""
    build = _worker_calls._Sessions.of

    def of(sessions, query, headers, check):
        with flight.connect(server.location) as another:
            act(another, RELEASE_QUERY, query.encode())
        return build(sessions, query, headers, check)

    monkeypatch.setattr(_worker_calls._Sessions, "of", of)
    with (
        Worker().into_flight_server(exchange_dir=tmp_path) as server,
        flight.connect(server.location) as client,
    ):
        with pytest.raises((flight.FlightError, pa.ArrowException)):
            execute(client, request(planning, "SELECT l_tax FROM lineitem"))
        sessions = server._calls._sessions
        wait_until(lambda: server._pool.running == 0)
        wait_until(lambda: (sessions._built, sessions._building) == ({}, {}))


def test_a_plain_worker_uses_the_default_resolver():
    state = Worker().build_session({})
    assert isinstance(state, SessionState)
    assert state.channel_resolver is default_channel_resolver()


def test_a_worker_tells_about_itself(server, client, planning):
    with DefaultChannelResolver() as resolver:
        info = worker_info(resolver, server.url)
        assert info["pid"] == os.getpid()
        assert info["uptime"] >= 0
        assert (info["resolver"], info["resolver_stats"]) == (None, {})  # no query has come
        execute(client, request(planning, "SELECT l_tax FROM lineitem"))
        info = worker_info(resolver, server.url)
    assert info["resolver"] == "DefaultChannelResolver"
    assert "hits" in info["resolver_stats"]


def test_a_probe_does_not_wait_for_the_session_builder(tmp_path):
    def build(query):
        raise AssertionError("a probe brought no query")

    with (
        Worker.from_session_builder(build).into_flight_server(exchange_dir=tmp_path) as server,
        DefaultChannelResolver() as resolver,
    ):
        assert worker_info(resolver, server.url)["running"] == 0


def test_a_taken_port_is_refused(server, tmp_path):
    with pytest.raises(OSError, match="cannot listen"):
        Worker().into_flight_server(server.location, exchange_dir=tmp_path / "other")
    assert names(tmp_path / "other") == []


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_localhost_is_not_shared_with_somebody_else(tmp_path, family, address):
    """Callers would find him at one of its addresses, and show him their token."""
    with socket.socket(family) as other:
        other.bind((address, 0))
        other.listen()
        with pytest.raises(OSError, match="already in use"):
            Worker().into_flight_server(
                f"grpc://localhost:{other.getsockname()[1]}", exchange_dir=tmp_path
            )


def test_a_server_knows_its_address(server):
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert server.location == f"grpc+tcp://127.0.0.1:{server.port}"
    assert server.url in repr(server)


def test_a_server_on_ipv6_and_on_a_unix_socket(tmp_path):
    for location in ("grpc://[::1]:0", f"grpc+unix://{tmp_path}/w"):
        with (
            Worker().into_flight_server(location, exchange_dir=tmp_path) as server,
            flight.connect(server.location) as client,
        ):
            assert client.list_actions()


def test_a_unix_socket_is_taken_from_nobody_who_answers_there(tmp_path):
    path = tmp_path / "a w"
    location = f"grpc+unix://{tmp_path}/a%20w"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with Worker().into_flight_server(location, exchange_dir=tmp_path) as server:
        with pytest.raises(OSError, match="somebody listens on that socket already"):
            Worker().into_flight_server(location, exchange_dir=tmp_path / "other")
        assert names(tmp_path / "other") == []
        with flight.connect(server.location) as client:
            assert client.list_actions()
    assert not path.exists()


def test_shutdown_ends_serve_and_running_tasks_and_leaves_nothing(tmp_path, planning):
    server = Worker().into_flight_server(exchange_dir=tmp_path)
    serving = threading.Thread(target=server.serve)
    serving.start()
    outcome: list[BaseException] = []

    def long_task():
        with flight.connect(server.location) as client:
            try:
                execute(client, request(planning, "SELECT * FROM lineitem, orders"))
            except Exception as error:
                outcome.append(error)

    task = threading.Thread(target=long_task)
    task.start()
    while not list(tmp_path.glob(f"*/{QUERY}-*.arrow")):
        assert task.is_alive()
    server.shutdown()
    server.shutdown()
    for thread in (serving, task):
        thread.join(20)
        assert not thread.is_alive()
    assert isinstance(outcome[0], flight.FlightError)
    assert names(tmp_path) == []


def endless_stream(_calls, _ticket):
    batch = pa.record_batch({"n": pa.array(range(100_000))})
    reader = pa.RecordBatchReader.from_batches(batch.schema, itertools.repeat(batch))
    return flight.RecordBatchStream(reader)


@pytest.mark.parametrize(
    "location",
    ["grpc://127.0.0.1:0", "grpc://0.0.0.0:0", "grpc://[::1]:0", "grpc://localhost:0", "unix"],
)
def test_shutdown_does_not_wait_for_a_caller_that_reads_nothing(tmp_path, monkeypatch, location):
    monkeypatch.setattr(_listener, "_CALL_PATIENCE", 0.2)
    monkeypatch.setattr(_worker_calls.CallHandlers, "do_get", endless_stream)
    options = {"exchange_dir": tmp_path}
    if location == "unix":
        location = f"grpc+unix://{tmp_path}/a%20w"
    elif "0.0.0.0" in location:
        options |= {"insecure": True, "advertise": "grpc://127.0.0.1:0"}
    server = Worker().into_flight_server(location, **options)
    with flight.connect(server.location) as client:
        stream = client.do_get(flight.Ticket(b""))
        stream.read_chunk()
        stopping = threading.Thread(target=server.shutdown, daemon=True)
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()
        with pytest.raises(flight.FlightUnavailableError):
            for _ in range(1_000):
                stream.read_chunk()


def test_shutdown_cuts_nobody_elses_connections(tmp_path, monkeypatch):
    monkeypatch.setattr(_listener, "_CALL_PATIENCE", 0.2)
    monkeypatch.setattr(_worker_calls.CallHandlers, "do_get", endless_stream)
    server = Worker().into_flight_server(exchange_dir=tmp_path)
    neighbour = f"grpc://127.0.0.2:{server.port}"
    with (
        Worker().into_flight_server(neighbour, exchange_dir=tmp_path) as other,
        flight.connect(server.location) as client,
        flight.connect(other.location) as client_of_other,
    ):
        streams = [each.do_get(flight.Ticket(b"")) for each in (client, client_of_other)]
        for stream in streams:
            stream.read_chunk()
        before = len(names(Path("/dev/fd")))
        server.shutdown()
        assert len(names(Path("/dev/fd"))) <= before
        for _ in range(100):
            streams[1].read_chunk()
        streams[1].cancel()
