"""What people use instead of a resolver, each ready to answer the same URLs.

A peer is measured as it is used: ``target.method(url)`` in a plain ``for`` loop over
strings that the caller holds. Every peer holds every URL before it is measured.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cachebox
import cachetools
import moka_py

from resolver import DefaultChannelResolver
from resolver.testing import FakeConnector

from .measure import URLS

Loop = Callable[[int, Iterable[str]], None]
"""``loop(rounds, urls)`` looks every URL up ``rounds`` times."""

RESOLVER = "resolver"
DICT = "dict.get"
LRU_CACHE = "functools.lru_cache"
LOCKED_DICT = "dict + Lock"
CACHEBOX = "cachebox.TTLCache"
MOKA = "moka_py, time-to-idle"
CACHETOOLS = "cachetools.TTLCache + Lock"
NAMES = (RESOLVER, DICT, LRU_CACHE, LOCKED_DICT, CACHEBOX, MOKA, CACHETOOLS)

_IDLE_TIMEOUT = 300.0  # the resolver's own defaults
_CAPACITY = 65_536


class _Locked:
    """What one writes around a mapping that is not thread-safe."""

    def __init__(self, clients: Mapping[str, Any]) -> None:
        self.clients = clients
        self.lock = threading.Lock()

    def lookup(self, url: str) -> Any:
        with self.lock:
            return self.clients.get(url)


def hit_peers() -> dict[str, Loop]:
    """The resolver with default options, then its peers; all of them hold `URLS`."""
    resolver = DefaultChannelResolver(FakeConnector())
    clients = {url: resolver.get_flight_client_for_url(url) for url in URLS}

    @functools.lru_cache(maxsize=_CAPACITY)
    def remembered(url: str) -> Any:
        return clients[url]

    timed: Any = cachetools.TTLCache(_CAPACITY, _IDLE_TIMEOUT)
    timed.update(clients)
    boxed: Any = cachebox.TTLCache(_CAPACITY, _IDLE_TIMEOUT)
    boxed.update(clients)
    moka: Any = moka_py.Moka(_CAPACITY, tti=_IDLE_TIMEOUT)
    for url, client in clients.items():
        moka.set(url, client)

    lookups: dict[str, Callable[[str], Any]] = {
        RESOLVER: resolver.get_flight_client_for_url,
        DICT: clients.get,
        LRU_CACHE: remembered,
        LOCKED_DICT: _Locked(clients).lookup,
        CACHEBOX: boxed.get,
        MOKA: moka.get,
        CACHETOOLS: _Locked(timed).lookup,
    }
    for name, lookup in lookups.items():
        wrong = [url for url in URLS if lookup(url) is not clients[url]]
        if wrong:
            raise RuntimeError(f"{name} does not hold {wrong[0]}")
    if resolver.stats().connects != len(URLS):
        raise RuntimeError(f"the resolver did not hit: {resolver.stats()}")
    return {name: as_called(lookup) for name, lookup in lookups.items()}


def as_called(lookup: Callable[[str], Any]) -> Loop:
    """A loop that finds a bound method by name in each turn, as a caller's code does."""
    target = getattr(lookup, "__self__", None)
    if target is None:
        call = "target(url)"
        target = lookup
    else:
        call = f"target.{lookup.__name__}(url)"
    source = (
        "def loop(rounds, urls):\n"
        "    for _ in range(rounds):\n"
        "        for url in urls:\n"
        f"            {call}\n"
    )
    namespace: dict[str, Any] = {"target": target}
    exec(source, namespace)
    loop: Loop = namespace["loop"]
    return loop
