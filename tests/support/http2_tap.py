"""A loopback proxy that reads along: which HTTP/2 frames pass, in each direction.

For what gRPC does below its API, pings and GOAWAY above all. Plaintext only.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PING, GOAWAY = 6, 7
ACK = 1


class Http2Tap:
    """Stands in front of `target_port`. Counts PINGs and keeps what GOAWAYs say."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._changed = threading.Condition()
        self.pings: Counter[str] = Counter()
        """Of "client" and "server": pings sent, their acknowledgements not counted."""
        self.goodbyes: list[bytes] = []
        """The debug data of each GOAWAY of the server."""
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def wait_for(self, condition, timeout: float = 30.0) -> None:
        """Return once `condition()` holds; TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise TimeoutError(f"saw pings {dict(self.pings)} and GOAWAYs {self.goodbyes}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += client, server
            for args in ((client, server, "client"), (server, client, "server")):
                threading.Thread(target=self._pump, args=args, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, side: str) -> None:
        seen = bytearray()
        skip = len(PREFACE) if side == "client" else 0
        try:
            while data := source.recv(65_536):
                sink.sendall(data)
                seen += data
                dropped = min(skip, len(seen))
                del seen[:dropped]
                skip -= dropped
                self._read(seen, side)
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    def _read(self, seen: bytearray, side: str) -> None:
        while len(seen) >= 9 and len(seen) >= 9 + (size := int.from_bytes(seen[:3])):
            kind, flags, body = seen[3], seen[4], bytes(seen[9 : 9 + size])
            del seen[: 9 + size]
            with self._changed:
                if kind == PING and not flags & ACK:
                    self.pings[side] += 1
                elif kind == GOAWAY and side == "server":
                    self.goodbyes.append(body[8:])
                self._changed.notify_all()
