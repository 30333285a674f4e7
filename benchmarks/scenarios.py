"""Requests, cold starts and memory: each returns figures, prints nothing, judges nothing."""

from __future__ import annotations

import contextlib
import gc
import socket
import statistics
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

from pyarrow import flight

from resolver import DefaultChannelResolver, FlightConnector, WorkerConnectTimeoutError
from resolver.testing import FlightServerProcess

from .measure import all_at_once, median_ratio, take_turns

_TICKET = flight.Ticket(b"1")

HELD = "held"
RESOLVED = "resolved"
NEW_CLIENT = "new client"


def request_styles(url: str, resolver: DefaultChannelResolver) -> dict[str, Callable[[], Any]]:
    """Three ways of one small `do_get`; each returns the table it got."""
    held = resolver.get_flight_client_for_url(url)

    def new_client() -> Any:
        with flight.FlightClient(url.replace("http", "grpc")) as client:
            return client.do_get(_TICKET).read_all()

    return {
        HELD: lambda: held.do_get(_TICKET).read_all(),
        RESOLVED: lambda: resolver.get_flight_client_for_url(url).do_get(_TICKET).read_all(),
        NEW_CLIENT: new_client,
    }


def requests(*, calls: int = 25, turns: int = 200) -> dict[str, tuple[float, float]]:
    """Microseconds of a small `do_get`, and that over the same on a client that is held."""

    def repeated(request: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                request()

        return run

    with FlightServerProcess(batch_rows=1) as worker, DefaultChannelResolver() as resolver:
        runs = {
            style: repeated(request)
            for style, request in request_styles(worker.url, resolver).items()
        }
        close = take_turns({style: runs[style] for style in (HELD, RESOLVED)}, turns=turns)
        far = take_turns({style: runs[style] for style in (HELD, NEW_CLIENT)}, turns=turns // 10)
    return {
        style: (statistics.median(taken) / calls * 1e6, median_ratio(taken, held))
        for style, taken, held in (
            (HELD, close[HELD], close[HELD]),
            (RESOLVED, close[RESOLVED], close[HELD]),
            (NEW_CLIENT, far[NEW_CLIENT], far[HELD]),
        )
    }


def stampede(*, threads: int = 256) -> int:
    """Connections that a real server sees when many threads ask for its cold URL."""
    with FlightServerProcess() as worker, DefaultChannelResolver() as resolver:
        all_at_once(threads, lambda _: resolver.get_flight_client_for_url(worker.url))
        client = resolver.get_flight_client_for_url(worker.url)
        (answer,) = client.do_action("connections")
        seen = int(answer.body.to_pybytes())
        if resolver.stats().connects != seen:
            raise RuntimeError(f"{seen} connections at the server, but {resolver.stats()}")
        return seen


def silent_peers(*, threads: int = 64, connect_timeout: float = 1.0) -> float:
    """Seconds until as many threads have given up on as many silent peers."""
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(_silent_peer()) for _ in range(threads)]
        resolver = stack.enter_context(
            DefaultChannelResolver(FlightConnector(connect_timeout=connect_timeout))
        )

        def ask(number: int) -> None:
            try:
                resolver.get_flight_client_for_url(urls[number])
            except WorkerConnectTimeoutError:
                return
            raise RuntimeError("a silent peer answered")

        return all_at_once(threads, ask)


class _Given:
    """A connector whose clients exist already, so that they weigh nothing here."""

    def __init__(self, clients: dict[str, object]) -> None:
        self._clients = clients

    def connect(self, url: str) -> object:
        return self._clients[url]


def bytes_per_url(*, count: int = 65_536) -> float:
    """Bytes that Python allocated per cached URL, beyond the URL's text and its client."""
    clients = {f"http://w{number}:50051": object() for number in range(count)}
    resolver = DefaultChannelResolver(_Given(clients), max_clients=count)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for url in clients:
            resolver.get_flight_client_for_url(url)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        if len(resolver) != count:
            raise RuntimeError(f"{len(resolver)} of {count} URLs are cached")
    finally:
        tracemalloc.stop()
    callers = {id(url) for url in clients}
    text = sum(sys.getsizeof(key) for key in resolver.urls() if id(key) not in callers)
    return (after - before - text) / count


@contextlib.contextmanager
def _silent_peer() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
