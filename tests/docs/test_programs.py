"""Every program of examples/ runs as its docstring says, and prints what it is to show."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PROGRAMS = sorted((TOP / "examples").glob("*.py"))

# What a reader should see: on standard output, and on standard error.
EXPECTED = {
    "custom_resolver.py": (["asked 201 times, connected 2 times", "its client is dropped"], []),
    "embedded_cluster.py": (["| 17   | 27.5 | 8000 |", "28000 hot hours"], []),
    "explain_a_join.py": (
        ["HashJoinExec: mode=Partitioned", "decided: broadcast", "mode=CollectLeft", "1980000"],
        [],
    ),
    "retry_after_kill.py": (
        ["killed process", "the same rows; now on 2 workers"],
        ["WARNING resolver.distributed._scheduler: query"],
    ),
    "worker_session_builder.py": (
        ["blue: 24975000 cents", "PermissionError: there is no tenant 'red'"],
        [],
    ),
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_the_program_runs(program, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    printed, warned = EXPECTED[program.name]
    assert [text for text in printed if text not in finished.stdout] == [], finished.stdout
    assert [text for text in warned if text not in finished.stderr] == [], finished.stderr
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == [], "it left files behind"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_the_program_is_short_and_says_what_it_shows(program):
    text = program.read_text()
    assert len(text.splitlines()) < 100
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert "Shows" in docstring
    assert f"python examples/{program.name}" in docstring
