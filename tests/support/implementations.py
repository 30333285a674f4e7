"""The cache's implementations, under one set of names, for tests that run on both.

A missing extension is a failure, not a skip, unless the run asked for the Python twin
alone with ``RESOLVER_BACKEND=python``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import pytest

MODULES = {"compiled": "resolver._cache", "python": "resolver._cache_py"}
TESTED = os.environ.get("CACHES", "compiled python").split()
"""What tests of each implementation in turn run on; one of two runs need not repeat the other's."""


def load(name: str) -> ModuleType:
    """The module of the implementation `name`."""
    try:
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError:
        if os.environ.get("RESOLVER_BACKEND") == "python":
            pytest.skip("the extension is not built, and RESOLVER_BACKEND=python asks for the twin")
        raise


class Recorder:
    """Mixin for a ClientCache: records misses and what was discarded, and drives connects."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.missed: list[Any] = []
        self.discarded: list[Any] = []

    def _miss(self, url: Any) -> Any:
        self.missed.append(url)
        raise LookupError(url)

    def _discard(self, clients: list[Any]) -> None:
        self.discarded.extend(clients)

    def store(self, key: str, client: Any = None, *, lane: int = 0, aliases: Any = ()) -> Any:
        """Connect `key` to `client`, as a resolver would; returns the client."""
        client = Client() if client is None else client
        pending = Pending()
        found, shared = self._begin(key, lane, pending)
        assert found is None, f"{key} is cached already"
        assert shared is pending, f"{key} is being connected already"
        assert self._publish(key, lane, pending, client)
        for alias in aliases:
            self._alias(alias, key, lane, client)
        return client

    def start(self, key: str, *, lane: int = 0) -> Pending:
        """Begin a connect and leave it under way."""
        pending = Pending()
        assert self._begin(key, lane, pending) == (None, pending)
        return pending

    def get(self, url: Any) -> Any:
        """The cached client, or None; never connects."""
        try:
            return self.get_flight_client_for_url(url)
        except LookupError:
            return None

    @property
    def counts(self) -> dict[str, int]:
        """The counters by name."""
        names = (
            "hits",
            "misses",
            "waits",
            "connects",
            "connect_failures",
            "evicted_idle",
            "evicted_capacity",
            "invalidated",
            "clients",
        )
        return dict(zip(names, self._counters(), strict=True))

    def expire(self) -> int:
        """One round of the reaper."""
        return sum(self._expire(index) for index in range(self._stripe_count))


class Client:
    """A client: an object with an identity, open to weak references and attributes."""


class Pending:
    """A connect under way: opaque to the cache."""


def recording(module: ModuleType) -> type[Any]:
    """A recording subclass of a module's ClientCache."""
    return type("RecordingCache", (Recorder, module.ClientCache), {"__module__": __name__})


def cache_type(name: str) -> type[Any]:
    """`recording` of the implementation `name`."""
    return recording(load(name))


def resolver_type(name: str) -> type[Any]:
    """A DefaultChannelResolver on the implementation `name`, whichever one is live."""
    from resolver import _backend, _resolver

    if name == _backend.IMPLEMENTATION:
        return _resolver.DefaultChannelResolver
    spec = importlib.util.find_spec("resolver._resolver")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    live = sys.modules["resolver._backend"]
    sys.modules["resolver._backend"] = load(name)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["resolver._backend"] = live
    kind: type[Any] = module.DefaultChannelResolver
    assert issubclass(kind, load(name).ClientCache)
    return kind
