"""Results that are read while the rest of them is still to be computed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import datafusion
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resolver import ForkedProcessError
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    LocalCluster,
    SessionStateBuilder,
    TaskFailedError,
    _pieces,
)
from resolver.distributed._calls import WorkerCalls, worker_info
from resolver.distributed._pieces import piece_count
from resolver.distributed._stream import ResultStream
from tests.support.distributed import DirectResolver, eventually, names

FILES, ROWS = 12, 500
SPREAD = {
    "scan_bytes_per_task": 0,
    "bytes_per_task": 0,
    "coordinator_threshold": 0,
    "broadcast_threshold": 0,
    "stream_bytes": 8_000,
}

IN_PIECES = {
    "all": "SELECT * FROM t",
    "filter and project": "SELECT a + 1 AS more, s FROM t WHERE a % 3 = 0",
    "no columns": "SELECT 1 AS one FROM t WHERE a > 10",
    "unnest": "SELECT unnest([a, a + 1]) AS x FROM t",
    "nothing": "SELECT a FROM t WHERE a < 0",
    "group": "SELECT a, count(*), min(s) FROM t GROUP BY a",
    "group of floats": "SELECT a % 100 AS k, round(sum(a * 0.1), 3) FROM t GROUP BY a % 100",
    "distinct": "SELECT DISTINCT a % 100 AS k, s FROM t",
    "count distinct": "SELECT a % 100 AS k, count(DISTINCT s) FROM t GROUP BY a % 100",
    "having": "SELECT a % 100 AS k FROM t GROUP BY a % 100 HAVING avg(a) > 2950",
    "join": "SELECT t.a, u.s FROM t JOIN t AS u ON t.a = u.a",
    "left join": "SELECT t.a, u.s FROM t LEFT JOIN (SELECT * FROM t WHERE a % 3 = 0) u ON t.a = u.a",
    "full join": "SELECT t.a, u.b FROM t FULL JOIN (SELECT a + 100 AS b FROM t) u ON t.a = u.b",
    "semi join": "SELECT a FROM t WHERE a IN (SELECT a + 7 FROM t)",
    "join of a group": "SELECT t.a, c FROM t JOIN (SELECT a AS b, count(*) AS c FROM t GROUP BY a) ON a = b",
    "union": "SELECT a FROM t UNION ALL SELECT a FROM t WHERE a < 100",
    "union of all kinds": "SELECT a, s FROM t UNION ALL SELECT a, min(s) FROM t GROUP BY a",
    "window": "SELECT a, row_number() OVER (PARTITION BY a % 9 ORDER BY a) AS n FROM t",
}
AS_A_WHOLE = {
    "limit": "SELECT a FROM t LIMIT 700",
    "limit inside": "SELECT a + 1 AS x FROM (SELECT a FROM t LIMIT 700) WHERE a % 2 = 0",
    "order": "SELECT a FROM t ORDER BY a",
    "one row": "SELECT count(*), sum(a) FROM t",
    "ranks over everything": "SELECT a, row_number() OVER (ORDER BY a) AS n FROM t",
    "chance below a shuffle": "SELECT t.a FROM t JOIN (SELECT a FROM t WHERE random() < 2) u ON t.a = u.a",
    "first rows below a shuffle": "SELECT t.a FROM t JOIN (SELECT a FROM t LIMIT 900) u ON t.a = u.a",
    "sums of floats as keys": (
        "SELECT t.a FROM t JOIN (SELECT sum(a * 0.5) * 2 AS d FROM t GROUP BY a) ON t.a = d"
    ),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder of Parquet files, and the number of bytes of one of them, about."""
    folder = tmp_path_factory.mktemp("streamed") / "t"
    folder.mkdir()
    for number in range(FILES):
        a = range(number * ROWS, (number + 1) * ROWS)
        columns = {"a": list(a), "s": [f"text {value % 7}" for value in a]}
        pq.write_table(pa.table(columns), folder / f"{number:02}.parquet")
    return folder


