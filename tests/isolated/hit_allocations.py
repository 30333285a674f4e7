"""Counts what hits allocate while no other thread works. Usage: hit_allocations.py

tracemalloc counts every thread's memory, and without the GIL another thread's comes in at any
moment, more often the longer one measures. Prints "nothing".
"""

# ruff: noqa: T201 -- a script reports to whoever runs it

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

from resolver import DefaultChannelResolver
from resolver.testing import FakeConnector

URL = "http://10.0.0.7:50051"
REPEATS = [None] * 100


def peak(look_up: Callable[[str], object]) -> int:
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in REPEATS:
        look_up(URL)
    return tracemalloc.get_traced_memory()[1] - before


with DefaultChannelResolver(FakeConnector()) as resolver:
    get = resolver.get_flight_client_for_url
    get(URL)
    tracemalloc.start()
    # More than once: whatever the first call of anything leaves behind.
    of_hits, of_others = (min(peak(look_up) for _ in range(20)) for look_up in (get, len))
    tracemalloc.stop()
    assert resolver.stats().connects == 1
assert of_hits <= of_others, f"{of_hits} bytes, and {of_others} without a hit"
print("nothing")
