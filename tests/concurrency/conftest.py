"""Shared by the concurrency tests."""

from tests.support.fixtures import cache_type, implementation, new_cache, resolver_type

__all__ = ["cache_type", "implementation", "new_cache", "resolver_type"]