def streaming(cluster, folder, resolver=None, **options):
    builder = SessionStateBuilder()
    for name, value in {**SPREAD, **options}.items():
        builder.with_distributed_option(name, value)
    session = cluster.session(resolver or DirectResolver(), builder=builder)
    session.register_parquet("t", str(folder))
    return session


@pytest.fixture
def session(cluster, table):
    return streaming(cluster, table)


def counted(batches):
    return Counter(
        tuple(row.values()) for batch in batches for row in batch.to_pyarrow().to_pylist()
    )


def expected(folder, query):
    single = datafusion.SessionContext()
    single.register_parquet("t", str(folder))
    return counted(single.sql(query).execute_stream())


def pieces_of(session, query):
    """How many there are."""
    heads = session._query(session.sql(query), in_pieces=True)
    count = 0
    while heads.has_more:
        heads.next_head().close()
        count += 1
    return count


@pytest.mark.parametrize("broadcast_threshold", [0, 1 << 30], ids=["shuffles", "broadcasts"])
@pytest.mark.parametrize("name", IN_PIECES)
def test_pieces_together_give_every_row_once(cluster, table, name, broadcast_threshold):
    session = streaming(cluster, table, broadcast_threshold=broadcast_threshold)
    stream = session.sql(IN_PIECES[name]).execute_stream()
    assert stream._query.has_more or stream._at.ahead is not None, "there is a second piece"
    batches = list(stream)
    assert counted(batches) == expected(table, IN_PIECES[name])
    assert len({batch.to_pyarrow().schema for batch in batches}) <= 1


NULLABLE_HERE_AND_THERE = """
    SELECT count(*) AS c FROM t GROUP BY a
    UNION ALL SELECT n.c FROM (SELECT a FROM t WHERE a + 1 < 0) CROSS JOIN n
"""


@pytest.mark.parametrize(
    "query",
    [
        NULLABLE_HERE_AND_THERE,
        f"SELECT a, c FROM (SELECT a FROM t WHERE a < 9) RIGHT JOIN ({NULLABLE_HERE_AND_THERE}) ON a = c",
    ],
    ids=["in the last stage", "broadcast into the last stage"],
)
def test_all_pieces_have_one_schema(cluster, table, tmp_path, query):
    """What is in place of a join without build rows may be null, and not every piece has it."""
    schema = pa.schema([pa.field("c", pa.int64(), nullable=False)])
    for number in range(4):
        columns = pa.table([list(range(ROWS))], schema=schema)
        pq.write_table(columns, tmp_path / f"{number}.parquet")
    session = streaming(cluster, table, stream_bytes=16_000, broadcast_threshold=1 << 30)
    session.register_parquet("n", str(tmp_path))
    stream = session.sql(query).execute_stream()
    assert stream._at.ahead is not None
    assert len({batch.to_pyarrow().schema for batch in stream}) == 1


@pytest.mark.parametrize("name", AS_A_WHOLE)
def test_what_cannot_be_cut_is_run_as_a_whole(session, table, name):
    query = AS_A_WHOLE[name]
    assert pieces_of(session, query) == 1
    streamed = counted(session.sql(query).execute_stream())
    assert streamed.total() == expected(table, query).total()


@pytest.mark.parametrize("name", ["join", "group"])
def test_rows_come_before_the_last_are_made(session, table, name):
    stream = session.sql(IN_PIECES[name]).execute_stream()
    found = counted([next(stream)])
    stream._at.ahead.result(20)
    last = max(stream._query.report.stages.values(), key=lambda stage: stage.stage.number)
    assert any(task.report is None for task in last.tasks)
    assert found + counted(stream) == expected(table, IN_PIECES[name])
    assert all(task.report is not None for task in last.tasks)


