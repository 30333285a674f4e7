"""What one resolver holds for one event loop: its caches and its connects under way.

A home is owned by its loop, as an attribute of it, and by nobody else: clients know their
loop, so whoever held them would hold the loop. Must not connect, parse URLs or decide policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

from resolver._backend import ClientCache

if TYPE_CHECKING:
    import asyncio
    from collections import deque

    from resolver._errors import ResolverError

Counters = tuple[int, ...]
"""The fields of `ResolverStats`, in order."""


class LoopCache(ClientCache):
    """Worker URL -> client of one event loop and one lane."""

    __slots__ = ("loop",)

    def __init__(
        self,
        loop: ref[asyncio.AbstractEventLoop],
        *,
        idle_timeout: float | None,
        max_clients: int,
    ) -> None:
        super().__init__(idle_timeout=idle_timeout, max_clients=max_clients)
        self.loop = loop

    def _miss(self, url: Any) -> None:  # noqa: ARG002 -- what a LoopRouter expects
        return None

    def _discard(self, clients: list[Any]) -> None:
        """Let go of clients on their own loop's thread, whoever dropped them.

        Nobody else ever holds the last reference elsewhere: those who use a client run on
        its loop. Once the loop is closed there is nothing left to disturb.
        """
        loop = self.loop()
        if loop is not None:
            try:
                loop.call_soon_threadsafe(clients.clear)
            except RuntimeError:
                pass  # closed
            else:
                return
        clients.clear()


class LoopHome:
    """The caches of one event loop, one per lane, and the tasks that connect.

    ``retired`` receives the counters when the loop goes, whichever way.
    """

    __slots__ = ("__weakref__", "_ended", "_retired", "caches", "loop", "tasks")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        retired: deque[Counters],
        *,
        idle_timeout: float | None,
        max_clients: int,
        lanes: int,
    ) -> None:
        self._ended = True
        self._retired = retired
        self.loop = ref(loop)
        # All lanes together hold no more than max_clients.
        self.caches = tuple(
            LoopCache(self.loop, idle_timeout=idle_timeout, max_clients=max_clients // lanes)
            for _ in range(lanes)
        )
        self.tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    def __del__(self) -> None:
        self.end()

    @property
    def route(self) -> tuple[ref[Any], tuple[ref[Any], ...]]:
        """How a `LoopRouter` finds the caches."""
        return self.loop, tuple(ref(cache) for cache in self.caches)

    @property
    def is_over(self) -> bool:
        """Whether the loop is closed or gone."""
        loop = self.loop()
        return loop is None or loop.is_closed()

    def counters(self) -> Counters:
        """The sum over the lanes."""
        each = [cache._counters() for cache in self.caches]  # noqa: SLF001 -- its own caches
        return tuple(map(sum, zip(*each, strict=True)))

    def expire(self) -> int:
        """Drop what was idle too long; returns how many clients that were. Thread-safe."""
        return sum(
            cache._expire(stripe)  # noqa: SLF001
            for cache in self.caches
            for stripe in range(cache._stripe_count)  # noqa: SLF001
        )

    def shut(self, error: ResolverError) -> None:
        """Drop everything, store nothing more, and fail those who wait. Thread-safe."""
        for cache in self.caches:
            for pending in cache._shut():  # noqa: SLF001
                pending.fail_from_anywhere(error)

    def end(self) -> None:
        """Drop everything and hand in the counters; idempotent. Nothing in a forked child."""
        if self._ended or self.caches[0]._is_inherited():  # noqa: SLF001
            return
        self._ended = True
        for cache in self.caches:
            cache._clear()  # noqa: SLF001
        self._retired.append(self.counters())
