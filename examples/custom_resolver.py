"""A ChannelResolver of one's own: follows workers that moved, and counts who is asked for.

Shows that a subclass keeps what the default one does (one connect, the same client for
everybody, expiry), and how to tell the resolver that a worker failed. No SQL here.

    python examples/custom_resolver.py
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from pyarrow.flight import FlightClient, FlightError, Ticket

from resolver import DefaultChannelResolver, FlightConnector
from resolver.testing import FlightServerProcess


class MovingResolver(DefaultChannelResolver):
    """Knows workers by a lasting name, and where each is now."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._moved: dict[str, str] = {}

    def move(self, name: str, url: str) -> None:
        """From now on ``name`` is the worker at ``url``."""
        with self._lock:
            self._moved[name] = url

    def get_flight_client_for_url(self, url: str) -> FlightClient:
        with self._lock:
            self.asked[url] += 1
            url = self._moved.get(url, url)
        return super().get_flight_client_for_url(url)

    def invalidate(self, url: str, client: FlightClient) -> bool:
        """The client is kept under the URL it was made for: where the worker was then."""
        with self._lock:
            url = self._moved.get(url, url)
        return super().invalidate(url, client)


def fetch(resolver: MovingResolver, url: str) -> int:
    """The rows of a ticket. A client that failed is dropped, unless it was replaced already."""
    client = resolver.get_flight_client_for_url(url)
    try:
        return client.do_get(Ticket(b"3")).read_all().num_rows
    except FlightError:
        resolver.invalidate(url, client)
        raise


def main() -> None:
    name = "http://worker-7.internal:50051"
    with (
        MovingResolver(FlightConnector(connect_timeout=2.0)) as resolver,
        FlightServerProcess() as first,
        FlightServerProcess() as second,
        ThreadPoolExecutor(8) as threads,
    ):
        for worker in (first, second):
            resolver.move(name, worker.url)
            rows = list(threads.map(fetch, [resolver] * 100, [name] * 100))
            print(f"{name} is {worker.url}: {sum(rows)} rows")
        second.kill()
        try:
            fetch(resolver, name)
        except FlightError as error:
            print(f"killed; its client is dropped: {type(error).__name__}, {len(resolver)} held")
        stats = resolver.stats()
        print(f"asked {resolver.asked[name]} times, connected {stats.connects} times")


if __name__ == "__main__":
    main()
