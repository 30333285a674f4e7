"""gRPC does not survive a fork: a child is told at once, and its parent is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import resolver
from resolver.testing import FlightServerProcess

SCRIPT = Path(__file__).with_name("fork_script.py")
PACKAGE_ROOT = str(Path(resolver.__file__).resolve().parents[1])

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.mark.parametrize("end", ["_exit", "exit"])
@pytest.mark.parametrize(
    "scenario",
    [
        "live_connection",
        "half_read",
        "constructed_only",
        "own_client",
        "bare_client",
        "own_server",
        "unseen",
        "late_import",
        "grandchild",
        "nothing_constructed",
        "connector_without_grpc",
        "credentials_being_read",
        "token_being_asked_for",
        pytest.param(
            "other_grpc_name",
            marks=pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc"),
        ),
    ],
)
def test_fork(scenario: str, end: str, server: FlightServerProcess) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), scenario, server.url, *([end] if end == "exit" else [])],
        env={**os.environ, "PYTHONPATH": PACKAGE_ROOT},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr
    assert server.is_running
