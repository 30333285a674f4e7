"""Results that are read while the rest of them is still to be computed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from dataclasses import replace

import datafusion
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resolver import ForkedProcessError
from resolver.distributed import LocalCluster, SessionStateBuilder, TaskFailedError, _stream
from resolver.distributed._calls import worker_info
from resolver.distributed._options import DistributedOptions
from resolver.distributed._pieces import piece_count, pieces
from resolver.distributed._stage import DistributedPlan
from resolver.distributed._stream import ResultStream
from tests.support.distributed import DirectResolver, eventually, names

FILES, ROWS = 12, 500

ROW_WISE = {
    "all": "SELECT * FROM t",
    "filter and project": "SELECT a + 1 AS more, s FROM t WHERE a % 3 = 0",
    "no columns": "SELECT 1 AS one FROM t WHERE a > 10",
    "unnest": "SELECT unnest([a, a + 1]) AS x FROM t",
    "nothing": "SELECT a FROM t WHERE a < 0",
}
NOT_ROW_WISE = {
    "limit": "SELECT a FROM t LIMIT 700",
    "limit inside": "SELECT a + 1 AS x FROM (SELECT a FROM t LIMIT 700) WHERE a % 2 = 0",
    "order": "SELECT a FROM t ORDER BY a",
    "group": "SELECT s, count(*) FROM t GROUP BY s",
    "distinct": "SELECT DISTINCT s FROM t",
    "join": "SELECT t.a FROM t JOIN t AS u ON t.a = u.a",
    "union": "SELECT a FROM t UNION ALL SELECT a FROM t WHERE a < 100",
    "window": "SELECT a, row_number() OVER (ORDER BY a) AS n FROM t",
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
    for name, value in {"scan_bytes_per_task": 0, "stream_bytes": 1, **options}.items():
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


def as_pieces(session, query):
    plan = session.sql(query).distributed_plan()
    count = piece_count(plan)
    finer = session._distribute(session.sql(query), pieces=count)
    return pieces(finer, count)


@pytest.mark.parametrize("name", ROW_WISE)
def test_pieces_together_give_every_row_once(session, table, name):
    assert len(as_pieces(session, ROW_WISE[name])) > 1
    streamed = session.sql(ROW_WISE[name]).execute_stream()
    assert counted(streamed) == expected(table, ROW_WISE[name])


@pytest.mark.parametrize("name", NOT_ROW_WISE)
def test_what_is_more_than_row_wise_is_run_as_a_whole(session, table, name):
    query = NOT_ROW_WISE[name]
    assert len(as_pieces(session, query)) == 1
    assert len(counted(session.sql(query).execute_stream())) == len(expected(table, query))


def test_a_plan_of_another_shape_is_not_cut(session):
    whole = session.sql(NOT_ROW_WISE["group"]).distributed_plan()
    assert pieces(whole, 5) == [whole]


def test_a_scan_that_has_become_empty_is_one_piece(session):
    plan = session.sql(ROW_WISE["all"]).distributed_plan()
    (stage,) = plan.stages
    nothing = replace(stage.tree, node=stage.tree.node.with_file_groups([]))
    head = replace(plan.head.tree, source=replace(stage, tree=nothing))
    (piece,) = pieces(replace(plan, head=replace(plan.head, tree=head)), 5)
    assert piece.head.tree.source.tree is nothing


def test_pieces_have_about_the_bytes_that_were_asked_for(cluster, table):
    size = sum(path.stat().st_size for path in table.iterdir())
    for wanted, least, most in ((0, 1, 1), (size, 1, 1), (size // 2, 2, 3), (1, 4, 4)):
        found = as_pieces(streaming(cluster, table, stream_bytes=wanted), ROW_WISE["all"])
        assert least <= len(found) <= most


def test_there_are_no_more_pieces_than_are_worth_planning(session):
    assert piece_count(session.sql(ROW_WISE["all"]).distributed_plan()) == 256


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


def test_a_reader_that_stops_holds_up_what_comes_after_the_next_piece(cluster, table):
    resolver = DirectResolver()
    session = streaming(cluster, table, resolver)
    stream = session.sql(ROW_WISE["all"]).execute_stream()
    found = counted([next(stream)])
    # The piece that is read, and the one that is computed meanwhile: neither asks for more.
    stream._at.ahead.result(20)
    asked = len(resolver.asked)
    files = names(session._shared.exchange().path)
    assert len({name.partition("-")[0] for name in files}) == 1 + 2  # .lock, and two queries
    assert stream._at.rest
    found += counted(stream)
    assert len(resolver.asked) > asked
    assert found == expected(table, ROW_WISE["all"])
    assert names(session._shared.exchange().path) == [".lock"]


def test_async_for_streams_too(session, table):
    async def read():
        return counted([batch async for batch in session.sql(ROW_WISE["all"])])

    assert asyncio.run(read()) == expected(table, ROW_WISE["all"])


def test_waiting_for_the_next_piece_leaves_the_event_loop_free(session, table):
    async def read():
        stream = session.sql(ROW_WISE["all"]).execute_stream()
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
    assert found == expected(table, ROW_WISE["all"])
    assert beats > 1


class Head:
    """A head that has run, of one row."""

    def __init__(self, row):
        self.lost = frozenset()
        self._row = row

    def stream(self):
        return datafusion.SessionContext().sql(f"SELECT {self._row} AS a").execute_stream()

    def close(self):
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            raise AssertionError("it may wait for workers, and an event loop waits with it")


def test_giving_up_the_wait_for_a_piece_loses_no_row():
    may_run = threading.Event()

    def run(plan, *, report, check):
        assert may_run.wait(20)
        return Head(2)

    async def read():
        plan = DistributedPlan(None, (), DistributedOptions(), None)
        stream = ResultStream(Head(1), [(plan, run)])
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
    heads = iter([Unreadable(2) if what == "the head" else Head(2), Head(3)])
    plan = DistributedPlan(None, (), DistributedOptions(), None)
    stream = ResultStream(Head(1), [(plan, lambda _plan, **_: next(heads))] * 2)
    found = counted([next(stream)])
    with monkeypatch.context() as patch:
        if what == "the thread":
            patch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            next(stream)
    assert found + counted(stream) == Counter([(1,), (2,), (3,)])
    eventually(lambda: not _stream._computing)


def test_a_forked_child_does_not_wait_for_what_its_parent_computes(monkeypatch):
    plan = DistributedPlan(None, (), DistributedOptions(), None)
    stream = ResultStream(Head(1), [(plan, lambda _plan, **_: Head(2))])
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(ForkedProcessError, match="spawn"):
            next(stream)
    assert counted(stream) == Counter([(2,)])


def test_arrow_consumers_stream_too(session, table):
    reader = pa.RecordBatchReader.from_stream(session.sql(ROW_WISE["filter and project"]))
    found = Counter(tuple(row.values()) for batch in reader for row in batch.to_pylist())
    assert found == expected(table, ROW_WISE["filter and project"])


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
    assert "dropped before its end" in str(ahead.exception(20))
    del ahead
    eventually(lambda: names(session._shared.exchange().path) == [".lock"])
    for url in cluster.get_urls():
        eventually(lambda url=url: worker_info(resolver, url)["queries"] == 0)
        eventually(lambda url=url: worker_info(resolver, url)["running"] == 0)


def test_what_is_set_while_a_stream_is_read_is_for_the_next_query(session):
    stream = session.sql(ROW_WISE["all"]).execute_stream()
    sizes = [next(stream).to_pyarrow().num_rows]
    session.sql(SMALL_BATCHES).collect()
    sizes += [batch.to_pyarrow().num_rows for batch in stream]
    assert sizes == [ROWS] * FILES


def test_a_worker_that_is_killed_while_a_stream_is_read_costs_no_row(table):
    with LocalCluster(workers=3) as cluster:
        session = streaming(cluster, table, stream_bytes=1)
        stream = session.sql(ROW_WISE["all"]).execute_stream()
        found = counted([next(stream)])
        os.kill(cluster.processes[0].pid, signal.SIGKILL)
        found += counted(stream)
        assert found == expected(table, ROW_WISE["all"])


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
