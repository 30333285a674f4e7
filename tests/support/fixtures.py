"""Fixtures of the cache tests, for the conftest.py files that want them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import aio, implementations


@pytest.fixture(params=implementations.TESTED)
def implementation(request: pytest.FixtureRequest) -> str:
    """The name of each implementation of the cache in turn."""
    implementations.load(request.param)
    return request.param


@pytest.fixture
def cache_type(implementation: str) -> type[Any]:
    """A recording ClientCache of each implementation in turn."""
    return implementations.cache_type(implementation)


@pytest.fixture
def resolver_type(implementation: str) -> type[Any]:
    """DefaultChannelResolver on each implementation in turn."""
    return implementations.resolver_type(implementation)


@pytest.fixture
def aio_resolver_type(implementation: str) -> type[Any]:
    """resolver.aio.DefaultChannelResolver on each implementation in turn."""
    return aio.aio_resolver_type(implementation)


@pytest.fixture
def new_cache(cache_type: type[Any]) -> Iterator[Callable[..., Any]]:
    """Makes recording caches; validates every one of them after the test."""
    made = []

    def make(kind: type[Any] = cache_type, **options: Any) -> Any:
        made.append(kind(**options))
        return made[-1]

    yield make
    for cache in made:
        cache._validate()


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Switches the cycle collector off, so that only reference counts free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
