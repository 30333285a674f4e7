"""Runs the scripts beside this file, each in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from resolver import _backend
from tests.support.implementations import TESTED, load

HERE = Path(__file__).parent


@pytest.fixture(params=TESTED)
def implementation(request: pytest.FixtureRequest) -> str:
    load(request.param)
    return request.param


def run(script: str, *arguments: str, timeout: float = 60) -> str:
    """What the script prints; warnings are errors, and so is anything on stderr."""
    result = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / script), *arguments],
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout


def test_nothing_leaks(implementation):
    run("leaks.py", implementation)


def test_a_cached_url_costs_at_most_256_bytes(implementation):
    assert "bytes per URL" in run("memory.py", implementation)


@pytest.mark.skipif(_backend.IMPLEMENTATION != "compiled", reason="is about the compiled hit path")
def test_a_hit_allocates_nothing():
    assert run("hit_allocations.py") == "nothing\n"


def test_importing_loads_and_starts_next_to_nothing():
    run("import_cost.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("case", "reported"),
    [
        ("unused", "adopted"),
        ("use", "refused"),
        ("drop", "dropped"),
        ("cycle", "collected"),
        ("disposer", "disposed of its own"),
        ("queued", "kept"),
        ("new", "works"),
        ("locked", "refused"),
    ],
)
def test_a_forked_child_refuses_frees_nothing_and_ends(implementation, case, reported):
    lines = run("fork.py", implementation, case).splitlines()
    # A line that tells of clients that ended in the child would be one more.
    assert lines == [f"child: {reported}", "status: 0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    "case",
    [
        "inside_a_running_loop",
        "with_a_loop_of_its_own",
        "dropped_in_the_child",
        "half_read",
        "never_used",
    ],
)
def test_a_forked_child_of_an_asyncio_program_refuses_and_frees_nothing(implementation, case):
    assert run("aio_fork.py", implementation, case) == "ok\n"


@pytest.mark.parametrize("case", ["live", "late", "default", "cycle", "connecting", "disposing"])
def test_the_interpreter_ends_cleanly_with_clients(implementation, case):
    assert run("shutdown.py", implementation, case) == "main ends\n"


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="not a free-threaded interpreter"
)
def test_the_gil_stays_off_under_load():
    run("free_threaded.py", "3")
