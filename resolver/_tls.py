"""TLS credentials that may change while a process runs: read, checked, watched.

A ``TlsConfig`` is told where certificates and keys come from and hands out the newest
ones that work. What it does not do: make connections, or decide which clients have to go
when credentials change (a resolver does, which is told so).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from ._background import Daemon
from ._pem import (
    PAIRS,
    Credentials,
    UnusableCredentialsError,
    check_fit,
    check_pem,
    checked_hostname,
    is_whole,
)

__all__ = [
    "TLS_SCHEME",
    "PemSource",
    "TlsConfig",
    "config_of",
    "generation_for",
    "rotating",
    "was_rotated",
]

PemSource: TypeAlias = bytes | str | os.PathLike[str] | Callable[[], bytes]
"""PEM itself as ``bytes``, the path of a file that holds it, or what returns it."""

TLS_SCHEME: Final = "https:"
"""How the canonical URLs begin whose connections show and check certificates."""
_MIN_INTERVAL: Final = 0.05
_YOUNG_NS: Final = 2_000_000_000  # coarser than the clock of any file system

_T = TypeVar("_T")
_Weak: TypeAlias = "weakref.WeakValueDictionary[int, _T]"

logger = logging.getLogger("resolver")


class Subscriber(Protocol):
    """Whoever holds connections that were made with the credentials of before."""

    def _credentials_changed(self) -> None: ...


class TlsConfig:
    """Where certificates and keys come from. Thread-safe; no secret is in its ``repr``.

    Each source is PEM as ``bytes``, the path of a PEM file (``str`` or ``os.PathLike``), or
    a callable that returns PEM and bounds its own time; `rotate` asks it also while it is
    being asked.

    - ``root_certificates``: the authorities trusted for ``https`` workers; ``None`` means
      those of the system.
    - ``client_certificate``, ``client_key``: shown to workers that ask for them.
    - ``override_hostname``: the name expected in the worker's certificate.
    - ``server_certificate``, ``server_key``: what a worker shows to its callers.
    - ``client_authorities``: a worker with these demands a certificate signed by one of
      them of every caller.
    - ``check_interval``: seconds between two looks at the files, and between two questions
      to the callables. Files are looked at before every connect besides; and until there
      are credentials that work, the callables are asked at every connect.

    When a file has changed, a callable returns something else, or somebody calls `rotate`,
    connects use the new credentials. A resolver whose connector holds this object then
    forgets its ``https`` clients: calls under way on them run to their end, then their
    connections are closed. Credentials that cannot be read or do not fit together, such as a
    certificate whose key is not written yet, change nothing: what worked goes on being used,
    and a line in the log says so.

    Equal to another with the same sources; can be pickled when they can. Raises ``TypeError``
    or ``ValueError`` for sources that cannot be any; reading is left to the first connect.
    """

    __slots__ = (
        "__weakref__",
        "_asked_at",
        "_current",
        "_failure",
        "_generation",
        "_lock",
        "_rotated",
        "_rotations",
        "_seen",
        "_sources",
        "_state",
        "_subscribers",
        "_tried",
        "check_interval",
        "override_hostname",
    )

    def __init__(
        self,
        *,
        root_certificates: PemSource | None = None,
        client_certificate: PemSource | None = None,
        client_key: PemSource | None = None,
        override_hostname: str | None = None,
        server_certificate: PemSource | None = None,
        server_key: PemSource | None = None,
        client_authorities: PemSource | None = None,
        check_interval: float = 10.0,
    ) -> None:
        given = {
            "root_certificates": root_certificates,
            "client_certificate": client_certificate,
            "client_key": client_key,
            "server_certificate": server_certificate,
            "server_key": server_key,
            "client_authorities": client_authorities,
        }
        self._sources = {
            name: _checked_source(name, source)
            for name, source in given.items()
            if source is not None
        }
        for certificate, key in PAIRS:
            if (certificate in self._sources) != (key in self._sources):
                raise ValueError(f"{certificate} and {key} are given together or not at all")
        if client_authorities is not None and server_certificate is None:
            raise ValueError("client_authorities needs server_certificate and server_key")
        self.override_hostname = checked_hostname("override_hostname", override_hostname)
        self.check_interval = _checked_interval(check_interval)
        self._lock = threading.Lock()  # of whoever looks
        self._state = threading.Lock()  # of what is written below; nothing is read under it
        self._rotations = itertools.count(1)
        self._rotated = 0
        self._current: Credentials | None = None
        self._generation = 0
        self._seen: dict[str, Any] = {}
        self._tried: Any = None
        self._asked_at = -float("inf")
        self._failure: str | None = None
        # By identity, here and below: equal ones are not the same.
        self._subscribers: _Weak[Any] = weakref.WeakValueDictionary()
        with _roll:
            _all[id(self)] = self

    def rotate(self) -> None:
        """Have new connections use the credentials as they are now, and old ones end.

        For whoever knows that they have changed, or wants connections made anew. Raises
        what reading them raises, ``OSError`` or ``ValueError``; then nothing has changed.
        Waits for no other thread that reads them.
        """
        number = next(self._rotations)
        signature = self._signature(ask=True)
        is_settled = _is_settled(signature)
        read = self._read(signature)
        with self._state:
            if number > self._rotated:  # else a later one was faster
                self._rotated = number
                self._note(signature, is_settled)
                self._change(read)
        self._tell()

    def credentials(self, timeout: float = -1) -> Credentials:
        """The newest credentials that work.

        Raises ``OSError`` or ``UnusableCredentialsError`` when there never were any, and
        ``TimeoutError`` when another thread is still reading the first after ``timeout``
        seconds.
        """
        self.refresh(timeout)
        if self._current is None:
            raise TimeoutError("another thread is still reading the TLS credentials")
        return self._current

    def refresh(self, timeout: float = -1) -> int:
        """Look whether anything has changed; returns the `generation` then.

        Only the first reading raises, see `credentials`. Where another thread is at it, this
        does not wait for what is only newer.
        """
        is_first = self._current is None
        if not self._lock.acquire(is_first, timeout if is_first else -1):
            return self._generation
        try:
            changed = self._look()
        finally:
            self._lock.release()
        if changed:
            self._tell()
        return self._generation

    @property
    def current(self) -> Credentials | None:
        """Those of the last reading that worked, without a look for newer ones."""
        return self._current

    @property
    def generation(self) -> int:
        """How often credentials were read that differed from those before, or rotated."""
        return self._generation

    @property
    def verifies_by_own_roots(self) -> bool:
        """Whether other authorities than the system's are trusted."""
        return "root_certificates" in self._sources

    @property
    def has_server_certificate(self) -> bool:
        """Whether a worker can serve with this."""
        return "server_certificate" in self._sources

    @property
    def demands_client_certificate(self) -> bool:
        """Whether a worker that serves with this asks its callers for a certificate."""
        return "client_authorities" in self._sources

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call ``subscriber._credentials_changed()`` after each change; held weakly."""
        with _roll:
            self._subscribers[id(subscriber)] = subscriber
        if any(not isinstance(source, bytes) for source in self._sources.values()):
            _watcher.watch(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TlsConfig):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        shown = [f"{name}={_shown(source)}" for name, source in self._sources.items()]
        if self.override_hostname is not None:
            shown.append(f"override_hostname={self.override_hostname!r}")
        return f"TlsConfig({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_options, (
            {
                **self._sources,
                "override_hostname": self.override_hostname,
                "check_interval": self.check_interval,
            },
        )

    def _identity(self) -> tuple[Any, ...]:
        return tuple(sorted(self._sources.items(), key=lambda each: each[0])), (
            self.override_hostname,
            self.check_interval,
        )

    def _look(self) -> bool:
        """Read anew what may have changed; whether it has, since there was something.

        Under ``_lock``. What somebody rotated meanwhile is newer.
        """
        rotated = self._rotated
        age = time.monotonic() - self._asked_at
        ask = self._current is None or age >= self.check_interval
        try:
            signature = self._signature(ask=ask)
            with self._state:
                if self._rotated != rotated or (self._current and signature == self._tried):
                    return False
                self._note(signature, _is_settled(signature))
            read = self._read(signature)
        except (OSError, UnusableCredentialsError) as error:
            if self._current is None:
                raise
            self._note_failure(error)
            return False
        with self._state:
            if self._rotated != rotated:
                return False
            self._failure = None
            before = self._current
            if before != read:
                self._change(read)
        return before is not None and before != read

    def _signature(self, *, ask: bool) -> dict[str, Any]:
        """What differs whenever a source does: PEM itself, or what tells files apart."""
        signature: dict[str, Any] = {}
        seen = self._seen
        for name, source in self._sources.items():
            if isinstance(source, bytes):
                signature[name] = source
            elif isinstance(source, Path):
                signature[name] = _state_of(source)
            elif ask or name not in seen:
                self._asked_at = time.monotonic()
                signature[name] = _asked(name, source)
            else:
                signature[name] = seen[name]
        return signature

    def _read(self, signature: dict[str, Any]) -> Credentials:
        pem = {
            name: source.read_bytes() if isinstance(source, Path) else signature[name]
            for name, source in self._sources.items()
        }
        for name, value in pem.items():
            _check_complete(name, value, self._sources[name])
        read = Credentials(**pem)
        check_fit(read)
        return read

    # Under ``_state``, both of these.

    def _note(self, signature: dict[str, Any], is_settled: bool) -> None:
        self._seen = signature
        self._tried = signature if is_settled else None

    def _change(self, read: Credentials) -> None:
        self._current = read
        self._failure = None
        self._generation += 1

    def _note_failure(self, error: Exception) -> None:
        # Once per failure, not per look. The text is ours or the system's: no PEM in it.
        text = f"{type(error).__name__}: {error}"
        if text != self._failure:
            self._failure = text
            logger.warning(
                "TLS credentials changed but cannot be used (%s); those of before stay in use", text
            )

    def _tell(self) -> None:
        with _roll:
            subscribers = list(self._subscribers.values())
        for subscriber in subscribers:
            try:
                subscriber._credentials_changed()  # noqa: SLF001 -- see Subscriber
            except Exception:
                logger.exception("a subscriber of TLS credentials failed")


class _Watcher(Daemon):
    """Looks at the sources of every config in use, also when nobody connects."""

    name = "resolver-tls"

    def __init__(self) -> None:
        super().__init__()
        self._watched: _Weak[TlsConfig] = weakref.WeakValueDictionary()
        self._arrived = threading.Event()

    def watch(self, config: TlsConfig) -> None:
        with _roll:
            self._watched[id(config)] = config
        self._arrived.set()
        self.ensure_started()

    def _work(self) -> None:
        self._arrived.wait(min((each.check_interval for each in self._in_use()), default=None))
        self._arrived.clear()
        for config in self._in_use():
            with contextlib.suppress(Exception):  # of a first reading: who connects is told
                config.refresh()

    def _in_use(self) -> list[TlsConfig]:
        with _roll:
            return list(self._watched.values())


def rotating(connector: Any) -> TlsConfig | None:
    """The config of a connector whose credentials may change."""
    tls = getattr(connector, "tls", None)
    return tls if isinstance(tls, TlsConfig) else None


def generation_for(connector: Any, key: str) -> int:
    """Which generation of credentials a connect to the URL ``key`` uses that begins now.

    Looks for changes first; waits for no other thread, the connector has a deadline.
    """
    tls = rotating(connector) if key.startswith(TLS_SCHEME) else None
    if tls is None:
        return 0
    with contextlib.suppress(Exception):  # the connector says it
        return tls.refresh(0)
    return tls.generation


def was_rotated(connector: Any, key: str, used: int) -> bool:
    """Whether the credentials of a connect to ``key`` have been replaced meanwhile."""
    tls = rotating(connector) if key.startswith(TLS_SCHEME) else None
    # 0 is before the first reading, which replaces nothing.
    return tls is not None and max(used, 1) != max(tls.generation, 1)


def config_of(connector: Any) -> TlsConfig:
    """The ``tls`` of a connector, or one made of its four options that hold PEM.

    Raises ``TypeError`` or ``ValueError``, naming the option.
    """
    flat = {
        "root_certificates": connector.tls_root_certificates,
        "client_certificate": connector.client_certificate,
        "client_key": connector.client_key,
        "override_hostname": connector.tls_override_hostname,
    }
    if connector.tls is not None:
        if not isinstance(connector.tls, TlsConfig):
            raise TypeError(f"tls is a TlsConfig, not {type(connector.tls).__name__}")
        if any(value is not None for value in flat.values()):
            raise ValueError("give certificates and keys within tls or beside it, not both")
        return connector.tls
    check_pem("tls_root_certificates", connector.tls_root_certificates)
    check_pem("client_certificate", connector.client_certificate)
    check_pem("client_key", connector.client_key)
    checked_hostname("tls_override_hostname", connector.tls_override_hostname)
    return TlsConfig(**flat)


def _asked(name: str, source: Callable[[], bytes]) -> bytes:
    try:
        return source()
    except Exception as error:
        # Without its text, which may hold anything.
        raise UnusableCredentialsError(
            f"the callable given for {name} failed ({type(error).__name__})"
        ) from error


def _state_of(path: Path) -> tuple[int, int, int, int] | str:
    """What tells a file's content from that of before; links are followed."""
    try:
        state = path.stat()
    except OSError as error:
        return type(error).__name__
    return state.st_mtime_ns, state.st_size, state.st_ino, state.st_dev


