"""The contract of `_cache.pyx` in plain Python: its executable specification, and what
runs where the extension was not built. Slower, and equal in everything else: the same
tests run against both. Must not connect, close, log, parse a URL or decide policy.

One re-entrant lock guards everything. Re-entrant, because Python may collect garbage
between any two calls, and a finalizer that runs then may use this very cache on this
very thread. So each check-then-act here is written without a call in between: nothing
can happen inside it. What is displaced is handed to ``_discard`` after the lock.
"""

from __future__ import annotations

import enum
import itertools
import os
import threading
import time
import weakref
from typing import Any, TypeVar

_T = TypeVar("_T")

_MAX_ALIASES = 4  # spellings per URL that hit without a parse, beside the canonical one

_thread = threading.local()
_thread_numbers = itertools.count()


class _State(enum.Enum):
    CONNECTING = enum.auto()
    LIVE = enum.auto()
    FAILED = enum.auto()
    DEAD = enum.auto()


class _Entry:
    """One URL on one lane: its client, its connect under way, or its remembered failure."""

    __slots__ = ("aliases", "client", "key", "lane", "pending", "state", "used")

    client: Any
    pending: object | None
    state: _State

    def __init__(self, key: str, lane: int, pending: object) -> None:
        self.key = key
        self.lane = lane
        self.pending = pending
        self.client = None
        self.state = _State.CONNECTING
        self.used = 0.0  # last lookup; of a failed entry: remembered until
        self.aliases: list[str] = []


