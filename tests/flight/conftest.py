"""Servers, certificates and hostile peers for the Flight tests; loopback only."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import trustme

from resolver.testing import FaultyProxy, FlightServerProcess


@dataclass(frozen=True)
class Authority:
    """A certificate authority and what it signed, as PEM."""

    root: bytes
    server_certificate: bytes
    server_key: bytes
    client_certificate: bytes
    client_key: bytes


def make_authority() -> Authority:
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1")
    client = authority.issue_cert("client@workers.example")
    return Authority(
        root=authority.cert_pem.bytes(),
        server_certificate=server.cert_chain_pems[0].bytes(),
        server_key=server.private_key_pem.bytes(),
        client_certificate=client.cert_chain_pems[0].bytes(),
        client_key=client.private_key_pem.bytes(),
    )


@pytest.fixture(scope="session")
def authority() -> Authority:
    return make_authority()


@pytest.fixture(scope="session")
def stranger() -> Authority:
    """An authority that nobody trusts."""
    return make_authority()


@pytest.fixture(scope="session")
def plain_server() -> Iterator[FlightServerProcess]:
    """A server for tests that do it no harm."""
    with FlightServerProcess() as server:
        yield server


@pytest.fixture(scope="session")
def tls_server(authority: Authority) -> Iterator[FlightServerProcess]:
    with FlightServerProcess(
        tls_certificate=authority.server_certificate, tls_key=authority.server_key
    ) as server:
        yield server


@pytest.fixture(scope="session")
def mtls_server(authority: Authority) -> Iterator[FlightServerProcess]:
    with FlightServerProcess(
        tls_certificate=authority.server_certificate,
        tls_key=authority.server_key,
        client_authority=authority.root,
    ) as server:
        yield server


@pytest.fixture
def server() -> Iterator[FlightServerProcess]:
    """A server that a test may kill, suspend and restart."""
    with FlightServerProcess() as running:
        yield running


@pytest.fixture
def proxy(plain_server: FlightServerProcess) -> Iterator[FaultyProxy]:
    """A proxy in front of `plain_server`."""
    with FaultyProxy(plain_server.port) as running:
        yield running


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens; it stays bound so that nobody else can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def dropping_port() -> Iterator[int]:
    """A port whose packets go nowhere, as behind a firewall: its accept queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(16):
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.1)
            try:
                filler.connect(("127.0.0.1", port))
            except TimeoutError:
                break
        else:
            pytest.skip("this kernel does not bound its accept queue")
        yield port


@pytest.fixture
def stalling_port() -> Iterator[int]:
    """A port that speaks the first words of HTTP/2 and then nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        settings_frame = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                stack.enter_context(connection)
                connection.sendall(settings_frame)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
