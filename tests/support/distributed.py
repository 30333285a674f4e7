"""Helpers of the tests of distributed queries."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datafusion
import pyarrow as pa
import pyarrow.flight as flight

TABLES = ("customer", "lineitem", "nation", "orders", "part", "partsupp", "region", "supplier")


class DirectResolver:
    """A ChannelResolver in a dozen lines that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.invalidated: list[tuple[str, Any]] = []
        self._clients: dict[str, flight.FlightClient] = {}

    def get_flight_client_for_url(self, url: str) -> flight.FlightClient:
        self.asked.append(url)
        if url not in self._clients:
            self._clients[url] = flight.connect(url.replace("http://", "grpc://"))
        return self._clients[url]

    def invalidate(self, url: str, client: Any = None) -> bool:
        self.invalidated.append((url, client))
        return self._clients.pop(url, None) is not None


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until ``condition`` holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.01)


def rows(table: pa.Table) -> list[str]:
    """The rows as a multiset."""
    return sorted(repr(list(row.values())) for row in table.to_pylist())


def names(folder: Path) -> list[str]:
    """What is in ``folder``."""
    return sorted(path.name for path in folder.iterdir())


def configured(settings: dict[str, str]) -> datafusion.SessionContext:
    config = datafusion.SessionConfig()
    for name, value in settings.items():
        config = config.set(name, value)
    return datafusion.SessionContext(config)
