"""What the pages show is what is printed, and the options they list are those there are."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import resolver
from resolver import cli
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    SessionContext,
    SessionStateBuilder,
)
from resolver.distributed._options import DistributedOptions
from resolver.distributed._workers import WorkerSlots

DOCS = Path(resolver.__file__).parents[1] / "docs"
PAGE = DOCS / "distributed-plans.md"
WORKERS = DOCS / "workers.md"
DISTRIBUTED = DOCS / "distributed.md"


def test_the_tree_of_the_page_is_real(planning):
    query = (
        "SELECT c_mktsegment, count(*) AS n FROM customer "
        "JOIN orders ON o_custkey = c_custkey GROUP BY c_mktsegment ORDER BY n"
    )
    workers = [WorkerSlots(f"http://127.0.0.1:{port}", 1) for port in (1, 2, 3)]
    plan = DistributedPhysicalOptimizerRule().distribute(
        planning.sql(query).execution_plan(), planning, workers
    )
    assert f"```\n{plan}\n```" in PAGE.read_text()


def test_the_tree_of_the_readme_is_real(planning):
    query = "SELECT l_returnflag, count(*) FROM lineitem GROUP BY 1 ORDER BY 1"
    workers = [WorkerSlots(f"http://127.0.0.1:{port}", 1) for port in (1, 2, 3)]
    plan = DistributedPhysicalOptimizerRule().distribute(
        planning.sql(query).execution_plan(), planning, workers
    )
    readme = (DOCS.parent / "README.md").read_text()
    assert f'ctx.sql("{query}")' in readme
    assert f"```text\n{plan}\n```" in readme


class CountingWorkers:
    """Counts how often a session asks who its workers are."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.asked = 0

    def get_urls(self):
        self.asked += 1
        return self.cluster.get_urls()

    def during(self, call):
        before = self.asked
        call()
        return self.asked - before


def test_workers_are_asked_for_as_often_as_the_page_says(cluster, register, capsys):
    workers = CountingWorkers(cluster)
    session = SessionContext(
        SessionStateBuilder()
        .with_distributed_worker_resolver(workers)
        .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
        .build()
    )
    register(session)
    frame = session.sql("SELECT l_shipmode, count(*) AS n FROM lineitem GROUP BY 1")
    assert workers.asked == 0, "building a query asks nobody"
    assert workers.during(frame.collect) == 1
    assert workers.during(frame.explain) == 1
    assert workers.during(frame.distributed_plan) == 1
    assert workers.during(lambda: frame.explain(analyze=True)) == 3


def test_what_runs_in_this_process_asks_for_no_workers(cluster, register):
    workers = CountingWorkers(cluster)
    session = SessionContext(
        SessionStateBuilder()
        .with_distributed_worker_resolver(workers)
        .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
        .build()
    )
    register(session)
    regions = session.table("region")
    assert workers.during(regions.describe) == 0
    assert workers.during(regions.cache) == 0
    assert (
        "Only `cache`,\n`describe` and `write_table` run in your process" in DISTRIBUTED.read_text()
    )


def test_the_options_of_the_page_are_those_there_are():
    listed = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    expected = [
        f"| `{option.name}` | `{option.default!r}` | {option.metadata['doc']} |"
        for option in dataclasses.fields(DistributedOptions)
    ]
    assert [line for line in listed if line in expected] == expected
    assert len([line for line in listed if not line.startswith("| `Network")]) == len(expected)


def test_the_page_on_workers_names_every_option_of_the_command():
    (commands,) = [
        action
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    options = {
        name
        for action in commands.choices["worker"]._actions
        if action.help != argparse.SUPPRESS
        for name in action.option_strings
        if name.startswith("--")
    }
    rows = [line for line in WORKERS.read_text().splitlines() if line.startswith("| `--")]
    named = {name for row in rows for name in re.findall(r"`(--[a-z-]+)", row.split("|")[1])}
    assert named == options - {"--help"}
