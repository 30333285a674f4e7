"""ChannelResolver, and the default one: connects once per worker URL and reuses the client.

The policy around the cache: what a URL means, when to connect, what errors say, what
happens after a fork or `close`. Not here: the map itself (`_cache.pyx`), how a client is
built (`_flight.py`).
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, runtime_checkable

from . import _background
from ._backend import ClientCache, fast_hits
from ._checks import check_connector, check_count, check_seconds, checked_cap
from ._errors import (
    ForkedProcessError,
    InvalidWorkerUrlError,
    ResolverError,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)
from ._failures import FailureMemory
from ._flight import Connector, FlightConnector
from ._shared_errors import as_connect_error, closed_error, drop_tracebacks, without_traceback
from ._single_flight import PendingConnect
from ._tls import TLS_SCHEME, generation_for, rotating, was_rotated
from ._urls import mask_url, parse_worker_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

WHATEVER_CLIENT: Final = object()


@runtime_checkable
class ChannelResolver(Protocol):
    """Anything that answers: which client do I use for this worker URL?

    A subclass of `DefaultChannelResolver`, a wrapper around one, a test fake.
    """

    def get_flight_client_for_url(self, url: Any, /) -> Any:
        """The `pyarrow.flight.FlightClient` for `url`, the same one every time."""
        ...


@dataclass(frozen=True, slots=True)
class ResolverStats:
    """Counts since a resolver was made, and how many clients it holds now.

    Each figure is exact; together they are not one atomic snapshot.
    """

    hits: int
    """Lookups answered with a cached client."""
    misses: int
    """Lookups that had to connect."""
    waits: int
    """Lookups that shared another's connect, or a failure remembered by `failure_ttl`."""
    connects: int
    """Connects that gave a client."""
    connect_failures: int
    """Connects that failed."""
    evicted_idle: int
    """Clients dropped because nobody looked them up for `idle_timeout` seconds."""
    evicted_capacity: int
    """Clients dropped because there were more than `max_clients`."""
    invalidated: int
    """Clients dropped by `invalidate`, `clear` or `close`."""
    clients: int
    """Clients held now."""


