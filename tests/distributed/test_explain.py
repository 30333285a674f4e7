"""What a person is shown of a distributed query: plans, pictures, progress, figures, frames."""

from __future__ import annotations

import io
import re
import textwrap
import threading
import xml.etree.ElementTree as ET

import pyarrow as pa
import pytest
from datafusion import udaf, udwf
from datafusion.user_defined import Accumulator, WindowEvaluator

from resolver import DefaultChannelResolver
from resolver.distributed import LocalCluster, SessionStateBuilder, SingleNodePlan
from tests.support.distributed import rows

JOIN = (
    "SELECT n_name, count(*) AS n FROM customer JOIN nation ON c_nationkey = n_nationkey "
    "JOIN orders ON o_custkey = c_custkey GROUP BY n_name"
)

# More than what is sent along with a task's report, so workers fetch it of one another.
LARGE = "SELECT o_orderkey, o_comment, c_comment FROM orders JOIN customer ON o_custkey = c_custkey"


def printed(capsys, frame, **options):
    frame.explain(**options)
    return capsys.readouterr().out


def test_a_picture_is_written_to_a_path_and_to_a_stream(session, tmp_path, capsys):
    frame = session.sql(JOIN)
    frame.explain(format="svg", file=tmp_path / "plan.svg")
    stream = io.StringIO()
    frame.explain(format="svg", file=stream)
    assert (tmp_path / "plan.svg").read_text(encoding="utf-8") == stream.getvalue()
    assert capsys.readouterr().out == ""
    picture = ET.fromstring(stream.getvalue())  # it is our own
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    said = "".join(picture.itertext())
    for stage in frame.distributed_plan().stages:
        assert f"Stage {stage.number}" in said
    assert "Head stage" in said


def test_graphviz_has_an_edge_for_every_boundary(session, tmp_path, capsys):
    frame = session.sql(JOIN)
    text = printed(capsys, frame, format="graphviz")
    frame.explain(format="graphviz", file=str(tmp_path / "plan.dot"))
    assert (tmp_path / "plan.dot").read_text(encoding="utf-8") == text
    assert text.startswith("digraph")
    assert text.rstrip().endswith("}")
    assert text.count("->") >= len(frame.distributed_plan().stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "png"}, "no explain format 'png'"),
        ({"format": "svg", "analyze": True}, "as a tree only"),
    ],
)
def test_what_cannot_be_shown_is_refused(session, options, message):
    with pytest.raises(ValueError, match=message):
        session.sql(JOIN).explain(**options)


def test_a_query_that_is_not_distributed_has_a_picture_too(session, capsys):
    session.from_pydict({"x": [1]})
    frame = session.sql(
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 3) SELECT * FROM r"
    )
    assert isinstance(frame.distributed_plan(), SingleNodePlan)
    assert ET.fromstring(printed(capsys, frame, format="svg")) is not None
    assert printed(capsys, frame, format="graphviz").startswith("digraph")


def test_analyze_tells_rows_bytes_and_time_and_what_resolvers_did(cluster, register, capsys):
    builder = SessionStateBuilder()
    for name in (
        "broadcast_threshold",
        "bytes_per_task",
        "scan_bytes_per_task",
        "coordinator_threshold",
    ):
        builder.with_distributed_option(name, 0)
    with DefaultChannelResolver() as channels:
        session = cluster.session(channels, builder=builder)
        register(session)
        frame = session.sql(LARGE)
        text = printed(capsys, frame, analyze=True, verbose=True)
    assert re.search(r"Head stage ── coordinator ── 15,000 rows", text)
    titles = re.findall(
        r"Stage (\d+) ── (\d+) tasks? ── ([\d,]+) rows, ([\d.]+ \w+) ── [\d.]+ s", text
    )
    assert {int(number) for number, *_ in titles} == {
        s.number for s in frame.distributed_plan().stages
    }
    for url in cluster.get_urls():
        assert f"@ {url}" in text
        (used,) = re.findall(rf"resolver of worker {re.escape(url)}: (.*)", text)
        asked = dict(part.split() for part in used.split(", "))
        assert {"hits", "misses", "connects"} <= set(asked)
        assert int(asked["hits"]) + int(asked["misses"]) > 0, "it fetched without its resolver"
    assert re.search(r"resolver of the coordinator: .*hits [1-9].*connects \d", text)
    nodes = re.findall(r"│ +([\d,]+) rows +[\d.]+ s +\w*Exec", text)
    assert len(nodes) > len(titles), "every node has its rows and time"
    scanned = re.findall(r"([\d,]+) rows +[\d.]+ s +DataSourceExec", text)
    assert sorted(scanned) == ["1,500", "15,000"], "a node's rows are those of all tasks"
    assert "0 retries" in text
    assert re.search(r"[1-9][\d.]* \w+ written, [1-9][\d.]* \w+ fetched", text)


SMALL = """
    import datafusion

    def build(query):
        runtime = datafusion.RuntimeEnvBuilder().with_disk_manager_os()
        return query.builder.with_runtime(runtime.with_fair_spill_pool(1_500_000)).build()
"""


