"""Shared by the unit tests."""

from tests.support.fixtures import aio_resolver_type, cache_type, implementation, new_cache, no_gc

__all__ = ["aio_resolver_type", "cache_type", "implementation", "new_cache", "no_gc"]
