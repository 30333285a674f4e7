"""asyncio for tests: a connector without a network, a loop with a deadline, both implementations."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tests.support.implementations import load
from tests.support.threads import DEADLINE

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, deadline: float = DEADLINE) -> T:
    """What `main` returns, on an event loop of its own; TimeoutError after `deadline` seconds."""
    return asyncio.run(asyncio.wait_for(main, deadline))


async def until(condition: Callable[[], object], *, deadline: float = DEADLINE) -> None:
    """Return once `condition()` is true; TimeoutError after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not true within {deadline:g} s: {condition}")
        await asyncio.sleep(0.001)


async def started(work: Callable[[], Coroutine[Any, Any, T]], count: int) -> list[asyncio.Task[T]]:
    """`count` tasks that each run until `work()` first waits for something."""
    tasks = [asyncio.create_task(work()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


class AioClient:
    """A client: it knows its loop, as one of grpc.aio does, and records where it ended."""

    def __init__(self, url: str, ended: list[tuple[str, int]]) -> None:
        self.url = url
        self.loop = asyncio.get_running_loop()
        self._ended = ended

    def __del__(self, this_thread: Callable[[], int] = threading.get_ident) -> None:
        self._ended.append((self.url, this_thread()))


class AioConnector:
    """An asyncio Connector that records what it is asked and does what a test tells it.

    Set ``blocked`` to hold back connects until `release`, ``error`` to fail ``failures``
    of them (None: all).
    """

    def __init__(self, *, connect_timeout: float | None = 20.0) -> None:
        self.connect_timeout = connect_timeout
        self.blocked = False
        self.error: BaseException | None = None
        self.failures: int | None = None
        self.cancelled = 0
        self.urls: Counter[str] = Counter()
        self.ended: list[tuple[str, int]] = []
        self._held: list[asyncio.Future[None]] = []

    async def connect(self, url: str) -> AioClient:
        self.urls[url] += 1
        if self.blocked:
            held = asyncio.get_running_loop().create_future()
            self._held.append(held)
            try:
                await held
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        else:
            await asyncio.sleep(0)
        if self.error is not None and self.failures != 0:
            if self.failures is not None:
                self.failures -= 1
            raise self.error
        return AioClient(url, self.ended)

    @property
    def calls(self) -> int:
        """How many times `connect` was called."""
        return self.urls.total()

    @property
    def waiting(self) -> int:
        """How many connects stand at the gate."""
        return sum(not held.done() for held in self._held)

    def release(self) -> None:
        """Let every connect through, those to come included. From any thread."""
        self.blocked = False
        for held in self._held:
            held.get_loop().call_soon_threadsafe(_let_through, held)


def _let_through(held: asyncio.Future[None]) -> None:
    if not held.done():
        held.set_result(None)


def hits_module(name: str) -> types.ModuleType:
    """`resolver.aio._hits` in the implementation `name`."""
    load(name)
    return importlib.import_module(
        {"compiled": "resolver.aio._hits", "python": "resolver.aio._hits_py"}[name]
    )


def aio_resolver_type(name: str) -> type[Any]:
    """resolver.aio.DefaultChannelResolver on the implementation `name`, whichever is live."""
    import resolver.aio
    from resolver import _backend

    if name == _backend.IMPLEMENTATION:
        return resolver.aio.DefaultChannelResolver
    chosen = types.ModuleType("resolver._backend")
    vars(chosen).update(vars(load(name)))
    chosen.IMPLEMENTATION = name  # type: ignore[attr-defined]
    ours = ["_home", "_homes", "_resolver"]
    replaced = ["resolver._backend", *(f"resolver.aio.{each}" for each in ours)]
    before = {each: sys.modules.pop(each) for each in replaced}
    sys.modules["resolver._backend"] = chosen
    try:
        kind: type[Any] = importlib.import_module("resolver.aio._resolver").DefaultChannelResolver
    finally:
        sys.modules.update(before)
    for each in ours:
        setattr(resolver.aio, each, before[f"resolver.aio.{each}"])
    assert issubclass(kind, hits_module(name).LoopRouter)
    return kind
