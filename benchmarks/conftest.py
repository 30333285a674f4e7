"""``pytest benchmarks --benchmark-enable`` times these; the test run executes each once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from resolver.testing import FlightServerProcess

from .measure import heading


def pytest_report_header() -> str:
    """The heading that every benchmark has."""
    return f"benchmarks: {heading()}"


@pytest.fixture(scope="session")
def worker() -> Iterator[FlightServerProcess]:
    """A real server whose answers are as small as they can be."""
    with FlightServerProcess(batch_rows=1) as server:
        yield server
