"""The contract of `_hits.pyx` in plain Python: its executable specification, and what runs
where the extension was not built. Slower, and equal in everything else: the same tests run
against both. Must not connect, wait, touch an event loop or decide policy.
"""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from weakref import ref

from resolver._cache_py import ClientCache

if TYPE_CHECKING:
    from collections.abc import Coroutine

_T = TypeVar("_T")

Routes = tuple[tuple["ref[Any]", tuple["ref[Any]", ...]], ...]
"""Each a weak reference to a loop, and one per lane to the loop's caches."""


class Found:
    """A client that was found, to be awaited once; the first step returns it.

    Keeps the protocol of a coroutine, so `asyncio.create_task`, `gather` and `wait_for`
    take it too. It may be left alone without a warning.
    """

    __slots__ = ("_client",)

    def __init__(self, client: Any) -> None:
        self._client = client

    def __await__(self) -> Found:
        return self

    def __iter__(self) -> Found:
        return self

    def __next__(self) -> NoReturn:
        raise StopIteration(self._take())

    def send(self, _value: object) -> NoReturn:
        """Ends, with the client."""
        raise StopIteration(self._take())

    def throw(self, kind: Any, value: Any = None, _traceback: Any = None) -> NoReturn:
        """Raises what it is given, at the place of the client."""
        self._client = None
        if isinstance(kind, BaseException):
            raise kind
        raise kind if value is None else value

    def close(self) -> None:
        """Lets go of the client."""
        self._client = None

    def _take(self) -> Any:
        client, self._client = self._client, None
        if client is None:
            raise RuntimeError("this look-up was awaited already; look the URL up again")
        return client


class LoopRouter:
    """Worker URL -> awaitable of the running loop's client, thread-safe.

    A base class: it calls ``_miss(url)`` for what it does not find and returns what that
    returns. The caches of `_routes` return None for what they do not hold.
    """

    __slots__ = ("__weakref__", "_current_routes")

    _current_routes: Routes

    def __new__(cls, *_args: object, **_options: object) -> LoopRouter:  # noqa: PYI034
        self = super().__new__(cls)
        self._current_routes = ()
        return self

    def get_flight_client_for_url(self, url: Any, /) -> Coroutine[Any, Any, Any]:
        """Await this for the client of a worker URL: the cached one, or one connected now.

        A hit is an awaitable that ends at once, without a coroutine and without the event
        loop; it gives the same object every time. A miss connects once however many tasks
        ask; they share its client or its error. Cancelling one of them leaves the connect
        to the others. Each event loop has clients of its own. Awaiting raises
        InvalidWorkerUrlError, WorkerConnectError, WorkerConnectTimeoutError,
        ResolverClosedError or ForkedProcessError.
        """
        if type(url) is str and self._current_routes:
            running = _get_running_loop()
            for loop, caches in self._current_routes:
                if running is not None and loop() is running:
                    cache = caches[self._lane(len(caches))]()
                    client = None if cache is None else cache.get_flight_client_for_url(url)
                    if client is not None:
                        return Found(client)
        return self._miss(url)

    def _miss(self, url: Any) -> Coroutine[Any, Any, Any]:
        raise KeyError(url)

    def _lane(self, lanes: int) -> int:
        """The lane of the running task, below `lanes`; a task keeps its lane."""
        if lanes == 1:
            return 0
        # Addresses lie at regular distances; the product's upper bits do not.
        mixed = (id(asyncio.current_task()) >> 4) * 0x9E3779B97F4A7C15 % 2**64
        return (mixed >> 33) % lanes

    @property
    def _routes(self) -> Routes:
        """Tuple of ``(reference to a loop, tuple of references to its caches)``."""
        return self._current_routes

    @_routes.setter
    def _routes(self, routes: Routes) -> None:
        for route in routes:
            loop, caches = route
            if type(route) is not tuple or type(loop) is not ref:
                raise TypeError("a route is (weakref.ref, (weakref.ref, ...))")
            if type(caches) is not tuple or not caches:
                raise TypeError("a route is (weakref.ref, (weakref.ref, ...))")
            for cache in caches:
                if type(cache) is not ref or not isinstance(cache(), (ClientCache, type(None))):
                    raise TypeError("a route leads to weak references to caches")
        self._current_routes = routes


def fast_hits(cls: type[_T]) -> type[_T]:
    """Nothing to do here; see `_hits.fast_hits`."""
    return cls
