"""All that one resolver holds, over any number of event loops.

Knows which loops are open and which home belongs to which. Must not connect, parse URLs or
decide who waits; `_resolver.py` does.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

from resolver._backend import IMPLEMENTATION
from resolver._resolver import ResolverStats

from ._home import LoopHome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._home import Counters, LoopCache

if TYPE_CHECKING or IMPLEMENTATION == "python":
    from ._hits_py import LoopRouter, fast_hits
else:
    from ._hits import LoopRouter, fast_hits

__all__ = ["LoopHomes", "fast_hits"]

_NOTHING: Final = (0,) * len(ResolverStats.__dataclass_fields__)


class LoopHomes(LoopRouter):
    """A `LoopRouter` with a home for each event loop that missed; thread-safe.

    A base class, whose options its subclass has. Loops are held weakly, homes by their loop.
    """

    __slots__ = ("_attribute", "_connected", "_guard", "_homes", "_process", "_retired",
                 "_total", "_unattached")  # fmt: skip

    idle_timeout: float | None
    max_clients: int
    connections_per_url: int
    _process: int

    def __init__(self) -> None:
        self._attribute = f"_resolver_aio_{id(self):x}"
        self._retired: deque[Counters] = deque()
        self._total = _NOTHING
        self._start_over()

    def _check_usable(self) -> None:
        """Raise if this was closed, or inherited through a fork."""
        raise NotImplementedError

    def _start_over(self) -> None:
        self._guard = threading.RLock()  # re-entrant: a finalizer may come back here
        self._homes: dict[int, weakref.ref[LoopHome]] = {}  # by the identity of their loop
        self._unattached: list[LoopHome] = []
        self._routes = ()
        self._connected = False
        self._process = os.getpid()

    def _is_inherited(self) -> bool:
        return self._process != os.getpid()

    def _home(self) -> LoopHome:
        """The running loop's home; made at its first miss."""
        loop = asyncio.get_running_loop()
        home = self._home_of(loop)
        if home is not None:
            return home
        home = LoopHome(
            loop,
            self._retired,
            idle_timeout=self.idle_timeout,
            max_clients=self.max_clients,
            lanes=self.connections_per_url,
        )
        with self._guard:
            self._check_usable()
            self._connected = True
            self._homes[id(loop)] = weakref.ref(home)
            try:
                setattr(loop, self._attribute, home)
            except AttributeError:
                self._unattached.append(home)  # held here until the loop is closed
            self._reroute()
        list(self._live_homes())  # a new loop often follows one that was closed
        self._fold()
        return home

    def _home_of(self, loop: asyncio.AbstractEventLoop) -> LoopHome | None:
        reference = self._homes.get(id(loop))
        home = None if reference is None else reference()
        return home if home is not None and home.loop() is loop else None

    def _live_homes(self) -> Iterator[LoopHome]:
        """The homes of loops that are open; forgets the others."""
        for reference in list(self._homes.values()):
            home = reference()
            if home is not None and not home.is_over:
                yield home
            elif home is not None:
                self._forget(home)

    def _forget(self, home: LoopHome) -> None:
        """End a home and its loop's hold on it, once however many threads come to do so."""
        with self._guard:
            numbers = [number for number, held in self._homes.items() if held() is home]
            for number in numbers:
                del self._homes[number]
            if home in self._unattached:
                self._unattached.remove(home)
            self._reroute()
        if numbers:
            loop = home.loop()
            if loop is not None and getattr(loop, self._attribute, None) is home:
                delattr(loop, self._attribute)
            home.end()

    def _reroute(self) -> None:
        """Under the guard."""
        homes = [(number, reference()) for number, reference in self._homes.items()]
        alive = {number: home for number, home in homes if home is not None}
        self._homes = {number: weakref.ref(home) for number, home in alive.items()}
        self._routes = tuple(home.route for home in alive.values())

    def _fold(self) -> None:
        """Add up what homes handed in when they ended."""
        with self._guard:
            while self._retired:
                self._total = _sum([self._total, self._retired.popleft()])

    def _forget_all(self) -> None:
        """End every home; for a resolver that ends. Nothing in a forked child."""
        if getattr(self, "_process", None) == os.getpid():
            for home in list(self._live_homes()):
                self._forget(home)

    def _caches(self) -> list[LoopCache]:
        """The caches of all open loops."""
        return [cache for home in self._live_homes() for cache in home.caches]

    def _counters(self) -> Counters:
        """The fields of `ResolverStats`, over all loops, those that are gone included."""
        homes = list(self._live_homes())
        self._fold()
        return _sum([self._total, *(home.counters() for home in homes)])

    @property
    def _stripe_count(self) -> int:
        """For the reaper: this expires in one step."""
        return 1

    def _expire(self, _stripe_index: int) -> int:
        return sum(home.expire() for home in list(self._live_homes()))


def _sum(counters: list[Counters]) -> Counters:
    return tuple(map(sum, zip(*counters, strict=True)))
