"""What the pages show is what is printed, and the options they list are those there are."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import resolver
from resolver import cli
from resolver.distributed import DistributedPhysicalOptimizerRule
from resolver.distributed._options import DistributedOptions
from resolver.distributed._workers import WorkerSlots

DOCS = Path(resolver.__file__).parents[1] / "docs"
PAGE = DOCS / "distributed-plans.md"
WORKERS = DOCS / "workers.md"


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
