"""A connector without a network: its clients are plain objects, its faults are chosen."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Final, Self

from resolver._errors import WorkerConnectTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_POLL: Final = 0.001


class FakeClient:
    """What a `FakeConnector` hands out: an object with an identity, open to weak references.

    ``url`` is the canonical URL it was made for and ``serial`` counts the connector's
    clients from 0. Its end is counted, on whichever thread lets go of it last.
    """

    __slots__ = ("__weakref__", "_ended", "_on_dispose", "serial", "url")

    def __init__(
        self,
        url: str,
        serial: int,
        ended: deque[tuple[str, int]],
        on_dispose: Callable[[FakeClient], None] | None,
    ) -> None:
        self.url = url
        self.serial = serial
        self._ended = ended
        self._on_dispose = on_dispose

    def __repr__(self) -> str:
        return f"FakeClient({self.url!r}, serial={self.serial})"

    def __del__(self, this_thread: Callable[[], int] = threading.get_ident) -> None:
        # A lock here could be taken while this very thread holds it; an append cannot. At
        # the end of the interpreter, modules are empty and only arguments are left.
        self._ended.append((self.url, this_thread()))
        if self._on_dispose is not None:
            self._on_dispose(self)


class Gate:
    """Holds back the connects of a URL until `release`; also a context manager.

    Made by `FakeConnector.block`. Thread-safe.
    """

    def __init__(self) -> None:
        self._entered = 0
        self._changed = threading.Condition()
        self._open = False

    def wait_entered(self, count: int = 1, timeout: float = 10.0) -> None:
        """Return once `count` connects stand at the gate or passed it.

        Raises TimeoutError after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._entered >= count, timeout):
                raise TimeoutError(f"{self._entered} of {count} connects came within {timeout:g} s")

    def release(self) -> None:
        """Let every connect through, those to come included."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def wait_open(self, timeout: float) -> bool:
        """Stand at the gate for up to `timeout` seconds; whether it opened."""
        with self._changed:
            self._entered += 1
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._open, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class FakeConnector:
    """A `Connector` that records what it is asked and does what a test tells it. Thread-safe.

    ``connect_timeout`` (seconds) bounds a blocked connect as a real connector's deadline
    would, with `WorkerConnectTimeoutError`. ``on_dispose`` is called with each client
    as it ends; it may use the resolver, as a finalizer might.

    The faults of a URL apply in this order: `block`, `delay`, `fail`. URLs are given in
    canonical form, the one a resolver passes; None stands for every URL that has no
    setting of its own.
    """

    def __init__(
        self,
        *,
        connect_timeout: float = 5.0,
        on_dispose: Callable[[FakeClient], None] | None = None,
    ) -> None:
        self.connect_timeout = connect_timeout
        self._on_dispose = on_dispose
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._in_flight: Counter[str] = Counter()
        self._most_in_flight: Counter[str] = Counter()
        self._gates: dict[str | None, Gate] = {}
        self._delays: dict[str | None, float] = {}
        self._failures: dict[str | None, tuple[BaseException, int | None]] = {}
        self._created = 0
        self._ended: deque[tuple[str, int]] = deque()

    def connect(self, url: str) -> FakeClient:
        """Return a new `FakeClient`, after what was programmed for `url`."""
        with self._lock:
            self._calls[url] += 1
            self._in_flight[url] += 1
            self._most_in_flight[url] = max(self._most_in_flight[url], self._in_flight[url])
            gate = self._gates.get(url, self._gates.get(None))
            delay = self._delays.get(url, self._delays.get(None, 0.0))
        try:
            if gate is not None and not gate.wait_open(self.connect_timeout):
                raise WorkerConnectTimeoutError(
                    f"Worker {url} is blocked and did not answer within "
                    f"{self.connect_timeout:g} s; release its gate",
                    url=url,
                )
            if delay:
                time.sleep(delay)
            self._raise_programmed(url)
            with self._lock:
                serial = self._created
                self._created += 1
            return FakeClient(url, serial, self._ended, self._on_dispose)
        finally:
            with self._lock:
                self._in_flight[url] -= 1

    def block(self, url: str | None = None) -> Gate:
        """Hold back connects to `url` until the returned gate is released."""
        gate = Gate()
        with self._lock:
            self._gates[url] = gate
        return gate

    def delay(self, seconds: float, url: str | None = None) -> None:
        """Make connects to `url` take `seconds` longer; 0 ends that."""
        with self._lock:
            self._delays[url] = seconds

    def fail(
        self, error: BaseException | None, url: str | None = None, *, times: int | None = None
    ) -> None:
        """Make the next `times` connects to `url` raise `error`, all of them for None.

        With None as the error, connects succeed again.
        """
        with self._lock:
            if error is None:
                self._failures.pop(url, None)
            else:
                self._failures[url] = (error, times)

    def calls(self, url: str | None = None) -> int:
        """How many times `connect` was called, for `url` or in all."""
        with self._lock:
            return self._calls.total() if url is None else self._calls[url]

    def most_in_flight(self, url: str) -> int:
        """How many connects to `url` were under way at once, at most."""
        with self._lock:
            return self._most_in_flight[url]

    @property
    def created(self) -> int:
        """Clients handed out so far."""
        with self._lock:
            return self._created

    @property
    def disposed(self) -> int:
        """Clients that nobody holds any more."""
        return len(self._ended)

    @property
    def live(self) -> int:
        """Clients that somebody holds. A snapshot."""
        return self.created - self.disposed

    @property
    def disposal_threads(self) -> set[int]:
        """Identifiers of the threads on which clients ended."""
        return {thread for _, thread in tuple(self._ended)}

    def wait_disposed(self, count: int, timeout: float = 10.0) -> None:
        """Return once at least `count` clients ended; TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.disposed < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.disposed} of {count} clients ended in {timeout:g} s")
            time.sleep(_POLL)

    def _raise_programmed(self, url: str) -> None:
        with self._lock:
            key = url if url in self._failures else None
            error, left = self._failures.get(key, (None, None))
            if error is None:
                return
            if left is not None:
                if left <= 1:
                    del self._failures[key]
                else:
                    self._failures[key] = (error, left - 1)
        raise error
