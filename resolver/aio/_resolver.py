"""ChannelResolver for asyncio, and the default one: connects once per loop and worker URL.

The policy around the caches: when to connect, who waits, what errors say, which clients
belong to which event loop. Not here: the hit (`_hits.pyx`), the map (`_cache.pyx`), how a
client is built (`_connector.py`).
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, runtime_checkable

from resolver import _background
from resolver._checks import check_connector, check_count, check_seconds, checked_cap
from resolver._errors import (
    ForkedProcessError,
    InvalidWorkerUrlError,
    ResolverError,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)
from resolver._failures import FailureMemory
from resolver._resolver import WHATEVER_CLIENT, ResolverStats
from resolver._shared_errors import (
    as_connect_error,
    closed_error,
    drop_tracebacks,
    without_traceback,
)
from resolver._tls import TLS_SCHEME, generation_for, rotating, was_rotated
from resolver._urls import mask_url, parse_worker_url

from ._homes import LoopHomes, fast_hits
from ._pending import PendingConnect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from ._home import LoopHome

_GRACE: Final = 0.25  # seconds that a connector's own error may come after its deadline
_LONGEST_ROUND: Final = 60.0  # seconds after which at the latest a closed loop is noticed


class Connector(Protocol):
    """How an asyncio client is built.

    An attribute ``connect_timeout`` (seconds), if it has one, bounds `connect` and all
    who wait for it.
    """

    async def connect(self, url: str, /) -> Any:
        """A new client for a canonical worker URL, on the running event loop.

        Raises on failure. Cancelled when it takes longer than ``connect_timeout``.
        """
        ...


@runtime_checkable
class ChannelResolver(Protocol):
    """Anything that answers: which client do I use for this worker URL, in asyncio?

    A subclass of `DefaultChannelResolver`, a wrapper around one, a test fake.
    """

    def get_flight_client_for_url(self, url: Any, /) -> Awaitable[Any]:
        """Await this for the client for `url` on the running loop, the same one every time.

        An ``async def`` does as well as a method that returns an awaitable.
        """
        ...


@fast_hits
class DefaultChannelResolver(LoopHomes):
    """Connects to each worker URL once per event loop and reuses the client; thread-safe.

    ``connector``
        How a client is built; `GrpcConnector()` by default. Its ``connect_timeout``
        (seconds), where it has one, bounds the connect and those who wait for it.
    ``idle_timeout``
        Seconds without a lookup before a client is dropped; None: never. Measured on a
        coarse clock (a few milliseconds).
    ``max_clients``
        At most so many clients per event loop, all connections counted; the least
        recently used goes first, exactly so with one connection per URL and up to 512
        clients. With several, each has an equal part of them.
    ``connections_per_url``
        Clients per URL and loop. Tasks are spread over them; one task stays with one.
    ``failure_ttl``
        Seconds for which a failed connect is answered from memory; 0: not at all. Doubles
        with each failure of the URL in a row, up to ``max_failure_ttl``; up to a fifth is
        left out at random. The first success starts over, and so do `forgive` and
        `invalidate`. The ``retry_after`` of the error tells how long is left; its causes
        carry no traceback.
    ``max_failure_ttl``
        The longest such time in seconds; None: 32 times ``failure_ttl``.

    One resolver may serve several event loops, each in a thread of its own or one after
    another: each has clients of its own, which go when it is closed. A client that is
    dropped is never closed: whoever holds it may go on using it. It is let go on its own
    loop's thread.

    Raises ValueError or TypeError for options that make no sense.
    """

    __slots__ = (
        "_closed_by_caller",
        "_failures",
        "_watched",
        "connections_per_url",
        "connector",
        "failure_ttl",
        "idle_timeout",
        "max_clients",
        "max_failure_ttl",
    )  # fmt: skip

    def __init__(
        self,
        connector: Connector | None = None,
        *,
        idle_timeout: float | None = 300.0,
        max_clients: int = 65_536,
        connections_per_url: int = 1,
        failure_ttl: float = 0.0,
        max_failure_ttl: float | None = None,
    ) -> None:
        if idle_timeout is not None:
            check_seconds("idle_timeout", idle_timeout, at_least="more than 0")
        check_seconds("failure_ttl", failure_ttl, at_least="0 or more")
        max_failure_ttl = checked_cap(failure_ttl, max_failure_ttl)
        check_count("max_clients", max_clients, at_most=2**62)
        check_count("connections_per_url", connections_per_url, at_most=1024)
        if max_clients < connections_per_url:
            raise ValueError("max_clients is less than connections_per_url: one URL would not fit")
        if connector is None:
            # Here, since it needs grpc, which nobody else does.
            from ._connector import (  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415
                GrpcConnector,
            )

            connector = GrpcConnector()
        check_connector(connector)
        self.connector = connector
        self.idle_timeout = idle_timeout
        self.max_clients = max_clients
        self.connections_per_url = connections_per_url
        self.failure_ttl = failure_ttl
        self.max_failure_ttl = max_failure_ttl
        self._failures = FailureMemory(failure_ttl, max_failure_ttl, capacity=max_clients)
        self._closed_by_caller = False
        self._watched = False
        super().__init__()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Nobody closed it. See the blocking one about the end of an interpreter.
        if not is_finalizing():
            self._forget_all()

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(f"a {type(self).__name__} holds live connections and cannot be pickled")

    # -- looking up ----------------------------------------------------------------------

    async def _miss(self, url: Any) -> Any:
        """What `get_flight_client_for_url` gives when the caches do not know `url`."""
        self._check_usable()
        key = parse_worker_url(url).key
        if type(url) is str and key == url:
            key = url  # the caller's own object: its next hit is a comparison of pointers
        home = self._home()
        lane = self._lane(self.connections_per_url)
        client = await self._resolve(home, key, lane)
        if key is not url and type(url) is str:
            home.caches[lane]._alias(url, key, 0, client)  # noqa: SLF001 -- see ClientCache
        return client

    async def _resolve(self, home: LoopHome, key: str, lane: int) -> Any:
        if self._closed_by_caller:
            raise closed_error()
        mine = PendingConnect(asyncio.get_running_loop(), self._failures.now)
        client, pending = home.caches[lane]._begin(key, 0, mine)  # noqa: SLF001
        if pending is None:
            return client
        if pending is mine:
            try:
                self._start(home, key, lane, mine)
            except BaseException:
                # Interrupted between two steps; nobody must wait for what never began.
                self._end(home, key, lane, mine, None)
                raise
        elif pending.task is not None and pending.task is asyncio.current_task():
            raise WorkerConnectError(
                f"The connector asked its own resolver for worker {key} while connecting "
                "to it; use another resolver, or none, inside connect()",
                url=key,
            )
        return await pending.wait()

    def _start(self, home: LoopHome, key: str, lane: int, pending: PendingConnect) -> None:
        """Connect in a task of its own, which nobody who waits can cancel."""
        self._watch()
        task = asyncio.get_running_loop().create_task(
            self._connect(home, key, lane, pending), name=f"resolver-connect {key}"
        )
        home.tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(lambda task: self._settle(home, key, lane, pending, task))

    async def _connect(self, home: LoopHome, key: str, lane: int, pending: PendingConnect) -> None:
        pending.task = asyncio.current_task()
        timeout: float | None = getattr(self.connector, "connect_timeout", None)
        bound = client = error = None
        generation = 0
        if timeout is not None:
            bound = asyncio.get_running_loop().call_later(
                timeout + _GRACE, self._give_up, home, key, lane, pending, timeout
            )
        try:
            began = self._failures.now()
            remembered = self._failures.current(key) if self.failure_ttl else None
            if remembered is not None:  # by another lane, or another loop
                error = without_traceback(remembered.error)
                home.caches[lane]._count_as_wait()  # noqa: SLF001
            else:
                if key.startswith(TLS_SCHEME):  # files may be slow, and callables block
                    generation = await asyncio.to_thread(generation_for, self.connector, key)
                client, error = await self._try_to_connect(key)
            if error is not None:
                rotated = was_rotated(self.connector, key, generation)
                self._end(
                    home,
                    key,
                    lane,
                    pending,
                    error,
                    began=began,
                    remember=not rotated,
                    counted=remembered is None,
                )
            elif home.caches[lane]._publish(key, 0, pending, client):  # noqa: SLF001
                if was_rotated(self.connector, key, generation):
                    home.caches[lane]._drop(key, client)  # noqa: SLF001 -- rotated out meanwhile
                self._failures.reached(key)
                pending.succeed(client)
            elif self._closed_by_caller:
                pending.fail(closed_error())
            else:
                pending.succeed(client)  # detached meanwhile: theirs, but not cached
        except BaseException:
            self._end(home, key, lane, pending, None)
            raise
        finally:
            pending.task = None
            if bound is not None:
                bound.cancel()
            # The traceback of the cause leads to this frame; these would lead back to it.
            del pending
            client = error = None

    async def _try_to_connect(self, key: str) -> tuple[Any, ResolverError | None]:
        try:
            connecting: object = self.connector.connect(key)
            if not inspect.isawaitable(connecting):
                raise TypeError("connect() is not async; this resolver takes asyncio connectors")  # noqa: TRY301
            client = await connecting
        except Exception as cause:  # noqa: BLE001 -- becomes the cause of what is raised
            return None, as_connect_error(key, cause)
        if client is None:
            return None, as_connect_error(key, TypeError("connect() returned None"))
        return client, None

    def _give_up(
        self, home: LoopHome, key: str, lane: int, pending: PendingConnect, timeout: float
    ) -> None:
        task = pending.task
        error = WorkerConnectTimeoutError(
            f"Worker {key} did not answer within {timeout:g} s, and the connector did not say "
            "so itself; check that it is up, or raise connect_timeout",
            url=key,
        )
        self._end(home, key, lane, pending, error)
        if task is not None:
            task.cancel()

    def _settle(
        self,
        home: LoopHome,
        key: str,
        lane: int,
        pending: PendingConnect,
        task: asyncio.Task[None],
    ) -> None:
        """After the task: it may have been cancelled before its first step."""
        home.tasks.discard(task)
        self._end(home, key, lane, pending, None)
        if not task.cancelled():
            task.exception()  # an interrupt, which the loop itself raises

    def _end(
        self,
        home: LoopHome,
        key: str,
        lane: int,
        pending: PendingConnect,
        error: BaseException | None,
        *,
        began: float | None = None,
        remember: bool = True,
        counted: bool = True,
    ) -> None:
        """End a connect without a client, unless it has ended; None: by an interrupt."""
        if pending.ended:
            return
        cache = home.caches[lane]
        if error is not None:
            if self.failure_ttl and remember:
                drop_tracebacks(error)
                since = self._failures.now() if began is None else began
                failure = self._failures.failed(key, without_traceback(error), since)
                if failure is not None:
                    pending.retry_at = failure.until
            # With several lanes only the memory remembers: one's success ends it for all.
            ttl = pending.seconds_left if self.connections_per_url == 1 else 0.0
            cache._fail(key, 0, pending, ttl, counted)  # noqa: SLF001
        else:
            # No fault of the worker's: neither counted nor remembered.
            cache._fail(key, 0, pending, 0.0, False)  # noqa: SLF001
            error = WorkerConnectError(
                f"The connect to worker {key} was cancelled or interrupted; look it up again",
                url=key,
            )
        pending.fail(error)

    async def prefetch(
        self, urls: Iterable[Any], *, parallelism: int = 64
    ) -> dict[str, ResolverError]:
        """Connect to many workers at once; returns what failed, by URL as it was given.

        For the running loop. What was given as an object goes by its canonical URL, or
        where it has none, by its repr with secrets masked.

        At most `parallelism` connects run at a time, so this takes up to
        ``ceil(urls * connections_per_url / parallelism)`` times the connect deadline.
        A URL that is not one of a worker is among the failures; nothing is raised
        half-way. Cancelling it starts no more, and leaves those under way to finish.
        Raises TypeError when given one URL instead of several.
        """
        if isinstance(urls, (str, bytes)):
            raise TypeError("prefetch takes several URLs; for one, write prefetch([url])")
        self._check_usable()
        check_count("parallelism", parallelism, at_most=10_000)
        failures: dict[str, ResolverError] = {}
        spellings: dict[str, set[str]] = {}
        for url in urls:
            try:
                key = parse_worker_url(url).key
                spellings.setdefault(key, set()).add(str(url) if isinstance(url, str) else key)
            except InvalidWorkerUrlError as error:
                name = str(url) if isinstance(url, str) else mask_url(repr(url))
                failures[name] = error.with_traceback(None)
        lanes = range(self.connections_per_url)
        jobs = iter([(key, lane) for key in spellings for lane in lanes])
        home = self._home()

        async def connect() -> None:
            for key, lane in jobs:
                try:
                    await self._resolve(home, key, lane)
                except ResolverError as error:
                    failures.update(dict.fromkeys(spellings[key], error.with_traceback(None)))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(parallelism, len(spellings) * len(lanes))):
                group.create_task(connect(), name="resolver-prefetch")
        return failures

    # -- dropping ------------------------------------------------------------------------

    def invalidate(self, url: Any, client: Any = WHATEVER_CLIENT) -> bool:
        """Forget the client for `url`, so that the next lookup connects anew.

        Pass the `client` that failed: then the entry goes only if that very client is
        still the one cached, and a late failure cannot evict its replacement. None is
        nobody's client and evicts nothing. Without `client`, those of every event loop
        go, and a connect under way is detached too: those who wait get its client, later
        lookups do not. True when something was dropped. Nothing is closed. Thread-safe.
        """
        self._check_usable()
        key = parse_worker_url(url).key
        if client is None:
            return False
        only = () if client is WHATEVER_CLIENT else (client,)
        if not only and self.failure_ttl:
            self._failures.forget(key)
        dropped = [cache._drop(key, *only) for cache in self._caches()]  # noqa: SLF001
        return any(dropped)

    def forgive(self, url: Any) -> bool:
        """Forget that `url` could not be reached, so that the next lookup tries again.

        For whoever learns that a worker is back before its ``failure_ttl`` has passed. A
        URL that did not fail keeps its clients. True when a failure was remembered.
        Thread-safe.
        """
        self._check_usable()
        key = parse_worker_url(url).key
        if not self.failure_ttl or self._failures.forget(key) is None:
            return False
        for cache in self._caches():
            if not cache._holds(key):  # noqa: SLF001 -- the map holds the failure too
                cache._drop(key)  # noqa: SLF001
        return True

    def clear(self) -> None:
        """Forget every client and failure of every event loop. Nothing is closed. Thread-safe."""
        self._check_usable()
        self._failures.clear()
        for cache in self._caches():
            cache._clear()  # noqa: SLF001

    def close(self) -> None:
        """Forget every client of every event loop and refuse further use; idempotent.

        Clients that callers hold stay usable. A connect under way finishes, its client
        is let go, and its callers get `ResolverClosedError`, as do later ones. Does not
        wait for any of that, see `aclose`. Thread-safe.
        """
        self._closed_by_caller = True
        if self._is_inherited():
            return  # the parent's clients are not ours to release
        with self._guard:
            homes = list(self._live_homes())
        for home in homes:
            home.shut(closed_error())

    async def aclose(self) -> None:
        """`close`, and wait until the running loop's connects under way have ended.

        When it returns, this loop's clients were let go, those still held elsewhere aside.
        """
        self.close()
        if self._is_inherited():
            return
        home = self._home_of(asyncio.get_running_loop())
        if home is not None:
            connecting = home.tasks - {asyncio.current_task()}
            if connecting:
                await asyncio.wait(connecting)
        await asyncio.sleep(0)  # what was dropped is let go before this returns

    async def __aenter__(self) -> Self:
        self._check_usable()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()

    # -- looking at it -------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed_by_caller

    def stats(self) -> ResolverStats:
        """What this resolver did so far, over all event loops. Also after `close`.

        Clients that went with their loop count as invalidated.
        """
        self._check_process()
        return ResolverStats(*self._counters())

    def urls(self) -> list[str]:
        """The canonical URLs that have a client on any loop, sorted. A snapshot, not atomic.

        A client that was idle too long is among them until the reaper comes by.
        """
        self._check_process()
        return sorted({key for cache in self._caches() for key in cache._keys()})  # noqa: SLF001

    def __len__(self) -> int:
        """How many URLs have a client, as in `urls`. A snapshot, not atomic."""
        return len(self.urls())

    def __bool__(self) -> bool:
        return True  # an empty resolver is still a resolver

    def __contains__(self, url: object) -> bool:
        """Whether `url`, in any spelling, has a client on any loop. Counts as no lookup."""
        self._check_process()
        try:
            key = parse_worker_url(url).key
        except InvalidWorkerUrlError:
            return False
        return any(cache._holds(key) for cache in self._caches())  # noqa: SLF001

    def __repr__(self) -> str:
        if self._is_inherited():
            state = "inherited through a fork"
        elif self._closed_by_caller:
            state = "closed"
        else:
            state = f"{self.stats().clients} clients"
        return f"<{type(self).__name__} {self.connector!r}, {state}>"

    # -- inside --------------------------------------------------------------------------

    def _watch(self) -> None:
        """Have the reaper look after this resolver; not before it may hold anything."""
        if self._watched:
            return
        self._watched = True
        timeouts = [t for t in (self.idle_timeout, self.failure_ttl, _LONGEST_ROUND) if t]
        _background.watch(self, min(timeouts))
        tls = rotating(self.connector)
        if tls is not None:
            tls.subscribe(self)

    def _credentials_changed(self) -> None:
        """Connect anew where the credentials of before were used; called by a `TlsConfig`."""
        if self._is_inherited():
            return
        caches = self._caches()
        for key in {*self._failures.keys(), *(key for cache in caches for key in cache._keys())}:  # noqa: SLF001
            if key.startswith(TLS_SCHEME):
                if self.failure_ttl:
                    self._failures.forget(key)
                for cache in caches:
                    cache._drop(key)  # noqa: SLF001

    def _check_usable(self) -> None:
        self._check_process()
        if self._closed_by_caller:
            raise closed_error()

    def _check_process(self) -> None:
        if self._is_inherited():
            if self._connected:
                raise ForkedProcessError(
                    f"This resolver made connections before the process forked (this is "
                    f"process {os.getpid()}), and gRPC does not survive a fork: start the "
                    "process with the 'spawn' or 'forkserver' method of multiprocessing, or "
                    "make the first lookup after the fork"
                )
            self._start_over()
            self._watched = False
