"""The two daemon threads of a process: one lets go of clients, one finds idle ones.

Neither connects or looks anything up. Both start on first use and start over in a
forked child, where the parent's clients are kept for ever and never freed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import weakref
from typing import Any, Protocol

from ._backend import leak

logger = logging.getLogger("resolver")

_FIRST_LOOK = 0.01  # seconds until a dropped client's other holders are counted again
_LONGEST_LOOK = 1.0
_SHORTEST_ROUND = 0.05  # seconds between two rounds of the reaper
_LONGEST_ROUND = 15.0
_ROUNDS_PER_TIMEOUT = 4


class Expiring(Protocol):
    """What the reaper needs of a resolver."""

    @property
    def _stripe_count(self) -> int: ...

    def _expire(self, stripe_index: int, /) -> int: ...


class _Daemon:
    """A thread that starts when it is first needed."""

    name: str

    def __init__(self) -> None:
        self._started = False
        self._starting = threading.RLock()  # a finalizer may come back here

    def ensure_started(self) -> None:
        if self._started:
            return
        with self._starting:
            if not self._started:
                self._started = True
                try:
                    threading.Thread(target=self._run, name=self.name, daemon=True).start()
                except RuntimeError:  # the interpreter is shutting down, or out of threads
                    self._started = False

    def _run(self) -> None:
        raise NotImplementedError


class Disposer(_Daemon):
    """Holds dropped clients until nobody else does, then lets go on its own thread.

    A client's last reference may take a while to release (a gRPC channel is torn down)
    and may run user code. Never calls ``close()``: as long as anybody holds a client,
    it stays usable.
    """

    name = "resolver-disposer"

    def __init__(self) -> None:
        super().__init__()
        # SimpleQueue.put is re-entrant: a finalizer may discard a client too.
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def discard(self, clients: list[Any]) -> None:
        """Take over references. Thread-safe, never blocks."""
        for client in clients:
            self._arrivals.put(client)
        self.ensure_started()

    def _run(self) -> None:
        held: list[Any] = []
        delay = _FIRST_LOOK
        while True:
            try:
                held.append(self._arrivals.get(timeout=delay if held else None))
                delay = _FIRST_LOOK
                continue  # look only when no more arrive, so that a burst is one look
            except queue.Empty:
                delay = min(delay * 2, _LONGEST_LOOK)
            for at in range(len(held) - 1, -1, -1):
                if sys.getrefcount(held[at]) <= _SOLE_HOLDER:
                    del held[at]


class Reaper(_Daemon):
    """Expires what is idle in every resolver of the process, also when nobody calls."""

    name = "resolver-reaper"

    def __init__(self) -> None:
        super().__init__()
        self._arrivals: queue.SimpleQueue[tuple[weakref.ref[Expiring], float]] = (
            queue.SimpleQueue()
        )

    def watch(self, resolver: Expiring, timeout: float) -> None:
        """Expire `resolver` a few times per `timeout` seconds, as long as it lives."""
        interval = min(max(timeout / _ROUNDS_PER_TIMEOUT, _SHORTEST_ROUND), _LONGEST_ROUND)
        self._arrivals.put((weakref.ref(resolver), interval))
        self.ensure_started()

    def _run(self) -> None:
        watched: list[tuple[weakref.ref[Expiring], float]] = []
        while True:
            pause = min((interval for _, interval in watched), default=None)
            with contextlib.suppress(queue.Empty):
                watched.append(self._arrivals.get(timeout=pause))
            for reference, _ in watched:
                resolver = reference()
                if resolver is not None:
                    _expire_all(resolver)
                del resolver
            watched = [entry for entry in watched if entry[0]() is not None]


def _expire_all(resolver: Expiring) -> None:
    try:
        for stripe_index in range(resolver._stripe_count):  # noqa: SLF001 -- see Expiring
            resolver._expire(stripe_index)  # noqa: SLF001
    except Exception:
        logger.exception("expiring idle clients failed; trying again later")


def _sole_holder_count() -> int:
    """What ``sys.getrefcount(held[at])`` says when only the list holds the object."""
    held = [object()]
    at = 0
    return sys.getrefcount(held[at])


_SOLE_HOLDER = _sole_holder_count()

_disposer = Disposer()
_reaper = Reaper()


def discard(clients: list[Any]) -> None:
    """Release clients that a resolver dropped, in the background."""
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