@fast_hits
class DefaultChannelResolver(ClientCache):
    """Connects to each worker URL once and reuses the client; thread-safe.

    ``connector``
        How a client is built; `FlightConnector()` by default. Its ``connect_timeout``
        (seconds), where it has one, also bounds those who wait for another's connect.
    ``idle_timeout``
        Seconds without a lookup before a client is dropped; None: never. Measured on a
        coarse clock (a few milliseconds).
    ``max_clients``
        At most so many clients, all connections counted; the least recently used goes
        first: exactly up to 512 clients, beyond that the oldest of a sample of 512.
    ``connections_per_url``
        Clients per URL. Threads are spread over them; one thread stays with one.
    ``failure_ttl``
        Seconds for which a failed connect is answered from memory; 0: not at all. Doubles
        with each failure of the URL in a row, up to ``max_failure_ttl``; up to a fifth is
        left out at random, so that callers do not come back in step. The first success
        starts over, and so do `forgive` and `invalidate`. The ``retry_after`` of the error
        tells how long is left; its causes carry no traceback.
    ``max_failure_ttl``
        The longest such time in seconds; None: 32 times ``failure_ttl``. The same as
        ``failure_ttl``: no growth.

    A client that is dropped is never closed: whoever holds it may go on using it, and
    when the last holder lets go it is released on a background thread.

    Raises ValueError or TypeError for options that make no sense.
    """

    __slots__ = ("_closed_by_caller", "_failures", "_watched", "connections_per_url", "connector",
                 "failure_ttl", "idle_timeout", "max_clients", "max_failure_ttl")  # fmt: skip

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
        self.connector: Connector = FlightConnector() if connector is None else connector
        check_connector(self.connector)
        self.idle_timeout = idle_timeout
        self.max_clients = max_clients
        self.connections_per_url = connections_per_url
        self.failure_ttl = failure_ttl
        self.max_failure_ttl = max_failure_ttl
        self._failures = FailureMemory(failure_ttl, max_failure_ttl, capacity=max_clients)
        self._closed_by_caller = False
        self._watched = False
        super().__init__(
            idle_timeout=idle_timeout, max_clients=max_clients, lanes=connections_per_url
        )

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Nobody closed it. Its clients end on the disposer's thread all the same, not here.
        # An interpreter that ends has no such thread, and its modules may be empty: only
        # arguments are sure to be left.
        if not is_finalizing() and not self._is_inherited():
            self._clear()

    # -- looking up ----------------------------------------------------------------------

    def _miss(self, url: Any) -> Any:
        """What `get_flight_client_for_url` does when the cache does not know `url`."""
        self._check_usable()
        key = parse_worker_url(url).key
        if type(url) is str and key == url:
            key = url  # the caller's own object: its next hit is a comparison of pointers
        lane = self._lane()
        client = self._resolve(key, lane)
        if key is not url and type(url) is str:
            self._alias(url, key, lane, client)
        return client

    def _resolve(self, key: str, lane: int) -> Any:
        timeout: float | None = getattr(self.connector, "connect_timeout", None)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        is_first = True
        while True:
            mine = PendingConnect()
            try:
                client, pending = self._begin(key, lane, mine)
                if pending is None:
                    return client
                if pending is mine:
                    if is_first or timeout is None:
                        return self._connect(key, lane, mine)
                    # Part of this caller's time is spent; a connect may take all of it.
                    self._connect_elsewhere(key, lane, mine)
            except BaseException:
                # An interrupt may come between any two steps; nobody must go on waiting.
                if not mine.ended:
                    self._fail(key, lane, mine, 0.0, False)
                    mine.abandon()
                mine = pending = None  # type: ignore[assignment]  # see _connect
                raise
            if pending.connecting_thread == threading.get_ident():
                raise WorkerConnectError(
                    f"The connector asked its own resolver for worker {key} while connecting "
                    "to it; use another resolver, or none, inside connect()",
                    url=key,
                )
            left = deadline - time.monotonic()
            if not pending.wait(None if left == math.inf else left):
                # Whoever connects overstays its deadline, or was interrupted twice: the
                # next lookup must not wait for it too.
                self._fail(key, lane, pending, 0.0, False)
                raise WorkerConnectTimeoutError(
                    f"Worker {key} did not answer within {timeout:g} s, waited for on another "
                    "thread; check that it is up, or raise connect_timeout",
                    url=key,
                )
            self._raise_shared(pending)
            if pending.client is not None:
                return pending.client
            # The thread that connected was interrupted: one of the waiters takes over.
            is_first = False
            self._check_usable()

    def _connect(self, key: str, lane: int, pending: PendingConnect) -> Any:
        self._watch()
        client, error, is_fresh = None, self._remembered(key, pending), False
        generation = 0
        if error is None:
            is_fresh = True
            began = self._failures.now()
            pending.connecting_thread = threading.get_ident()
            try:
                generation = generation_for(self.connector, key)
                client, error = self._try_to_connect(key)
            finally:
                pending.connecting_thread = None
            if (
                error is not None
                and self.failure_ttl
                and not was_rotated(self.connector, key, generation)
            ):
                self._remember(key, pending, error, began)
        if error is not None:
            # With several lanes only the memory remembers: one's success ends it for all.
            ttl = self._seconds_left(pending) if self.connections_per_url == 1 else 0.0
            self._fail(key, lane, pending, ttl, is_fresh)
            pending.fail(error)
            try:
                raise error
            finally:
                del error, pending  # or these, the traceback and this frame form a cycle
        if not self._publish(key, lane, pending, client):
            self._discard([client])  # detached meanwhile: not cached, but released there
            if self._closed_by_caller:
                del client  # or the error's traceback would hold it
                raise closed_error()
        elif was_rotated(self.connector, key, generation):
            self._drop(key, client)  # made with what was rotated out meanwhile
        self._failures.reached(key)
        pending.succeed(client)
        return client

    def _raise_shared(self, pending: PendingConnect) -> None:
        error = pending.error
        if error is not None:
            self._set_retry_after(error, pending)
            try:
                raise error
            finally:
                del error  # see _connect

    def _remembered(self, key: str, pending: PendingConnect) -> BaseException | None:
        """The failure that answers for `key` instead of a connect, as a new exception."""
        failure = self._failures.current(key)
        if failure is None:
            return None
        self._count_as_wait()
        pending.retry_at = failure.until
        error = without_traceback(failure.error)
        self._set_retry_after(error, pending)
        return error

    def _remember(
        self, key: str, pending: PendingConnect, error: ResolverError, began: float
    ) -> None:
        drop_tracebacks(error)
        failure = self._failures.failed(key, without_traceback(error), began)
        pending.retry_at = None if failure is None else failure.until
        self._set_retry_after(error, pending)

    def _seconds_left(self, pending: PendingConnect) -> float:
        """For how much longer a failed connect is remembered."""
        return 0.0 if pending.retry_at is None else max(pending.retry_at - self._failures.now(), 0)

    def _set_retry_after(self, error: BaseException, pending: PendingConnect) -> None:
        if isinstance(error, WorkerConnectError):
            error.retry_after = None if pending.retry_at is None else self._seconds_left(pending)

    def _connect_elsewhere(self, key: str, lane: int, pending: PendingConnect) -> None:
        """Connect on a thread of its own, whose outcome reaches those who wait."""

        def connect() -> None:
            try:
                self._connect(key, lane, pending)
            except ResolverError:
                pass  # the waiters raise it
            finally:
                if not pending.ended:
                    self._fail(key, lane, pending, 0.0, False)
                    pending.abandon()

        threading.Thread(target=connect, name="resolver-connect", daemon=True).start()

    def _try_to_connect(self, key: str) -> tuple[Any, ResolverError | None]:
        try:
            client = self.connector.connect(key)
        except Exception as cause:  # noqa: BLE001 -- becomes the cause of what is raised
            return None, as_connect_error(key, cause)
        if client is None:
            return None, as_connect_error(key, TypeError("connect() returned None"))
        return client, None

    def prefetch(self, urls: Iterable[Any], *, parallelism: int = 64) -> dict[str, ResolverError]:
        """Connect to many workers at once; returns what failed, by URL as it was given.

        What was given as an object goes by its canonical URL, or where it has none, by
        its repr with secrets masked.

        At most `parallelism` connects run at a time, so this takes up to
        ``ceil(urls * connections_per_url / parallelism)`` times the connect deadline.
        A URL that is not one of a worker is among the failures; nothing is raised
        half-way. Raises TypeError when given one URL instead of several.
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

        def connect(key: str, lane: int) -> None:
            try:
                self._resolve(key, lane)
            except ResolverError as error:
                failures.update(dict.fromkeys(spellings[key], error.with_traceback(None)))

        jobs = [(key, lane) for key in spellings for lane in range(self.connections_per_url)]
        if jobs:
            with ThreadPoolExecutor(min(parallelism, len(jobs)), "resolver-prefetch") as pool:
                for _ in pool.map(connect, *zip(*jobs, strict=True)):
                    pass
        return failures

    # -- dropping ------------------------------------------------------------------------

    def invalidate(self, url: Any, client: Any = WHATEVER_CLIENT) -> bool:
        """Forget the client for `url`, so that the next lookup connects anew.

        Pass the `client` that failed: then the entry goes only if that very client is
        still the one cached, and a late failure cannot evict its replacement. None is
        nobody's client and evicts nothing. Without `client`, a connect under way is
        detached too: those who wait get its client, later lookups do not; and a
        remembered failure is forgotten. True when a client or a connect was dropped.
        Nothing is closed. Thread-safe.
        """
        self._check_usable()
        key = parse_worker_url(url).key
        if client is WHATEVER_CLIENT:
            if self.failure_ttl:
                self._failures.forget(key)
            return self._drop(key)
        return client is not None and self._drop(key, client)

    def forgive(self, url: Any) -> bool:
        """Forget that `url` could not be reached, so that the next lookup tries again.

        For whoever learns that a worker is back before its ``failure_ttl`` has passed: a
        health probe, a notice of the scheduler. Its next failure is a first one again. A
        URL that did not fail keeps its clients, so it may be called on every good probe.
        True when a failure was remembered. Thread-safe.
        """
        self._check_usable()
        key = parse_worker_url(url).key
        failure = self._failures.forget(key) if self.failure_ttl else None
        if failure is None:
            return False
        # Of the only lane the map holds the failure too, until it is time to try again.
        if (
            self.connections_per_url == 1
            and self._failures.now() < failure.until
            and not self._holds(key)
        ):
            self._drop(key)
        return True

    def clear(self) -> None:
        """Forget every client and every failure. Nothing is closed. Thread-safe, URL by URL."""
        self._check_usable()
        self._failures.clear()
        self._clear()

    def close(self) -> None:
        """Forget every client and refuse further use; idempotent.

        Clients that callers hold stay usable. A connect under way finishes, its client
        is disposed of, and its callers get `ResolverClosedError`, as do later ones.
        """
        self._closed_by_caller = True
        if self._is_inherited():
            return  # the parent's clients are not ours to release
        self._failures.clear()
        for pending in self._shut():
            pending.fail(closed_error())

    def __enter__(self) -> Self:
        self._check_usable()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # -- looking at it -------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed_by_caller

    def stats(self) -> ResolverStats:
        """What this resolver did so far. Also after `close`."""
        self._check_process()
        return ResolverStats(*self._counters())

    def urls(self) -> list[str]:
        """The canonical URLs that have a client, sorted. A snapshot, not atomic.

        A client that was idle too long is among them until the reaper comes by.
        """
        self._check_process()
        return sorted(self._keys())

    def __len__(self) -> int:
        """How many URLs have a client, as in `urls`. A snapshot, not atomic."""
        self._check_process()
        return len(self._keys())

    def __bool__(self) -> bool:
        return True  # an empty resolver is still a resolver

    def __contains__(self, url: object) -> bool:
        """Whether `url`, in any spelling, has a client. Counts as no lookup."""
        self._check_process()
        try:
            return self._holds(parse_worker_url(url).key)
        except InvalidWorkerUrlError:
            return False

    def __repr__(self) -> str:
        if self._is_inherited():
            state = "inherited through a fork"
        elif self._closed_by_caller:
            state = "closed"
        else:
            state = f"{self._counters()[-1]} clients"
        return f"<{type(self).__name__} {self.connector!r}, {state}>"

    # -- inside --------------------------------------------------------------------------

    def _discard(self, clients: list[Any]) -> None:
        _background.discard(clients)

    def _expire(self, stripe_index: int) -> int:
        if stripe_index == 0:
            self._failures.prune()
        return super()._expire(stripe_index)

    def _advance_clock(self, seconds: float) -> None:
        """Move the clock, for tests."""
        self._failures.advance_clock(seconds)
        super()._advance_clock(seconds)

    def _watch(self) -> None:
        """Have others look after this resolver; not before it may hold anything."""
        if self._watched:
            return
        self._watched = True
        timeouts = [t for t in (self.idle_timeout, self.failure_ttl) if t]
        if timeouts:
            _background.watch(self, min(timeouts))
        tls = rotating(self.connector)
        if tls is not None:
            tls.subscribe(self)

    def _credentials_changed(self) -> None:
        """Connect anew where the credentials of before were used; called by a `TlsConfig`."""
        if self._is_inherited():
            return
        for key in {*self._failures.keys(), *self._keys()}:
            if key.startswith(TLS_SCHEME):
                if self.failure_ttl:
                    self._failures.forget(key)
                self._drop(key)

    def _check_usable(self) -> None:
        self._check_process()
        if self._closed_by_caller:
            raise closed_error()

    def _check_process(self) -> None:
        if self._is_inherited():
            if not self._adopt():
                raise ForkedProcessError(
                    f"This resolver made connections before the process forked (this is "
                    f"process {os.getpid()}), and gRPC does not survive a fork: start the "
                    "process with the 'spawn' or 'forkserver' method of multiprocessing, or "
                    "make the first lookup after the fork"
                )
            self._watched = False


_default: DefaultChannelResolver | None = None
_default_lock = threading.Lock()  # no call under it: a finalizer might come back here


def default_channel_resolver() -> DefaultChannelResolver:
    """The process-wide resolver that sessions and workers use when they are given none.

    The same one on every call; a new one after somebody closed it. It belongs to
    everybody, so do not close it, also not by ``with``. Thread-safe.
    """
    global _default  # noqa: PLW0603
    while True:
        seen = _default
        if seen is not None and not seen.closed:
            return seen
        fresh = DefaultChannelResolver()
        with _default_lock:
            if _default is seen:
                _default = fresh


def _renew_default_lock() -> None:
    global _default_lock  # noqa: PLW0603 -- a thread that is not here may have held it
    _default_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_default_lock)
