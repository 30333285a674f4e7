"""What a person sees of a distributed frame: its repr, its plan, its progress, how it ran."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree as ET

import pytest

QUERY = "SELECT l_shipmode, count(*) AS n FROM lineitem GROUP BY l_shipmode ORDER BY l_shipmode"
JOIN = (
    "SELECT n_name, count(*) AS n FROM customer JOIN nation ON n_nationkey = c_nationkey "
    "GROUP BY n_name ORDER BY n_name"
)


def test_a_frame_shows_its_rows_as_datafusion_shows_them(session, resolver, single):
    asked = len(resolver.asked)
    shown = repr(session.sql(QUERY))
    assert shown == repr(single.sql(QUERY))
    assert len(resolver.asked) > asked
    assert "TRUCK" in session.sql(QUERY)._repr_html_()


def test_a_long_frame_shows_that_there_is_more(session):
    shown = repr(session.sql("SELECT l_orderkey FROM lineitem WHERE l_tax > 0.01"))
    assert "truncated" in shown


def test_progress_tells_of_every_stage_and_task(session, capfd):
    told = []
    session.sql(QUERY).show(progress=told.append)
    assert told[-1].total_done == told[-1].total_tasks > 1
    assert [p.total_done for p in told] == sorted(p.total_done for p in told)
    assert {p.stage for p in told} == set(range(1, max(p.stage for p in told) + 1))
    assert capfd.readouterr().err == ""
    session.sql(QUERY).show(progress=True)
    out, err = capfd.readouterr()
    assert "TRUCK" in out
    assert "tasks" in err


def test_what_progress_raises_fails_the_query(session):
    def failing(_progress):
        raise ZeroDivisionError("by progress")

    with pytest.raises(ZeroDivisionError, match="by progress"):
        session.sql(QUERY).show(progress=failing)


def test_a_plan_is_drawn_as_svg(session, tmp_path):
    path = tmp_path / "plan.svg"
    session.sql(JOIN).explain(format="svg", file=path)
    picture = ET.parse(path).getroot()  # it is well-formed
    assert picture.tag.endswith("svg")
    text = " ".join(picture.itertext())
    for stage in session.sql(JOIN).distributed_plan().stages:
        assert f"Stage {stage.number}" in text
    assert "NetworkShuffle" in text


def test_a_plan_is_told_to_graphviz(session, capsys):
    session.sql(JOIN).explain(format="graphviz")
    text = capsys.readouterr().out
    assert text.startswith("digraph")
    assert text.count("{") == text.count("}")
    stages = {stage.number for stage in session.sql(JOIN).distributed_plan().stages}
    arrows = re.findall(r"(\w+) -> (\w+)", text)
    assert len(arrows) >= len(stages)


def test_a_plan_is_written_where_one_says(session, tmp_path):
    kept = io.StringIO()
    session.sql(JOIN).explain(file=kept)
    session.sql(JOIN).explain(file=tmp_path / "plan.txt")
    assert kept.getvalue() == (tmp_path / "plan.txt").read_text()
    assert "Head stage" in kept.getvalue()


def test_an_unknown_format_is_refused(session):
    with pytest.raises(ValueError, match="tree"):
        session.sql(JOIN).explain(format="png")


def test_how_it_ran_is_told_per_node_task_and_resolver(session, single):
    kept = io.StringIO()
    session.sql(JOIN).explain(analyze=True, file=kept)
    text = kept.getvalue()
    counted = single.sql("SELECT count(*) FROM customer").to_arrow_table()[0][0].as_py()
    # The scan's rows, the task's size and time, each stage's worker, each resolver's counts.
    assert f"{counted:,} rows" in text
    assert re.search(r"t0 @ http://127.0.0.1:\d+: [\d,]+ rows, [\d.]+ \w+, \d+\.\d+ s", text)
    assert re.search(r"\d+ stages?, \d+ tasks?, .* written, .* fetched, 0 retries", text)
    assert len(re.findall(r"resolver of worker http://\S+: hits \d+", text)) == 3
    assert "decided: broadcast" in text
