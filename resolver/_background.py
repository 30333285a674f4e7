"""The two daemon threads of a process: one lets go of clients, one finds idle ones.

Neither connects or looks anything up. Both start on first use and start over in a
forked child, where the parent's clients are kept for ever and never freed.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import sys
import threading
import time
import weakref
from typing import Any, Protocol

from ._backend import leak

logger = logging.getLogger("resolver")

_FIRST_LOOK = 0.01  # seconds until a dropped client's other holders are counted again
_LONGEST_LOOK = 1.0
_REST_PER_LOOK = 10  # times as long as a look took, before the next one
_PATIENCE = 60.0  # seconds after which a client that may be in a cycle is let go
_SHORTEST_ROUND = 0.05  # seconds between two rounds of the reaper
_LONGEST_ROUND = 15.0
_ROUNDS_PER_TIMEOUT = 4


class Expiring(Protocol):
    """What the reaper needs of a resolver."""

    @property
    def _stripe_count(self) -> int: ...

    def _expire(self, stripe_index: int, /) -> int: ...


class Daemon:
    """A thread that starts when it is first needed, and again should it ever end."""

    name: str

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._is_starting = False
        self._starting = threading.RLock()  # a finalizer may come back here

    def ensure_started(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        with self._starting:
            # In an interpreter that shuts down, a new thread never runs, and before 3.12
            # the one that starts it waits for ever.
            if self._is_starting or sys.is_finalizing():
                return
            if self._thread is not None and self._thread.is_alive():
                return
            self._is_starting = True
            try:
                thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                thread.start()
                self._thread = thread
            except RuntimeError:
                pass  # the interpreter is shutting down, or out of threads
            finally:
                self._is_starting = False

    def _run(self) -> None:
        while True:
            try:
                self._work()
            except Exception:
                logger.exception("the thread %s was interrupted; it goes on", self.name)

    def _work(self) -> None:
        """What the thread does over and over."""
        raise NotImplementedError


class Disposer(Daemon):
    """Holds dropped clients until nobody else does, then lets go on its own thread.

    A client's last reference may take a while to release (a gRPC channel is torn down)
    and may run user code. Never calls ``close()``: as long as anybody holds a client,
    it stays usable.

    On a free-threaded build, the interpreter may hand the end of a client to the thread
    that made it, as long as that runs: counts are biased towards the maker.

    A client in a reference cycle seems held for ever. So one that the garbage collector
    knows is let go after a while whoever holds it; a plain ``FlightClient`` is none.
    """

    name = "resolver-disposer"

    def __init__(self) -> None:
        super().__init__()
        # SimpleQueue.put is re-entrant: a finalizer may discard a client too.
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._held: list[tuple[Any, float]] = []
        self._pause = self._shortest = _FIRST_LOOK
        self._look_at = 0.0

    def discard(self, clients: list[Any]) -> None:
        """Take over references. Thread-safe, never blocks."""
        for client in clients:
            self._arrivals.put(client)
        self.ensure_started()

    def _work(self) -> None:
        # The time decides when to look, not a lull in the arrivals: there may be none.
        now = time.monotonic()
        if self._held and now >= self._look_at:
            _let_go(self._held, now)
            self._shortest = max(_FIRST_LOOK, (time.monotonic() - now) * _REST_PER_LOOK)
            longest = max(_LONGEST_LOOK, self._shortest)
            self._pause = min(max(self._pause * 2, self._shortest), longest)
            self._look_at = now + self._pause
        timeout = max(self._look_at - now, 0) if self._held else None
        try:
            # Into no variable: this frame may outlive the call, in a traceback that starts
            # at a finalizer above, and would hold the client with it.
            self._held.append((self._arrivals.get(timeout=timeout), time.monotonic() + _PATIENCE))
        except queue.Empty:
            return
        if self._pause > self._shortest:
            self._pause = self._shortest
            self._look_at = time.monotonic() + self._pause


class Reaper(Daemon):
    """Expires what is idle in every resolver of the process, also when nobody calls."""

    name = "resolver-reaper"

    def __init__(self) -> None:
        super().__init__()
        self._arrivals: queue.SimpleQueue[tuple[weakref.ref[Expiring], float]] = queue.SimpleQueue()
        self._watched: list[tuple[weakref.ref[Expiring], float]] = []

    def watch(self, resolver: Expiring, timeout: float) -> None:
        """Expire `resolver` a few times per `timeout` seconds, as long as it lives."""
        interval = min(max(timeout / _ROUNDS_PER_TIMEOUT, _SHORTEST_ROUND), _LONGEST_ROUND)
        self._arrivals.put((weakref.ref(resolver), interval))
        self.ensure_started()

    def _work(self) -> None:
        pause = min((interval for _, interval in self._watched), default=None)
        with contextlib.suppress(queue.Empty):
            self._watched.append(self._arrivals.get(timeout=pause))
        for reference, _ in self._watched:
            resolver = reference()
            if resolver is not None:
                _expire_all(resolver)
            del resolver
        self._watched = [entry for entry in self._watched if entry[0]() is not None]


def _expire_all(resolver: Expiring) -> None:
    try:
        for stripe_index in range(resolver._stripe_count):  # noqa: SLF001 -- see Expiring
            resolver._expire(stripe_index)  # noqa: SLF001
    except Exception:
        logger.exception("expiring idle clients failed; trying again later")


def _let_go(held: list[tuple[Any, float]], now: float) -> None:
    """Release the clients that nobody else holds; the order of the others may change."""
    for at in range(len(held) - 1, -1, -1):
        if sys.getrefcount(held[at][0]) <= _SOLE_HOLDER or (
            now >= held[at][1] and gc.is_tracked(held[at][0])
        ):
            held[at] = held[-1]
            held.pop()


def _sole_holder_count() -> int:
    """What ``sys.getrefcount(held[at][0])`` says when only the list holds the object."""
    held = [(object(), 0.0)]
    at = 0
    return sys.getrefcount(held[at][0])


_SOLE_HOLDER = _sole_holder_count()

_disposer: Disposer | None = Disposer()
_reaper = Reaper()


def discard(clients: list[Any]) -> None:
    """Release clients that a resolver dropped, in the background.

    At the very end of an interpreter, when this module is already emptied, nothing: the
    process takes them along.
    """
    if _disposer is not None:
        _disposer.discard(clients)


def watch(resolver: Expiring, timeout: float) -> None:
    """Expire idle clients of `resolver` in the background; held weakly."""
    _reaper.watch(resolver, timeout)


def _start_over() -> None:
    global _disposer, _reaper  # noqa: PLW0603
    leak(_disposer)
    _disposer = Disposer()
    _reaper = Reaper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over)
