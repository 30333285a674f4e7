"""A worker's port, and the Flight server of pyarrow behind it.

That server cannot change its certificate. So a worker whose certificate is renewed hands its
port over to a new server: the old one stops listening, the new one listens within
milliseconds, and the calls under way on the old one run to their end. What is answered is
``_worker_calls``'s business.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

import pyarrow as pa
from pyarrow import flight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ._listen import Guard, ListenAddress
    from ._worker_calls import CallHandlers

__all__ = ["Listener"]

_REMEDIES: Final = {
    errno.EADDRINUSE: "give another port, or port 0 for a free one",
    errno.EADDRNOTAVAIL: "give an address of this machine",
    errno.EACCES: "give a port from 1024, or port 0 for a free one",
}
_ANSWER_TIMEOUT: Final = 1.0  # seconds
_RELEASE_POLL: Final = 0.0005  # seconds between looks whether the old server has left the port
_RELEASE_PATIENCE: Final = 10.0  # seconds after which somebody else must have taken it
_CALL_PATIENCE: Final = 5.0  # seconds for callers to read what they have asked for
_CUT_PATIENCE: Final = 1.0  # seconds for calls to notice that their connection is gone

logger = logging.getLogger("resolver")


class FlightServer(flight.FlightServerBase):  # type: ignore[misc]  # pyarrow has no types
    """Passes calls on, from the moment it is made until ``shutdown()``."""

    def __init__(self, location: str, calls: CallHandlers, options: dict[str, Any]) -> None:
        self._calls = calls
        super().__init__(location, **options)  # calls may come from here on

    def list_actions(self, _context: flight.ServerCallContext) -> list[tuple[str, str]]:
        return self._calls.list_actions()

    def do_action(
        self, context: flight.ServerCallContext, action: flight.Action
    ) -> list[flight.Result]:
        return self._calls.do_action(context, action)

    def do_get(
        self, _context: flight.ServerCallContext, ticket: flight.Ticket
    ) -> flight.FlightDataStream:
        return self._calls.do_get(ticket)

    def list_flights(
        self, _context: flight.ServerCallContext, _criteria: bytes
    ) -> Iterator[flight.FlightInfo]:
        return self._calls.list_flights()


class Listener:
    """Answers calls on one port from the moment it is made until `close`. Thread-safe.

    ``port`` is 0 for a Unix socket. ``failure`` is why no call is answered any more, though
    nobody asked for that. Raises ``OSError`` with the remedy, or ``pyarrow.ArrowException``,
    when the address cannot be listened on.
    """

    def __init__(self, calls: CallHandlers, address: ListenAddress, guard: Guard) -> None:
        self._calls = calls
        self._address = address
        self._guard = guard
        self._path = unquote_to_bytes(address.url.path)
        self._lock = threading.Lock()
        if address.url.host:
            _check_free(
                address.url.host.strip("[]"), 0 if address.any_port else address.url.port or 0
            )
        else:
            _check_unanswered(self._path)
        self._server = FlightServer(address.flight_location(guard), calls, guard.server_options())
        self._handed_over: list[threading.Thread] = []
        self._is_closed = False
        self._ended = threading.Event()
        self.failure: OSError | None = None
        self.port: Final[int] = self._server.port

    @property
    def _url(self) -> str:
        return self._address.worker_url(self.port, self._guard)

    def renew(self, current_guard: Callable[[], Guard]) -> None:
        """Guard new connections by what ``current_guard()`` returns, if that is new.

        A caller that connects while the port changes hands is refused, as by a worker that
        restarts. Raises ``pyarrow.ArrowException`` for certificates that gRPC does not take;
        then nothing has changed. Raises ``OSError`` when somebody else took the port
        meanwhile; then no call is answered any more, and `wait` raises it too.
        """
        with self._lock:
            guard = current_guard()
            if self._is_closed or guard == self._guard:
                return
            _try_out(guard)
            handing_over = threading.Thread(
                target=self._server.shutdown, name="resolver-handover", daemon=True
            )
            handing_over.start()
            self._handed_over = [each for each in self._handed_over if each.is_alive()]
            self._handed_over.append(handing_over)
            try:
                self._server = self._take_over(guard)
            except (OSError, pa.ArrowException) as error:
                self._is_closed = True
                self.failure = OSError(
                    f"{self._url}: the port was lost while its certificate was "
                    f"renewed, and no call is answered any more ({error}); start the worker anew"
                )
                self._ended.set()
                raise self.failure from error
            self._guard = guard

    def _take_over(self, guard: Guard) -> FlightServer:
        host = self._address.url.host.strip("[]")
        location = self._address.flight_location(guard, self.port)
        deadline = time.monotonic() + _RELEASE_PATIENCE
        # Asked by a socket of our own: gRPC writes to standard error when it gets none.
        while not _is_free(host, self.port) and time.monotonic() < deadline:
            time.sleep(_RELEASE_POLL)
        return FlightServer(location, self._calls, guard.server_options())

    def close(self) -> None:
        """Answer no more, and block until the calls that are answered now have ended.

        The connections of those that have not after ``_CALL_PATIENCE`` are cut: gRPC would
        wait for as long as a caller reads nothing.
        """
        with self._lock:
            self._is_closed = True
        ending = threading.Thread(
            target=self._server.shutdown, name="resolver-shutdown", daemon=True
        )
        ending.start()
        threads = [*self._handed_over, ending]
        if not _joined(threads, _CALL_PATIENCE):
            _cut_connections(self._address.url.host.strip("[]"), self.port, self._path)
            if not _joined(threads, _CUT_PATIENCE):
                logger.warning("%s: calls that do not end are left", self._url)
        self._ended.set()

    def wait(self) -> None:
        """Block until `close` has been called and has done its work."""
        self._ended.wait()
        if self.failure is not None:
            raise self.failure


def _try_out(guard: Guard) -> None:
    """Raise unless gRPC can serve with ``guard``."""
    flight.FlightServerBase("grpc+tls://127.0.0.1:0", **guard.server_options()).shutdown()


def _check_free(host: str, port: int) -> None:
    """Raise ``OSError``, with the remedy, unless the addresses of ``host`` can be listened on.

    One that this machine does not have is left out, but none that somebody else has: callers
    would find him there. gRPC says less, and says it on standard error.
    """
    try:
        addresses = _addresses(host, port)
    except OSError as error:
        raise OSError(f"{error.strerror}; give an address of this machine") from error
    failures: list[OSError] = []
    for address in addresses:
        try:
            _bind(address)
        except OSError as error:
            failures.append(error)
    taken = [error for error in failures if error.errno == errno.EADDRINUSE]
    if taken or len(failures) == len(addresses):
        failure = (taken or failures)[0]
        remedy = _REMEDIES.get(failure.errno or 0)
        text = failure.strerror or str(failure)
        raise OSError(f"{text}; {remedy}" if remedy else text) from failure


def _addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    # gRPC asks nobody what localhost is.
    names = ["127.0.0.1", "::1"] if host == "localhost" else [host]
    return [
        address
        for name in names
        for address in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    ]


def _check_unanswered(path: bytes) -> None:
    """Raise ``OSError`` if a Unix socket has a listener, whom gRPC would cut off unasked."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_ANSWER_TIMEOUT)
        try:
            probe.connect(path)
        except (TimeoutError, BlockingIOError):
            pass  # it has many callers
        except OSError:
            return
    raise OSError("somebody listens on that socket already; give another path")


