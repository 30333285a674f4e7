"""Runs each life of an entry many times and compares blocks and memory before and after.

Usage: leaks.py IMPLEMENTATION. Exits with 1 and says which cycle leaks.
"""

# ruff: noqa: T201 -- a script reports to whoever runs it

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from resolver import WorkerConnectError, _background
from tests.support.implementations import Client, Pending, cache_type, resolver_type

ROUNDS = {"compiled": 130, "python": 40}
URLS_PER_ROUND = 20
BLOCKS_ALLOWED = 100  # measuring takes some itself; far below one per URL
# Of malloc, where the compiled cache keeps its entries: 19 per URL. Tables grow until each
# of their stripes has seen its worst, and keep that size.
BYTES_ALLOWED = 49_152

numbers = itertools.count()


def fresh_urls():
    """URLs never seen before, so that no table entry can be reused."""
    return [f"http://worker-{next(numbers)}.example:50051" for _ in range(URLS_PER_ROUND)]


class Connector:
    connect_timeout = 5.0

    def connect(self, url):
        if "refuse" in url:
            raise OSError("refused")
        return Client()


def cycles(name):
    class Forgetful(cache_type(name)):
        def _discard(self, clients):
            pass

    cache = Forgetful(max_clients=50, idle_timeout=10.0, lanes=2)
    resolver = resolver_type(name)(Connector(), max_clients=50, idle_timeout=None)
    remembering = resolver_type(name)(Connector(), max_clients=50, failure_ttl=1000.0)

    def miss_and_evict():
        for url in fresh_urls():
            cache.store(url, aliases=[url + "/" * n for n in range(1, 7)])

    def drop():
        for url in fresh_urls():
            cache._drop(url, cache.store(url, aliases=[url + "/"]))

    def fail():
        for url in fresh_urls():
            cache._fail(url, 1, cache.start(url, lane=1), 0.0)
            cache._fail(url, 1, cache.start(url, lane=1), 5.0)

    def detach():
        for url in fresh_urls():
            pending = cache.start(url)
            cache._begin(url, 0, Pending())
            cache._drop(url)
            cache._publish(url, 0, pending, Client())

    def expire():
        for url in fresh_urls():
            cache.store(url, aliases=[url + "/"])
        cache._advance_clock(20)
        cache.expire()
        cache._keys()

    def clear():
        for url in fresh_urls():
            cache.store(url, aliases=[url + "/"])
            cache.start(url, lane=1)
        cache._clear()

    def make_and_free():
        made = Forgetful(lanes=3)
        for url in fresh_urls():
            made.store(url, aliases=[url + "/"])

    def cycle_through_the_cache():
        made = Forgetful()
        for url in fresh_urls():
            made.store(url).cache = made

    def resolve_and_evict():
        for url in fresh_urls():
            resolver.get_flight_client_for_url(url)
            resolver.get_flight_client_for_url(url.upper().replace("HTTP", "grpc"))

    def resolve_and_fail():
        for url in fresh_urls():
            for each in (resolver, remembering):
                with contextlib.suppress(WorkerConnectError):
                    each.get_flight_client_for_url(url.replace("worker", "refuse"))

    def resolve_nonsense():
        for url in fresh_urls():
            with contextlib.suppress(ValueError):
                resolver.get_flight_client_for_url(url + "/path")

    return [
        miss_and_evict,
        drop,
        fail,
        detach,
        expire,
        clear,
        make_and_free,
        cycle_through_the_cache,
        resolve_and_evict,
        resolve_and_fail,
        resolve_nonsense,
    ]


class MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of the GNU C library."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            [
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            ]
        )
    ]


def malloc_bytes():
    """What malloc has given out; 0 where the C library does not tell."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = MallInfo
    return library.mallinfo2().uordblks


def settled_blocks():
    """Blocks in use once the disposer holds nothing that this process could still free."""
    ended = []

    class Last:
        def __del__(self):
            ended.append(True)

    for _ in range(2):
        gc.collect()
        ended.clear()
        _background.discard([Last()])
        while not ended:
            _background._disposer._arrivals.empty()
    gc.collect()
    return sys.getallocatedblocks()


def main(name):
    bad = []
    for cycle in cycles(name):
        measured = []
        for _ in range(3):
            for _ in range(ROUNDS[name]):
                cycle()
            measured.append((settled_blocks(), malloc_bytes()))
        # The first third warms up; a leak grows in both others, a buffer in one of them.
        (b0, m0), (b1, m1), (b2, m2) = measured
        grown, more = min(b1 - b0, b2 - b1), min(m1 - m0, m2 - m1)
        print(f"{cycle.__name__}: {grown:+d} blocks, {more:+d} bytes")
        if grown > BLOCKS_ALLOWED or more > BYTES_ALLOWED:
            bad.append(cycle.__name__)
    if bad:
        sys.exit(f"leaking: {', '.join(bad)}")


if __name__ == "__main__":
    main(sys.argv[1])
