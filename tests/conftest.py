"""What every test shares: the heading, hypothesis profiles, a stack dump on a hang."""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
import sysconfig

import pytest
from hypothesis import HealthCheck, settings

from resolver import _backend

faulthandler.enable()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what runs in the background; tests that press Ctrl-C inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("stress", parent=settings.get_profile("ci"), max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def gil_state() -> str:
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    return "with the GIL" if enabled else "free-threaded"


def pytest_report_header() -> str:
    return (
        f"resolver: {_backend.IMPLEMENTATION} cache, "
        f"{platform.python_implementation()} {platform.python_version()} {gil_state()}"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A free-threaded run in which something turned the GIL on has proven nothing."""
    if sysconfig.get_config_var("Py_GIL_DISABLED") and gil_state() != "free-threaded":
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        sys.stderr.write("\nsomething turned the GIL on during this run\n")


@pytest.fixture
def implementation() -> str:
    """Which cache this run is about: "compiled" or "python"."""
    return _backend.IMPLEMENTATION