def _is_free(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        _bind(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0])
        return True
    return False


def _bind(address: tuple[Any, ...]) -> None:
    family, kind, protocol, _, where = address
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)


def _joined(threads: Sequence[threading.Thread], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _cut_connections(host: str, port: int, path: bytes) -> None:
    """Cut what is connected to that address of this process, or else to that Unix socket.

    gRPC lends nobody its sockets, but a duplicate of one is the same connection.
    """
    ours = {_plain(where[0]) for *_, where in _addresses(host, port)} if host else set()
    for found in _sockets():
        with contextlib.suppress(OSError):  # it is not connected, or no longer
            name = found.getsockname()
            if found.family == socket.AF_UNIX:
                is_ours = not host and os.fsencode(name) == path
            elif found.family in (socket.AF_INET, socket.AF_INET6) and name[1] == port:
                is_ours = _plain(name[0]) in ours or any(each.is_unspecified for each in ours)
            else:
                is_ours = False
            if is_ours:
                found.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[socket.socket]:
    """A duplicate of each socket of this process."""
    for descriptor in Path("/dev/fd").iterdir():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            duplicate = os.dup(int(descriptor.name))
            stack.callback(os.close, duplicate)
            found = socket.socket(fileno=duplicate)  # refuses what is no socket
            stack.pop_all()
            with found:
                yield found


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(address)
    return getattr(parsed, "ipv4_mapped", None) or parsed
