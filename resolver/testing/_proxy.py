"""A loopback TCP proxy with faults; it knows nothing of Flight or gRPC."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Final, Literal, Self, TypeAlias, get_args

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

Mode: TypeAlias = Literal["pass", "refuse", "silent", "reset", "close", "delay", "garbage", "http1"]

_CHUNK: Final = 65_536
_JOIN_TIMEOUT: Final = 10.0
_DIAL_TIMEOUT: Final = 5.0
_CANNED: Final = {
    "garbage": b"\x00\xff\x13 this is no HTTP/2 " * 64,
    "http1": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
}


class FaultyProxy:
    """Stands on a free loopback port in front of `target_port`, with a fault of choice.

    ============  ================================================================
    mode          what a peer sees
    ============  ================================================================
    ``pass``      the server behind it
    ``refuse``    connection refused; connections that exist go on
    ``silent``    a connection on which nothing moves, existing ones included
    ``reset``     a connection that is reset at once; existing ones are reset too
    ``close``     a connection that is closed at once
    ``delay``     the server, each chunk of bytes ``delay`` seconds late
    ``garbage``   bytes that are no protocol
    ``http1``     an HTTP/1.1 error response
    ============  ================================================================

    ``target_port`` may be None where the server is never reached. Thread-safe; a
    context manager; `close` ends its threads and connections.
    """

    def __init__(
        self,
        target_port: int | None,
        *,
        mode: Mode = "pass",
        delay: float = 0.0,
        host: str = "127.0.0.1",
    ) -> None:
        _check_mode(mode)
        self._target = None if target_port is None else (host, target_port)
        self._host = host
        self._delay = delay
        self._changed = threading.Condition()
        self._mode: Mode = mode
        self._applied: Mode | None = None
        self._closing = False
        self._accepted = 0
        self._clients: set[socket.socket] = set()
        self._servers: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener: socket.socket | None = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._acceptor = threading.Thread(
            target=self._accept_loop, name="faulty-proxy", daemon=True
        )
        self._acceptor.start()
        self._await_applied(mode)

    @property
    def url(self) -> str:
        """The plaintext worker URL of the proxy."""
        return f"http://{self._host}:{self.port}"

    @property
    def mode(self) -> Mode:
        """The fault in force."""
        with self._changed:
            return self._mode

    @property
    def connections(self) -> int:
        """Connections accepted so far, in any mode."""
        with self._changed:
            return self._accepted

    def wait_connections(self, count: int, timeout: float = 10.0) -> None:
        """Return once `count` connections were accepted; TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._accepted >= count, timeout):
                raise TimeoutError(f"{self._accepted} of {count} connections in {timeout:g} s")

    @property
    def active(self) -> int:
        """Connections of peers that are open now."""
        with self._changed:
            return len(self._clients)

    def wait_active(self, count: int, timeout: float = 10.0) -> None:
        """Return once exactly `count` are open; TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._clients) == count, timeout):
                raise TimeoutError(f"{len(self._clients)} connections open after {timeout:g} s")

    def set_mode(self, mode: Mode, *, delay: float | None = None) -> None:
        """Change the fault; when this returns, the new one is in force."""
        _check_mode(mode)
        with self._changed:
            if self._closing:
                raise RuntimeError("the proxy is closed")
            self._mode = mode
            if delay is not None:
                self._delay = delay
            self._changed.notify_all()
        self._wake_writer.send(b"m")
        self._await_applied(mode)
        if mode == "reset":
            self.drop_connections()

    def drop_connections(self) -> None:
        """Reset every connection that exists now."""
        with self._changed:
            sockets = [*self._clients, *self._servers]
        for sock in sockets:
            _end_with_reset(sock)
            _shutdown(sock)  # wakes the threads that use it; they close it

    def close(self) -> None:
        """Stop listening, drop all connections, end all threads. Idempotent."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._wake_writer.send(b"c")
        self._acceptor.join(_JOIN_TIMEOUT)
        self.drop_connections()
        with self._changed:
            threads = list(self._threads)
        for thread in threads:
            thread.join(_JOIN_TIMEOUT)
        self._wake_reader.close()
        self._wake_writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- accepting -------------------------------------------------------------------------

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._host, port))
        listener.listen(128)
        return listener

    def _await_applied(self, mode: Mode) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._applied == mode, _JOIN_TIMEOUT):
                raise TimeoutError(f"the proxy did not switch to {mode!r}")

    def _accept_loop(self) -> None:
        while True:
            with self._changed:
                mode, closing = self._mode, self._closing
            # The listener is touched by this thread alone, so its descriptor cannot be
            # reused under a select that another thread is in.
            if (closing or mode == "refuse") and self._listener is not None:
                self._listener.close()
                self._listener = None
            elif not closing and mode != "refuse" and self._listener is None:
                self._listener = self._listen(self.port)
            with self._changed:
                self._applied = mode
                self._changed.notify_all()
            if closing:
                return
            self._accept_next()

    def _accept_next(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select()]
        if self._wake_reader in ready:
            self._wake_reader.recv(64)
            return
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # the peer gave up before it was accepted
        with self._changed:
            self._accepted += 1
            self._clients.add(connection)
            self._changed.notify_all()
        self._spawn(self._handle, connection)

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            finally:
                with self._changed:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="faulty-proxy-connection", daemon=True)
        with self._changed:
            self._threads.add(thread)
        thread.start()

    # -- one connection --------------------------------------------------------------------

    def _handle(self, client: socket.socket) -> None:
        mode = self._await_audible()
        if mode is None or mode == "reset":
            _end_with_reset(client)
            self._forget(client)
        elif mode in ("pass", "delay"):
            self._connect_through(client)
        else:
            try:
                client.sendall(_CANNED.get(mode, b""))
                client.shutdown(socket.SHUT_WR)
                if mode != "close":
                    _drain(client)
            except OSError:
                pass  # the peer went first
            self._forget(client)

    def _connect_through(self, client: socket.socket) -> None:
        server = None
        if self._target is not None:
            try:
                server = socket.create_connection(self._target, _DIAL_TIMEOUT)
            except OSError:
                server = None
        if server is None:
            _end_with_reset(client)
            self._forget(client)
            return
        server.settimeout(None)
        for sock in (client, server):  # the pass mode must not add Nagle's delay
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._changed:
            self._servers.add(server)
        backward = threading.Event()
        self._spawn(self._pump, server, client, backward)
        self._pump(client, server, None)
        backward.wait(_JOIN_TIMEOUT)
        self._forget(client)
        self._forget(server)

    def _pump(
        self, source: socket.socket, sink: socket.socket, ended: threading.Event | None
    ) -> None:
        try:
            while True:
                data = source.recv(_CHUNK)
                mode = self._await_audible()
                if mode is None:
                    break
                if mode == "delay":
                    time.sleep(self._delay)
                if not data:
                    break
                sink.sendall(data)
        except OSError:
            pass  # either side was reset; the other one learns it below
        finally:
            for sock in (source, sink):
                _shutdown(sock)
            if ended is not None:
                ended.set()

    def _await_audible(self) -> Mode | None:
        """Wait while the proxy is silent; the mode to act in, None when it closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._mode != "silent")
            return None if self._closing else self._mode

    def _forget(self, sock: socket.socket) -> None:
        sock.close()
        with self._changed:
            self._clients.discard(sock)
            self._servers.discard(sock)
            self._changed.notify_all()


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode is one of {', '.join(get_args(Mode))}, not {mode!r}")


def _drain(sock: socket.socket) -> None:
    """Read until the peer closes; closing over unread bytes would reset the connection."""
    while sock.recv(_CHUNK):
        pass


def _shutdown(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed meanwhile, or never connected
        sock.shutdown(socket.SHUT_RDWR)


def _end_with_reset(sock: socket.socket) -> None:
    """Make the coming close send RST instead of FIN."""
    with contextlib.suppress(OSError):  # closed meanwhile
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
