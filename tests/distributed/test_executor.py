"""Running a staged plan when workers fail: an error or the whole answer, never a part."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from resolver import DefaultChannelResolver, ResolverError, WorkerConnectError
from resolver.distributed import (
    DistributedError,
    DistributedPhysicalOptimizerRule,
    LocalCluster,
    SessionContext,
    SessionStateBuilder,
    TaskFailedError,
    Worker,
    WorkerLostError,
    _calls,
    _executor,
)
from resolver.distributed._tpch import QUERIES
from resolver.distributed._wire import (
    EXECUTE_TASK,
    RELEASE_QUERY,
    RENEW_LEASE,
    OutputKey,
    TaskReport,
)
from tests.support.distributed import DirectResolver, eventually, names, rows

QUERY = "SELECT l_shipmode, count(*) AS n, min(l_comment) AS c FROM lineitem GROUP BY l_shipmode"
NOBODY = "http://127.0.0.1:1"


class Workers:
    def __init__(self, *urls):
        self.urls = urls

    def get_urls(self):
        return self.urls


@pytest.fixture
def servers(tmp_path):
    """Two workers in this process."""
    started = [Worker().into_flight_server(exchange_dir=tmp_path / f"worker-{n}") for n in range(2)]
    yield started
    for server in started:
        server.shutdown()


@pytest.fixture
def make(tmp_path, register):
    def make(resolver, *urls, **options):
        builder = (
            SessionStateBuilder()
            .with_distributed_worker_resolver(Workers(*urls))
            .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
            .with_distributed_channel_resolver(resolver)
            .with_exchange_dir(tmp_path / "coordinator")
        )
        # The tables are small; their tasks are spread all the same.
        for name, value in {"scan_bytes_per_task": 0, **options}.items():
            builder.with_distributed_option(name, value)
        session = SessionContext(builder.build())
        register(session)
        return session

    return make


def nothing_left(session):
    return names(session._shared.exchange().path) == [".lock"]


def test_a_dead_worker_costs_its_task_and_no_row(make, servers, single):
    resolver = DirectResolver()
    session = make(resolver, NOBODY, servers[0].url, servers[1].url)
    table = session.sql(QUERY).to_arrow_table()
    assert rows(table) == rows(single.sql(QUERY).to_arrow_table())
    assert {url for url, client in resolver.invalidated} == {NOBODY}
    assert all(client is not None for _, client in resolver.invalidated), "which client failed?"
    assert nothing_left(session)


def test_a_worker_that_cannot_be_connected_is_passed_over(make, servers, single):
    with DefaultChannelResolver() as resolver:
        session = make(resolver, NOBODY, servers[0].url)
        table = session.sql(QUERY).to_arrow_table()
        assert rows(table) == rows(single.sql(QUERY).to_arrow_table())
        assert NOBODY not in resolver


def test_without_any_worker_the_error_names_them(make):
    other = "http://127.0.0.1:2"
    for resolver in (DirectResolver(), DefaultChannelResolver()):
        session = make(resolver, NOBODY, other)
        with pytest.raises(WorkerLostError) as lost:
            session.sql(QUERY).collect()
        assert NOBODY in str(lost.value)
        assert other in str(lost.value)
        assert isinstance(lost.value.__cause__, ResolverError)
        assert nothing_left(session)


def test_a_single_dead_worker_is_told_by_its_own_error(make, caplog):
    with DefaultChannelResolver() as resolver, pytest.raises(WorkerConnectError, match=NOBODY):
        make(resolver, NOBODY).sql(QUERY).collect()
    assert not caplog.records, "the error says it all"


def test_a_task_that_kills_its_workers_is_not_given_to_all(make, servers, monkeypatch):
    tried = []

    def lost(self, url, request, limit):
        tried.append((request.output.stage, request.output.task, url))
        raise WorkerLostError(f"worker {url} was lost", url=url)

    monkeypatch.setattr(_calls.WorkerCalls, "run_task", lost)
    urls = [f"http://127.0.0.1:{port}" for port in range(1, 9)]
    with pytest.raises(WorkerLostError):
        make(DirectResolver(), *urls, task_retries=1).sql(QUERY).collect()
    for task in {(stage, task) for stage, task, _ in tried}:
        assert len([1 for stage, other, _ in tried if (stage, other) == task]) <= 2


def test_a_worker_that_hangs_takes_no_lease_from_the_others():
    """And is not told again while it has not answered."""
    hanging, told = threading.Event(), []

    class Client:
        def __init__(self, url):
            self._url = url

        def do_action(self, _action, _options):
            told.append(self._url)
            if self._url == NOBODY:
                assert hanging.wait(20)
            return [flight.Result(b"")]

    class Resolver:
        def get_flight_client_for_url(self, url):
            return Client(url)

    calls = _calls.WorkerCalls(Resolver(), headers=[], worker_timeout=10.0)
    for round_ in range(1, 4):
        calls.renew_lease([NOBODY, "http://127.0.0.1:2"], "0" * 32)
        eventually(lambda wanted=round_: told.count("http://127.0.0.1:2") == wanted)
        eventually(lambda: calls._renewing == {NOBODY})
    assert told.count(NOBODY) == 1
    hanging.set()
    eventually(lambda: not calls._renewing)
    calls.renew_lease([NOBODY], "0" * 32)
    eventually(lambda: told.count(NOBODY) == 2)


def test_what_a_query_can_do_without_does_not_fail_it_for_want_of_a_thread(monkeypatch):
    """Its lease is renewed the next time, and its output is removed at its end."""
    told = []

    class Client:
        def do_action(self, action, _options):
            told.append(action.type)
            return [flight.Result(b"")]

    class Resolver:
        def get_flight_client_for_url(self, _url):
            return Client()

    def no_thread(_thread):
        raise RuntimeError("can't start new thread")

    calls = _calls.WorkerCalls(Resolver(), headers=[], worker_timeout=10.0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        calls.renew_lease([NOBODY], "0" * 32)
        calls.release_outputs({NOBODY: [OutputKey("0" * 32, 1, 0, 0)]})
    calls.renew_lease([NOBODY], "0" * 32)
    eventually(lambda: told == [RENEW_LEASE])


def test_a_worker_that_cannot_be_reached_holds_no_result_up():
    """Its connect takes as long as the resolver gives it; the others are told meanwhile."""
    connecting, told = threading.Event(), threading.Event()

    class Client:
        def do_action(self, _action, _options):
            told.set()
            return [flight.Result(b"")]

    class Resolver:
        def get_flight_client_for_url(self, url):
            assert url != NOBODY or connecting.wait(60)
            return Client()

    calls = _calls.WorkerCalls(Resolver(), headers=[], worker_timeout=10.0)
    releasing = threading.Thread(
        target=calls.release, args=([NOBODY, "http://127.0.0.1:2"], "0" * 32)
    )
    releasing.start()
    assert told.wait(20)
    releasing.join(20)
    assert not releasing.is_alive()
    connecting.set()


def test_a_failing_task_is_told_once_in_datafusions_words(make, servers):
    resolver = DirectResolver()
    session = make(resolver, *(server.url for server in servers))
    with pytest.raises(TaskFailedError, match="Cannot cast string") as failed:
        session.sql("SELECT CAST(l_comment AS INT) FROM lineitem").collect()
    assert failed.value.url in {server.url for server in servers}
    assert "Traceback" not in str(failed.value)
    assert "Detail" not in str(failed.value)
    assert resolver.invalidated == [], "the workers are well"
    assert nothing_left(session)


@pytest.mark.parametrize("letter", ["x", "ä"])
def test_a_failing_task_may_have_a_lot_to_say(make, servers, letter):
    """To any client: gRPC drops what is above 8 KB, and would have it that a worker refused."""
    session = make(DirectResolver(), *(server.url for server in servers))
    with pytest.raises(TaskFailedError, match=f"Cannot cast string '{letter * 500}") as failed:
        value = f"repeat('{letter}', 40000 + l_linenumber)"
        session.sql(f"SELECT CAST({value} AS INT) FROM lineitem").collect()
    assert len(str(failed.value)) < 4_000
    assert "bytes)" in str(failed.value), "it says that there was more"


def test_workers_hold_nothing_after_a_failure(make, servers):
    session = make(DirectResolver(), *(server.url for server in servers))
    with pytest.raises(TaskFailedError):
        session.sql("SELECT CAST(l_comment AS INT) FROM lineitem").collect()
    for server in servers:
        assert server._exchange.queries() == 0


def quietly(call):
    with contextlib.suppress(ResolverError):
        call()


def test_an_interrupt_ends_the_query_everywhere(make, servers, monkeypatch):
    session = make(DirectResolver(), *(server.url for server in servers))

    def interrupted(call, *, name, check):
        threading.Thread(target=quietly, args=(call,), daemon=True).start()
        eventually(lambda: any(server._exchange.queries() for server in servers))
        raise KeyboardInterrupt

    monkeypatch.setattr(_executor, "call_interruptibly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.sql(QUERY).collect()
    for server in servers:
        eventually(lambda server=server: server._exchange.queries() == 0)
    eventually(lambda: nothing_left(session))


class Tampering:
    """A client that answers as a broken worker would."""

    def __init__(self, client, change):
        self._client = client
        self._change = change

    def do_action(self, action, options=None):
        results = list(self._client.do_action(action, options))
        if action.type != EXECUTE_TASK:
            return results
        return self._change(results)

    def do_get(self, ticket, options=None):
        return self._client.do_get(ticket, options)


class TamperingResolver(DirectResolver):
    def __init__(self, change):
        super().__init__()
        self._change = change

    def get_flight_client_for_url(self, url):
        return Tampering(super().get_flight_client_for_url(url), self._change)


def changed_report(change):
    def changed(results):
        report = TaskReport.parse(results[0].body.to_pybytes())
        return [flight.Result(change(report).to_bytes())]

    return changed


def more_rows(report):
    first = report.partitions[0]
    more = type(first)(first.rows + 1, max(1, first.batches), first.bytes)
    # Not sent along: what is fetched is counted.
    return dataclasses.replace(report, partitions=(more, *report.partitions[1:]), files=None)


def fewer_partitions(report):
    return dataclasses.replace(report, partitions=report.partitions[:-1], files=None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed_report(more_rows), WorkerLostError, "rows arrived of a partition of"),
        (changed_report(fewer_partitions), DistributedError, "another plan"),
        (lambda results: [], WorkerLostError, "0 results"),
        (lambda results: [flight.Result(b"garbage")], DistributedError, "line of JSON"),
    ],
)
def test_an_incomplete_answer_is_never_an_answer(make, servers, change, error, message):
    session = make(TamperingResolver(change), *(server.url for server in servers))
    with pytest.raises(error, match=message):
        session.sql("SELECT l_tax FROM lineitem").collect()
    assert nothing_left(session)


def test_tasks_that_disagree_about_the_schema_are_an_error(make, servers):
    schemas = iter(
        [pa.schema([("l_tax", pa.decimal128(15, 2))]), pa.schema([("x", pa.int64())])] * 2
    )
    lock = threading.Lock()

    def other_schema(report):
        with lock:
            schema = next(schemas).serialize().to_pybytes()
        empty = tuple(type(p)(0, 0, 0) for p in report.partitions)
        return dataclasses.replace(report, partitions=empty, schema=schema, files=None)

    session = make(TamperingResolver(changed_report(other_schema)), *(s.url for s in servers))
    with pytest.raises(DistributedError, match="no schema in common"):
        session.sql("SELECT l_tax FROM lineitem").collect()


def test_a_worker_that_refuses_is_named(make, servers):
    def refuse(results):
        raise pa.ArrowInvalid("no such plan. Detail: Python exception: Traceback ...")

    session = make(TamperingResolver(refuse), servers[0].url)
    with pytest.raises(DistributedError, match=r"refused: no such plan$") as refused:
        session.sql(QUERY).collect()
    assert refused.value.url == servers[0].url


def test_partitions_of_one_worker_are_fetched_at_the_same_time(make, servers, single):
    both = threading.Barrier(2)

    class Meeting(TamperingResolver):
        def get_flight_client_for_url(self, url):
            client = super().get_flight_client_for_url(url)
            fetch = client.do_get

            def do_get(ticket, options=None):
                both.wait(10)
                return fetch(ticket, options)

            client.do_get = do_get
            return client

    apart = changed_report(lambda report: dataclasses.replace(report, files=None))
    query = "SELECT l_tax FROM lineitem"
    assert rows(make(Meeting(apart), servers[0].url).sql(query)) == rows(single.sql(query))


def test_rows_do_not_wait_for_workers_to_remove_what_was_read(make, servers):
    has_rows = threading.Event()
    in_time = []

    class Removing(TamperingResolver):
        def get_flight_client_for_url(self, url):
            client = super().get_flight_client_for_url(url)
            act = client.do_action

            def do_action(action, options=None):
                if action.type == RELEASE_QUERY:
                    in_time.append(has_rows.wait(10))
                return act(action, options)

            client.do_action = do_action
            return client

    session = make(Removing(lambda results: results), *(server.url for server in servers))
    stream = session.sql(QUERY).execute_stream()
    assert next(stream).to_pyarrow().num_rows
    assert any(server._exchange.queries() for server in servers)
    has_rows.set()
    list(stream)
    assert in_time
    assert all(in_time)
    assert [server._exchange.queries() for server in servers] == [0, 0]


def test_a_resolver_needs_nothing_but_its_one_method(make, servers, single):
    class Bare:
        def __init__(self):
            self.clients = {}

        def get_flight_client_for_url(self, url):
            if url not in self.clients:
                self.clients[url] = flight.connect(url.replace("http", "grpc"))
            return self.clients[url]

    session = make(Bare(), NOBODY, *(server.url for server in servers))
    table = session.sql(QUERIES[6]).to_arrow_table()
    assert rows(table) == rows(single.sql(QUERIES[6]).to_arrow_table())


@pytest.mark.slow
def test_workers_killed_during_a_query_never_give_a_partial_answer(register, single):
    """kill -9 at several moments: the whole answer, or an error that names the worker."""
    query = "SELECT l_orderkey, l_comment FROM lineitem ORDER BY l_comment, l_orderkey"
    expected = single.sql(query).to_pylist()
    with LocalCluster(workers=4) as cluster, DefaultChannelResolver() as resolver:
        session = cluster.session(resolver)
        register(session)
        assert session.sql(query).to_pylist() == expected
        for victim in cluster.processes[:3]:
            killer = threading.Timer(0.02, os.kill, (victim.pid, signal.SIGKILL))
            killer.start()
            assert session.sql(query).to_pylist() == expected
            killer.join()
            victim.wait(10)
        assert session.sql(query).to_pylist() == expected, "one worker is left"
        cluster.processes[3].kill()
        cluster.processes[3].wait(10)
        with pytest.raises((WorkerLostError, WorkerConnectError), match=r"127\.0\.0\.1"):
            session.sql(query).collect()