@pytest.mark.parametrize("analyze", [False, True])
def test_a_join_that_one_task_must_run_is_named(cluster, register, resolver, capsys, analyze):
    builder = SessionStateBuilder().with_distributed_option("coordinator_threshold", 0)
    session = cluster.session(resolver, builder=builder)
    register(session)
    frame = session.sql(
        "SELECT c_custkey, n_name FROM customer FULL JOIN nation ON c_custkey < n_nationkey"
    )
    shown = printed(capsys, frame, analyze=analyze)
    assert shown.count("in one task: NestedLoopJoinExec emits rows of its build side") == 1
    shown = printed(capsys, session.sql(JOIN), analyze=analyze)
    assert "in one task: HashJoin" not in shown


def test_analyze_tells_what_was_spilled(tmp_path, register, single, capsys):
    """Two workers with little memory sort more than fits."""
    (tmp_path / "small.py").write_text(textwrap.dedent(SMALL))
    query = "SELECT l_orderkey, l_comment FROM lineitem ORDER BY l_comment, l_orderkey"
    options = {
        "datafusion.execution.sort_spill_reservation_bytes": "100000",
        "datafusion.execution.batch_size": "1024",
    }
    with LocalCluster(
        workers=2, session_builder="small:build", environment={"PYTHONPATH": str(tmp_path)}
    ) as cluster:
        builder = SessionStateBuilder().with_options(options)
        builder.with_distributed_option("scan_bytes_per_task", 1 << 20)
        session = cluster.session(builder=builder)
        register(session)
        text = printed(capsys, session.sql(query), analyze=True, verbose=True)
        assert session.sql(query).to_pylist() == single.sql(query).to_pylist()
    assert re.search(r"60,[\d]+ rows +[\d.]+ s spilled [1-9][\d.]* \w+ +SortExec", text)


def test_progress_is_told_to_a_function_until_all_is_done(session, capsys):
    told, lock = [], threading.Lock()

    def progress(state):
        with lock:
            told.append(state)

    session.sql(JOIN).show(progress=progress)
    out, err = capsys.readouterr()
    assert "n_name" in out
    assert err == ""
    assert {state.stage for state in told} >= {1}
    assert any(state.done == 0 for state in told), "told when a stage starts"
    assert max(state.total_done for state in told) == max(state.total_tasks for state in told)
    assert all(state.done <= state.tasks <= state.total_tasks for state in told)


def test_progress_is_shown_on_standard_error(session, capsys):
    session.sql(JOIN).show(progress=True)
    out, err = capsys.readouterr()
    assert "n_name" in out
    assert re.search(r"stage 1: \d+ of \d+ tasks, in all \d+ of \d+", err)
    assert "stage" not in out


def test_a_frame_shows_the_rows_of_the_distributed_query(session, single, resolver):
    query = f"{JOIN} ORDER BY n_name LIMIT 3"
    asked = len(resolver.asked)
    assert repr(session.sql(query)) == repr(single.sql(query))
    assert len(resolver.asked) > asked, "it was not run on workers"
    assert "<table" in session.sql(query)._repr_html_()


def test_a_frame_says_that_there_is_more(session, single):
    query = "SELECT l_orderkey FROM lineitem"
    shown, expected = repr(session.sql(query)), repr(single.sql(query))
    assert shown.splitlines()[-1] == expected.splitlines()[-1]
    assert len(shown.splitlines()) == len(expected.splitlines())


class Summed(Accumulator):
    """Not what ``sum`` does: ten times that."""

    def __init__(self):
        self._sum = 0

    def update(self, values):
        self._sum += 10 * pa.compute.sum(values).as_py()

    def merge(self, states):
        self._sum += pa.compute.sum(states[0]).as_py()

    def state(self):
        return [pa.scalar(self._sum)]

    def evaluate(self):
        return pa.scalar(self._sum)


class Backwards(WindowEvaluator):
    """Not what ``row_number`` does: numbers from the end."""

    def evaluate_all(self, values, num_rows):
        return pa.array(range(num_rows, 0, -1))


INT = pa.int64()


@pytest.mark.parametrize("name", ["sum", "ten_times"])
def test_an_aggregate_that_does_not_travel_runs_here(cluster, register, name):
    session = cluster.session()
    register(session)
    session.register_udaf(udaf(Summed, INT, INT, [INT], "immutable", name))
    frame = session.sql(f"SELECT {name}(o_orderkey) AS n FROM orders")
    plan = frame.distributed_plan()
    assert isinstance(plan, SingleNodePlan)
    assert plan.reason
    plain = session.sql("SELECT o_orderkey FROM orders").to_arrow_table()
    assert frame.to_pylist() == [{"n": 10 * pa.compute.sum(plain["o_orderkey"]).as_py()}]


@pytest.mark.parametrize("name", ["row_number", "backwards"])
def test_a_window_function_that_does_not_travel_runs_here(cluster, register, name):
    session = cluster.session()
    register(session)
    session.register_udwf(udwf(Backwards, INT, INT, "immutable", name))
    frame = session.sql(
        f"SELECT n_nationkey, {name}(n_nationkey) OVER (ORDER BY n_nationkey) AS n FROM nation"
    )
    plan = frame.distributed_plan()
    assert isinstance(plan, SingleNodePlan)
    assert plan.reason
    assert rows(frame.to_arrow_table()) == sorted(repr([k, 25 - k]) for k in range(25))
