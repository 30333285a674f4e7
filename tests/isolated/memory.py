"""Measures what one cached URL costs beyond its key and its client.

Usage: memory.py IMPLEMENTATION. Prints the bytes per URL; exits with 1 above 256.
"""

# ruff: noqa: T201 -- a script reports to whoever runs it

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.implementations import load

URLS = 65_536
LIMIT = 256


class Client:
    __slots__ = ()


def main(name):
    load(name)
    urls = [f"http://10.{n >> 16}.{n >> 8 & 255}.{n & 255}:50051" for n in range(URLS)]
    clients = [Client() for _ in urls]
    pending = object()
    # Raw memory, where the compiled cache keeps its tables, is traced too; only the
    # readers, some hundred bytes per cache, are not.
    tracemalloc.start()
    cache = load(name).ClientCache(max_clients=URLS)
    before, _ = tracemalloc.get_traced_memory()
    for url, client in zip(urls, clients, strict=True):
        cache._begin(url, 0, pending)
        cache._publish(url, 0, pending, client)
    after, _ = tracemalloc.get_traced_memory()
    assert cache._counters()[-1] == URLS
    each = (after - before) / URLS
    print(f"{each:.1f} bytes per URL")
    assert each > 64, "an entry was not traced"
    if each > LIMIT:
        sys.exit(f"more than {LIMIT} bytes per URL")


if __name__ == "__main__":
    main(sys.argv[1])