def _is_settled(signature: dict[str, Any]) -> bool:
    """Not of files written just now, whose next change may leave no trace in their state."""
    young = time.time_ns() - _YOUNG_NS
    return all(state[0] < young for state in signature.values() if isinstance(state, tuple))


def _check_complete(name: str, pem: object, source: object) -> None:
    if not isinstance(pem, bytes):
        raise UnusableCredentialsError(
            f"the callable given for {name} returned {type(pem).__name__}, not bytes (PEM)"
        )
    if not is_whole(pem):
        where = f" in {source}" if isinstance(source, Path) else ""
        raise UnusableCredentialsError(f"{name}{where} could not be loaded: it is not whole PEM")


def _checked_source(name: str, source: object) -> bytes | Path | Callable[[], bytes]:
    if isinstance(source, bytes):
        check_pem(name, source)
        return source
    if isinstance(source, str) and "-----BEGIN" in source:
        raise TypeError(f"{name}: a str is the path of a file; give PEM itself as bytes")
    if isinstance(source, (str, os.PathLike)):
        return Path(source).absolute()
    if callable(source):
        return source
    raise TypeError(
        f"{name} is PEM (bytes), a path or a callable that returns PEM, not {type(source).__name__}"
    )


def _checked_interval(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"check_interval is a number of seconds, not {type(value).__name__}")
    if not _MIN_INTERVAL <= value <= threading.TIMEOUT_MAX:
        raise ValueError(f"check_interval is {_MIN_INTERVAL:g} seconds or more")
    return float(value)


def _shown(source: object) -> str:
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Path):
        return repr(str(source))
    return f"<callable {getattr(source, '__qualname__', type(source).__qualname__)}>"


def _from_options(options: dict[str, Any]) -> TlsConfig:
    return TlsConfig(**options)


_roll = threading.RLock()  # of the sets of weak references; a finalizer may come back to it
_all: _Weak[TlsConfig] = weakref.WeakValueDictionary()
_watcher = _Watcher()


def _start_over() -> None:
    """In a forked child: whoever held a lock is not here."""
    global _roll, _watcher  # noqa: PLW0603
    _roll = threading.RLock()
    _watcher = _Watcher()
    for config in list(_all.values()):
        config._lock, config._state = threading.Lock(), threading.Lock()  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over)