def test_pieces_have_about_the_bytes_that_were_asked_for(cluster, table):
    size = sum(path.stat().st_size for path in table.iterdir())
    for wanted, least, most in ((0, 1, 1), (size, 1, 1), (size // 2, 2, 3), (1, 4, 4)):
        found = pieces_of(streaming(cluster, table, stream_bytes=wanted), IN_PIECES["all"])
        assert least <= found <= most


@pytest.mark.parametrize(("name", "most"), [("all", 256), ("join", 256 // 6)])
def test_there_are_no_more_pieces_than_are_worth_planning(cluster, table, name, most):
    """Of two partitions for each of three slots."""
    session = streaming(cluster, table, stream_bytes=1)
    rule = DistributedPhysicalOptimizerRule(partitions_per_slot=2)
    session._shared.state = dataclasses.replace(session.state, rule=rule)
    query = session._query(session.sql(IN_PIECES[name]), in_pieces=True)
    assert query._pieces == most
    planned = [stage.tree.node for stage in query._plan.stages]
    assert all(n.hash_partitions <= 256 for n in planned if n.is_hash_repartition)


def test_a_small_query_is_not_searched_for_what_could_not_be_made_again(session, monkeypatch):
    plan = session.sql(IN_PIECES["join"]).distributed_plan()
    monkeypatch.setattr(_pieces, "is_repeatable", lambda *_, **__: pytest.fail("it was"))
    small = dataclasses.replace(plan.options, stream_bytes=1 << 30)
    assert piece_count(dataclasses.replace(plan, options=small), 3) == 1


def test_an_error_comes_after_the_rows_before_it(cluster, table, tmp_path):
    """And those come though the query as a whole fails."""
    for path in table.iterdir():
        columns = pq.read_table(path)
        if path.name == f"{FILES - 1:02}.parquet":
            columns = columns.set_column(1, "s", pa.array(["no number"] * ROWS))
        else:
            columns = columns.set_column(1, "s", pa.array(["1"] * ROWS))
        pq.write_table(columns, tmp_path / path.name)
    stream = streaming(cluster, tmp_path).sql("SELECT a, CAST(s AS INT) AS n FROM t")
    stream = stream.execute_stream()
    found = Counter()
    with pytest.raises(TaskFailedError, match="no number"):
        for batch in stream:
            found += counted([batch])
    assert found
    assert set(found) <= {(a, 1) for a in range((FILES - 1) * ROWS)}
    with pytest.raises(TaskFailedError, match="no number"):
        next(stream)


@pytest.mark.parametrize("name", ["all", "join"])
def test_a_reader_that_stops_holds_up_what_comes_after_the_next_piece(cluster, table, name):
    resolver = DirectResolver()
    session = streaming(cluster, table, resolver, stream_bytes=4_000)
    stream = session.sql(IN_PIECES[name]).execute_stream()
    found = counted([next(stream)])
    # The piece that is read, and the one that is computed meanwhile: neither asks for more.
    stream._at.ahead.result(20)
    eventually(lambda: "release" not in {t.name for t in threading.enumerate()})
    asked = len(resolver.asked)
    files = names(session._shared.exchange().path)
    assert len({name.partition("-")[0] for name in files}) == 1 + 2  # .lock, and two heads
    assert stream._query.has_more
    found += counted(stream)
    assert len(resolver.asked) > asked
    assert found == expected(table, IN_PIECES[name])
    assert names(session._shared.exchange().path) == [".lock"]


def test_workers_keep_of_the_last_stage_no_more_than_a_piece(cluster, table):
    """And of the others all, until the last piece is there."""
    resolver = DirectResolver()
    session = streaming(cluster, table, resolver, stream_bytes=4_000)
    held = []

    def look():
        eventually(lambda: "release" not in {t.name for t in threading.enumerate()})
        held.append(sum(worker_info(resolver, url)["exchange_bytes"] for url in cluster.get_urls()))

    query = session._query(session.sql(IN_PIECES["join"]), in_pieces=True)
    heads = []
    while query.has_more:
        heads.append(query.next_head())
        if query.has_more:
            look()
    assert len(heads) > 3
    assert held[0]
    assert set(held) == {held[0]}, "nothing of the pieces is left, and all that others read"
    heads[-1].close()
    look()
    assert held[-1] == 0


def test_a_lease_is_kept_while_nobody_reads(cluster, table, monkeypatch):
    renewed = []
    renew = WorkerCalls.renew_lease
    monkeypatch.setattr(WorkerCalls, "renew_lease", lambda *args: renewed.append(renew(*args)))
    session = streaming(cluster, table, lease=3.0)
    stream = session.sql(IN_PIECES["join"]).execute_stream()
    found = counted([next(stream)])
    stream._at.ahead.result(20)
    eventually(lambda: len(renewed) > 6)  # each after a third of the lease
    assert found + counted(stream) == expected(table, IN_PIECES["join"])


def test_async_for_streams_too(session, table):
    async def read():
        return counted([batch async for batch in session.sql(IN_PIECES["all"])])

    assert asyncio.run(read()) == expected(table, IN_PIECES["all"])


def test_waiting_for_the_next_piece_leaves_the_event_loop_free(session, table):
    async def read():
        stream = session.sql(IN_PIECES["all"]).execute_stream()
        beats, done = 0, asyncio.Event()

        async def beat():
            nonlocal beats
            while not done.is_set():
                beats += 1
                await asyncio.sleep(0)

        beating = asyncio.create_task(beat())
        found = counted([batch async for batch in stream])
        done.set()
        await beating
        return found, beats

    found, beats = asyncio.run(read())
    assert found == expected(table, IN_PIECES["all"])
    assert beats > 1


class Head:
    """A head that has run, of one row."""

    def __init__(self, row):
        self._row = row

    def stream(self):
        return datafusion.SessionContext().sql(f"SELECT {self._row} AS a").execute_stream()

    def close(self):
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            raise AssertionError("it may wait for workers, and an event loop waits with it")


class Heads:
    """A query that gives these, each but the first once it may run."""

    def __init__(self, *heads, may_run=None):
        self._heads = list(heads)
        self._first = self._heads[0]
        self._may_run = may_run
        self.ended = threading.Event()

    @property
    def has_more(self):
        return bool(self._heads)

    def next_head(self):
        head = self._heads.pop(0)
        assert head is self._first or self._may_run is None or self._may_run.wait(20)
        return head

    def end(self):
        self.ended.set()


def test_giving_up_the_wait_for_a_piece_loses_no_row():
    may_run = threading.Event()

    async def read():
        stream = ResultStream(Heads(Head(1), Head(2), may_run=may_run))
        found = counted([await anext(stream)])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.05)
        may_run.set()
        return found + counted([batch async for batch in stream])

    assert asyncio.run(read()) == Counter([(1,), (2,)])


class Unreadable(Head):
    """Cannot be read the first time."""

    fails = True

    def stream(self):
        if self.fails:
            self.fails = False
            raise RuntimeError("cannot be read")
        return super().stream()


@pytest.mark.parametrize("what", ["the head", "the thread"])
def test_no_piece_is_left_out_after_an_error_between_two(monkeypatch, what):
    second = Unreadable(2) if what == "the head" else Head(2)
    stream = ResultStream(Heads(Head(1), second, Head(3)))
    found = counted([next(stream)])
    with monkeypatch.context() as patch:
        if what == "the thread":
            patch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            next(stream)
    assert found + counted(stream) == Counter([(1,), (2,), (3,)])


def test_no_piece_is_left_out_after_an_interrupt_of_a_start(monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    stream = ResultStream(Heads(Head(1), Head(2), Head(3)))
    found = counted([next(stream)])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert found + counted(stream) == Counter([(1,), (2,), (3,)])


def test_a_stream_that_was_never_read_ends_its_query():
    query = Heads(Unreadable(1))
    with pytest.raises(RuntimeError, match="cannot be read"):
        ResultStream(query)
    eventually(query.ended.is_set)


def test_a_forked_child_does_not_wait_for_what_its_parent_computes(monkeypatch):
    stream = ResultStream(Heads(Head(1), Head(2)))
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(ForkedProcessError, match="spawn"):
            next(stream)
    assert counted(stream) == Counter([(2,)])


def test_arrow_consumers_stream_too(session, table):
    reader = pa.RecordBatchReader.from_stream(session.sql(IN_PIECES["filter and project"]))
    found = Counter(tuple(row.values()) for batch in reader for row in batch.to_pylist())
    assert found == expected(table, IN_PIECES["filter and project"])


# Cheap for the files of the first piece; seconds for each of the others, a batch at a time.
SLOW = f"""
    SELECT levenshtein(repeat('ab', CASE WHEN a < {3 * ROWS} THEN 1 ELSE 2000 END), repeat(s, 500))
    FROM t
"""
SMALL_BATCHES = "SET datafusion.execution.batch_size = 10"


def test_a_dropped_stream_ends_the_piece_that_runs_ahead(cluster, session):
    resolver = DirectResolver()
    session.sql(SMALL_BATCHES).collect()
    stream = session.sql(SLOW).execute_stream()
    next(stream)
    ahead = stream._at.ahead
    del stream
    assert "is over" in str(ahead.exception(20))
    del ahead
    eventually(lambda: names(session._shared.exchange().path) == [".lock"])
    for url in cluster.get_urls():
        eventually(lambda url=url: worker_info(resolver, url)["queries"] == 0)
        eventually(lambda url=url: worker_info(resolver, url)["running"] == 0)


def test_what_is_set_while_a_stream_is_read_is_for_the_next_query(session):
    stream = session.sql(IN_PIECES["all"]).execute_stream()
    sizes = [next(stream).to_pyarrow().num_rows]
    session.sql(SMALL_BATCHES).collect()
    sizes += [batch.to_pyarrow().num_rows for batch in stream]
    assert sizes == [ROWS] * FILES


def test_a_stream_that_is_dropped_while_nothing_runs_leaves_workers_idle(cluster, session):
    resolver = DirectResolver()
    stream = session.sql(IN_PIECES["join"]).execute_stream()
    next(stream)
    stream._at.ahead.result(20)
    assert any(worker_info(resolver, url)["queries"] for url in cluster.get_urls())
    del stream
    eventually(lambda: names(session._shared.exchange().path) == [".lock"])
    for url in cluster.get_urls():
        eventually(lambda url=url: worker_info(resolver, url)["queries"] == 0)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("all", signal.SIGKILL),
        ("group", signal.SIGKILL),
        ("join", signal.SIGKILL),
        ("join", signal.SIGSTOP),
        ("union of all kinds", signal.SIGKILL),
    ],
)
def test_a_worker_that_is_lost_while_a_stream_is_read_costs_no_row(table, name, how):
    """What others made of its output has been read already."""
    with LocalCluster(workers=3) as cluster:
        session = streaming(cluster, table, stream_bytes=4_000, worker_timeout=1.0)
        stream = session.sql(IN_PIECES[name]).execute_stream()
        found = counted([next(stream)])
        stream._at.ahead.result(20)
        os.kill(cluster.processes[0].pid, how)
        found += counted(stream)
        assert found == expected(table, IN_PIECES[name])
        assert stream._query.report.retries or name == "all"


def test_a_program_that_ends_in_mid_stream_leaves_workers_idle(cluster, table):
    program = textwrap.dedent(
        f"""
        from resolver import default_channel_resolver
        from resolver.distributed import *
        from resolver.distributed._calls import worker_info
        urls = {cluster.get_urls()!r}
        state = (
            SessionStateBuilder()
            .with_distributed_worker_resolver(StaticWorkerResolver(urls))
            .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
            .with_distributed_option("scan_bytes_per_task", 0)
            .with_distributed_option("stream_bytes", 1)
            .build()
        )
        session = SessionContext(state)
        session.register_parquet("t", {str(table)!r})
        session.sql({SMALL_BATCHES!r}).collect()
        stream = session.sql({SLOW!r}).execute_stream()
        print(next(stream).to_pyarrow().num_rows)
        while not any(worker_info(default_channel_resolver(), url)["running"] for url in urls):
            pass
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) > 0
    assert not done.stderr
    resolver = DirectResolver()
    for url in cluster.get_urls():
        eventually(lambda url=url: worker_info(resolver, url)["queries"] == 0)
