"""Data, sessions and clusters for the tests of distributed queries."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datafusion
import pyarrow.flight as flight
import pytest

from resolver.distributed import (
    LocalCluster,
    SessionContext,
    SessionStateBuilder,
    Worker,
    _listener,
)
from resolver.distributed._settings import EXECUTION, PLANNING
from tests.support.distributed import TABLES, DirectResolver, configured


@pytest.fixture(scope="session", autouse=True)
def measured() -> None:
    """Let coverage see the calls of Flight, which come on threads that Python did not start."""

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> Any:
            trace = threading.gettrace()
            if trace is not None and sys.gettrace() is None:
                sys.settrace(trace)
            return function(*arguments)

        return wrapper

    for name in ("do_action", "do_get", "list_actions"):
        server = _listener.FlightServer
        setattr(server, name, traced(getattr(server, name)))


@pytest.fixture(scope="session")
def tpch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TPC-H at scale factor 0.01, four files per table."""
    folder = tmp_path_factory.mktemp("tpch") / "data"
    tool = Path(sys.executable).with_name("tpchgen-cli")
    command = [str(tool) if tool.exists() else shutil.which("tpchgen-cli") or "tpchgen-cli"]
    command += ["parquet", "-s", "0.01", "--parts=4", f"--output-dir={folder}"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def register(tpch: Path) -> Callable[[datafusion.SessionContext], None]:
    """Registers the tables of TPC-H in a session."""

    def register(session: datafusion.SessionContext) -> None:
        for table in TABLES:
            session.register_parquet(table, str(tpch / table))

    return register


@pytest.fixture(scope="session")
def single(register: Callable[[datafusion.SessionContext], None]) -> datafusion.SessionContext:
    """Single-node DataFusion: the reference."""
    session = datafusion.SessionContext()
    register(session)
    return session


@pytest.fixture(scope="session")
def planning(register: Callable[[datafusion.SessionContext], None]) -> datafusion.SessionContext:
    """A session that plans as the distributed one does, for three partitions."""
    session = configured({**PLANNING, "datafusion.execution.target_partitions": "3"})
    register(session)
    return session


@pytest.fixture
def executing() -> datafusion.SessionContext:
    """A session that decodes plans as a worker does."""
    return configured(dict(EXECUTION))


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """Three worker processes. A test that harms a worker starts a cluster of its own."""
    with LocalCluster(workers=3) as cluster:
        yield cluster


@pytest.fixture
def resolver() -> DirectResolver:
    return DirectResolver()


@pytest.fixture
def session(
    cluster: LocalCluster,
    resolver: DirectResolver,
    register: Callable[[datafusion.SessionContext], None],
) -> SessionContext:
    """A session on the cluster with the tables of TPC-H."""
    # The tables are small; their tasks are spread all the same.
    builder = SessionStateBuilder().with_distributed_option("scan_bytes_per_task", 0)
    session = cluster.session(resolver, builder=builder)
    register(session)
    return session


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """A worker in this process."""
    with Worker().into_flight_server(exchange_dir=tmp_path / "exchange") as server:
        yield server


@pytest.fixture
def client(server: Any) -> Iterator[flight.FlightClient]:
    with flight.connect(server.location) as client:
        yield client