class ClientCache:
    """Worker URL -> client, one per URL and lane, thread-safe. See the module docstring.

    A base class: it calls ``_miss(url)`` for what it does not hold and ``_discard(list)``
    with clients that it no longer holds, outside its lock. Times are in seconds.
    """

    __slots__ = (
        "__weakref__",
        "_clients",
        "_closed",
        "_connect_failures",
        "_connects",
        "_evicted_capacity",
        "_evicted_idle",
        "_hits",
        "_idle_timeout",
        "_invalidated",
        "_lanes",
        "_lock",
        "_max_clients",
        "_misses",
        "_process",
        "_retained",
        "_skew",
        "_tables",
        "_waits",
    )

    _clients: int  # live entries
    _closed: bool
    _connect_failures: int
    _connects: int
    _evicted_capacity: int
    _evicted_idle: int
    _hits: int
    _idle_timeout: float
    _invalidated: int
    _lanes: int
    _lock: threading.RLock
    _max_clients: float
    _misses: int
    _process: int
    _retained: int  # live and failed entries: what max_clients bounds
    _skew: float  # how far tests have moved this cache's clock
    _tables: list[dict[str, _Entry]]  # one per lane
    _waits: int

    def __new__(cls, *_args: object, **_options: object) -> ClientCache:  # noqa: PYI034
        self = super().__new__(cls)
        self._process = os.getpid()
        self._closed = False
        self._idle_timeout = float("inf")
        self._max_clients = float("inf")
        self._skew = 0.0
        self._hits = self._misses = self._waits = self._connects = 0
        self._connect_failures = self._evicted_idle = self._evicted_capacity = 0
        self._invalidated = self._clients = self._retained = 0
        self._allocate(1)
        _caches[id(self)] = self
        return self

    def __init__(
        self,
        *,
        idle_timeout: float | None = None,
        max_clients: int | None = None,
        lanes: int = 1,
    ) -> None:
        if self._misses:
            raise RuntimeError("a cache in use cannot be initialised again")
        self._idle_timeout = float("inf") if idle_timeout is None else idle_timeout
        self._max_clients = float("inf") if max_clients is None else max_clients
        self._allocate(lanes)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(f"a {type(self).__name__} holds live connections and cannot be pickled")

    def get_flight_client_for_url(self, url: Any, /) -> Any:
        """The client for a worker URL: the cached one, or one connected now.

        A hit returns the same object every time. A miss connects once however many
        threads ask; they share its client or its error. Thread-safe. Raises
        InvalidWorkerUrlError, WorkerConnectError, WorkerConnectTimeoutError,
        ResolverClosedError or ForkedProcessError.
        """
        if type(url) is str and not self._is_inherited():
            now = self._now()
            with self._lock:
                entry = self._tables[self._lane()].get(url)
                if entry is not None and self._is_usable(entry, now):
                    entry.used = now
                    self._hits += 1
                    return entry.client
        return self._miss(url)

    # -- what a subclass provides ------------------------------------------------------

    def _miss(self, url: Any) -> Any:
        raise KeyError(url)

    def _discard(self, clients: list[Any]) -> None:
        """Dropped clients, the only references this cache had; outside any lock."""

    # -- single flight -----------------------------------------------------------------

    def _begin(self, key: str, lane: int, pending: object) -> tuple[Any, Any]:
        """(client, None) on a hit; else (None, the connect to wait for).

        That is `pending` itself for exactly one caller, who must then connect and call
        `_publish` or `_fail`.
        """
        fresh = _Entry(_exact(key), lane, pending)
        gone: list[_Entry] = []
        table = self._tables[lane]
        now = self._now()
        with self._lock:
            while True:
                entry = table.setdefault(key, fresh)
                if entry is fresh:
                    self._misses += 1
                    found = None, pending
                    break
                if self._is_usable(entry, now):
                    entry.used = now
                    self._hits += 1
                    found = entry.client, None
                    break
                shared = entry.pending
                if entry.state is _State.CONNECTING or (
                    entry.state is _State.FAILED and now < entry.used
                ):
                    self._waits += 1
                    found = None, shared
                    break
                if entry.state is _State.LIVE:
                    self._evicted_idle += 1
                self._unlink_locked(entry, gone)
        self._release(gone)
        return found

    def _publish(self, key: str, lane: int, pending: object, client: Any) -> bool:
        """Makes `client` the one for `key`, if `pending` is still its connect.

        False when it was invalidated or the cache closed meanwhile. May evict.
        """
        key = _exact(key)
        gone: list[_Entry] = []
        stored = False
        now = self._now()
        with self._lock:
            self._connects += 1
            entry = self._tables[lane].get(key)
            if entry is not None and entry.state is _State.CONNECTING and entry.pending is pending:
                if self._closed:
                    self._unlink_locked(entry, gone)
                else:
                    entry.client = client
                    entry.pending = None
                    entry.state = _State.LIVE
                    entry.used = now
                    self._clients += 1
                    self._retained += 1
                    stored = True
        self._release(gone)
        if stored:
            self._make_room(key, lane)
        return stored

    def _fail(self, key: str, lane: int, pending: object, ttl: float, counted: bool = True) -> None:
        """Ends the connect `pending` without a client; remembered for `ttl` seconds."""
        key = _exact(key)
        gone: list[_Entry] = []
        kept = False
        until = self._now() + ttl
        with self._lock:
            self._connect_failures += counted
            entry = self._tables[lane].get(key)
            if entry is not None and entry.state is _State.CONNECTING and entry.pending is pending:
                if ttl > 0 and not self._closed:
                    entry.state = _State.FAILED
                    entry.used = until
                    self._retained += 1
                    kept = True
                else:
                    self._unlink_locked(entry, gone)
        self._release(gone)
        if kept:
            self._make_room(key, lane)

    def _count_as_wait(self) -> None:
        """The connect of a miss was spared: somebody else's failure answers."""
        with self._lock:
            self._waits += 1
            self._misses -= 1

    def _alias(self, spelling: str, key: str, lane: int, client: Any) -> None:
        """Lets `spelling` hit the entry of `key` directly, while that holds `client`."""
        spelling, key = _exact(spelling), _exact(key)
        table = self._tables[lane]
        with self._lock:
            entry = table.get(key)
            if (
                entry is not None
                and entry.state is _State.LIVE
                and entry.client is client
                and len(entry.aliases) < _MAX_ALIASES
                and spelling not in entry.aliases
            ):
                entry.aliases.append(spelling)
                table[spelling] = entry
                if table.get(key) is not entry:  # a finalizer removed it meanwhile
                    self._forget_locked(table, spelling, entry)

    # -- removal -----------------------------------------------------------------------

    def _drop(self, key: str, client: Any = None) -> bool:
        """Removes `key` on every lane; with `client`, only where that very one is held.

        True when a client or a connect under way was removed.
        """
        key = _exact(key)
        gone: list[_Entry] = []
        dropped = False
        with self._lock:
            for table in self._tables:
                entry = table.get(key)
                if entry is None or not (client is None or entry.client is client):
                    continue
                state = entry.state
                if self._unlink_locked(entry, gone):
                    self._invalidated += state is _State.LIVE
                    dropped |= state is not _State.FAILED
        self._release(gone)
        return dropped

    def _clear(self) -> list[Any]:
        """Removes everything; returns the connects that were under way or remembered."""
        gone: list[_Entry] = []
        with self._lock:
            for table in self._tables:
                for entry in list(table.values()):
                    state = entry.state
                    if self._unlink_locked(entry, gone):
                        self._invalidated += state is _State.LIVE
        pendings = [entry.pending for entry in gone if entry.pending is not None]
        self._release(gone)
        return pendings

    def _shut(self) -> list[Any]:
        """`_clear`, and nothing is stored from now on. Idempotent."""
        self._closed = True
        return self._clear()

    def _expire(self, stripe_index: int) -> int:
        """Removes what is overdue in one stripe; returns how many clients that were."""
        gone: list[_Entry] = []
        clients = 0
        now = self._now()
        with self._lock:
            for entry in list(self._tables[stripe_index].values()):
                state, used = entry.state, entry.used
                overdue = (state is _State.LIVE and now - used > self._idle_timeout) or (
                    state is _State.FAILED and now >= used
                )
                if overdue and self._unlink_locked(entry, gone):
                    clients += state is _State.LIVE
            self._evicted_idle += clients
        self._release(gone)
        return clients

    # -- snapshots ---------------------------------------------------------------------

    def _keys(self) -> list[str]:
        """Canonical URLs that hold a client, unordered."""
        with self._lock:
            entries = [entry for table in self._tables for entry in list(table.values())]
        return list({entry.key for entry in entries if entry.state is _State.LIVE})

    def _holds(self, key: str) -> bool:
        """Whether `key` has a client that has not been idle too long, on any lane."""
        key = _exact(key)
        now = self._now()
        with self._lock:
            entries = [table.get(key) for table in self._tables]
        return any(entry is not None and self._is_usable(entry, now) for entry in entries)

    def _counters(self) -> tuple[int, ...]:
        """The fields of ResolverStats, in order."""
        with self._lock:
            return (
                self._hits,
                self._misses,
                self._waits,
                self._connects,
                self._connect_failures,
                self._evicted_idle,
                self._evicted_capacity,
                self._invalidated,
                self._clients,
            )

    # -- lanes and processes -----------------------------------------------------------

    def _lane(self) -> int:
        """The lane of the calling thread; a thread keeps its lane."""
        if self._lanes == 1:
            return 0
        try:
            number: int = _thread.number
        except AttributeError:
            number = _thread.number = next(_thread_numbers)
        return number % self._lanes

    @property
    def _stripe_count(self) -> int:
        """How many stripes `_expire` takes, over all lanes."""
        return len(self._tables)

    def _is_inherited(self) -> bool:
        """Whether this process got the cache through a fork."""
        return self._process != os.getpid()

    def _adopt(self) -> bool:
        """Makes an inherited cache this process's own; False if it ever connected."""
        if not self._is_inherited():
            return True
        if self._misses:
            return False
        self._allocate(self._lanes)
        self._process = os.getpid()
        return True

    def _advance_clock(self, seconds: float) -> None:
        """Moves this cache's clock, for tests."""
        self._skew += seconds

    def _validate(self) -> None:
        """Checks every invariant; for tests, on a cache that nobody is using."""
        live = retained = 0
        for lane, table in enumerate(self._tables):
            for key, entry in table.items():
                assert type(key) is str
                assert entry.lane == lane
                assert entry.state is not _State.DEAD, "a dead entry has a slot"
                if key == entry.key:
                    live += entry.state is _State.LIVE
                    retained += entry.state is not _State.CONNECTING
                    assert (entry.state is _State.LIVE) == (entry.client is not None)
                    assert (entry.state is _State.LIVE) == (entry.pending is None)
                else:
                    assert entry.state is _State.LIVE, "another spelling of something not live"
                    assert key in entry.aliases
                assert all(table[alias] is entry for alias in entry.aliases)
        assert live == self._clients
        assert retained == self._retained
        assert retained <= self._max_clients, "more entries than max_clients"

    # -- inside ------------------------------------------------------------------------

    def _allocate(self, lanes: int) -> None:
        self._lanes = lanes
        self._tables = [{} for _ in range(lanes)]
        self._lock = threading.RLock()

    def _now(self) -> float:
        return time.monotonic() + self._skew

    def _is_usable(self, entry: _Entry, now: float) -> bool:
        return entry.state is _State.LIVE and now - entry.used <= self._idle_timeout

    def _unlink_locked(self, entry: _Entry, gone: list[_Entry]) -> bool:
        """Takes an entry out of every slot; False if somebody else already is doing so."""
        table = self._tables[entry.lane]
        if entry.state is _State.DEAD:
            # A finalizer interrupted the one who does; the slot must not stay meanwhile.
            self._forget_locked(table, entry.key, entry)
            return False
        was, entry.state = entry.state, _State.DEAD
        self._clients -= was is _State.LIVE
        self._retained -= was is not _State.CONNECTING
        self._forget_locked(table, entry.key, entry)
        for alias in entry.aliases:
            self._forget_locked(table, alias, entry)
        gone.append(entry)
        return True

    @staticmethod
    def _forget_locked(table: dict[str, _Entry], key: str, entry: _Entry) -> None:
        if key in table and table[key] is entry:
            del table[key]

    def _release(self, gone: list[_Entry]) -> None:
        """Hands the clients of unlinked entries to `_discard`."""
        clients = []
        for entry in gone:
            if entry.client is not None:
                clients.append(entry.client)
                entry.client = None  # or a caller's frame would hold it beyond `_discard`
        gone.clear()
        if clients:
            self._discard(clients)

    def _make_room(self, newest: str, lane: int) -> None:
        """Evicts, least recently used first, until max_clients holds again."""
        while self._retained > self._max_clients:
            gone: list[_Entry] = []
            with self._lock:
                if self._retained <= self._max_clients:
                    return  # another thread made the room meanwhile
                candidates = [
                    # A remembered failure goes before any client.
                    (entry.state is not _State.FAILED, entry.used, entry.lane, number, entry)
                    for table in self._tables
                    for number, entry in enumerate(list(table.values()))
                    if entry.state in (_State.LIVE, _State.FAILED)
                    and not (entry.key == newest and entry.lane == lane)
                ]
                if not candidates:
                    return
                oldest = min(candidates)[-1]
                state = oldest.state
                if self._unlink_locked(oldest, gone):
                    self._evicted_capacity += state is _State.LIVE
            self._release(gone)


_caches: weakref.WeakValueDictionary[int, ClientCache] = weakref.WeakValueDictionary()


def _keep_inherited() -> None:
    # In a forked child: to free the parent's clients, collected garbage or not, can hang.
    for cache in list(_caches.values()):
        if cache._misses:  # noqa: SLF001
            leak(cache._tables)  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)


def fast_hits(cls: type[_T]) -> type[_T]:
    """Nothing to do here; see `_cache.fast_hits`."""
    return cls


def leak(thing: object) -> None:
    """Keeps `thing` for ever: what was inherited through a fork must never be freed."""
    import ctypes  # noqa: PLC0415 -- only ever needed in a forked child

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _exact(key: str) -> str:
    """A subclass of str could run its own code in every look-up."""
    if type(key) is not str:
        raise TypeError(f"a key is an exact str, not {type(key).__name__}")
    return key
