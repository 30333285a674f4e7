"""Which of the many TLS failures it was: told by every connector, in time, without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from resolver import FlightConnector, TlsConfig, WorkerConnectError
from resolver._handshake import _look
from resolver._pem import load_pair
from resolver._urls import parse_worker_url
from resolver.testing import FlightServerProcess
from tests.support.certificates import Pair, Signer
from tests.support.threads import Background

DAY = 86_400.0


@dataclass(frozen=True)
class World:
    """An authority that the workers and their clients trust, one that nobody does, and servers."""

    signer: Signer
    stranger: Signer
    plain: str
    tls: str
    mutual: str
    expired: str
    early: str
    client: Pair


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    signer, stranger = Signer(), Signer()
    good = signer.issue().as_server()
    with (
        FlightServerProcess() as plain,
        FlightServerProcess(**good) as tls,
        FlightServerProcess(**good, client_authority=signer.root) as mutual,
        FlightServerProcess(**signer.issue(ends_in=-DAY).as_server()) as expired,
        FlightServerProcess(**signer.issue(starts_in=DAY).as_server()) as early,
    ):
        yield World(
            signer,
            stranger,
            plain.url,
            tls.url,
            mutual.url,
            expired.url,
            early.url,
            signer.issue("client@workers.example"),
        )


def by_pyarrow(url: str, tls: TlsConfig) -> None:
    FlightConnector(tls=tls).connect(url)


def by_grpcio(url: str, tls: TlsConfig) -> None:
    pytest.importorskip("grpc")
    from resolver import GrpcConnector

    GrpcConnector(tls=tls).connect(url).close()


def by_asyncio(url: str, tls: TlsConfig) -> None:
    pytest.importorskip("grpc")
    from resolver.aio import GrpcConnector

    async def connect() -> None:
        client = await GrpcConnector(tls=tls).connect(url)
        await client.close()

    asyncio.run(connect())


Connect = Callable[[str, TlsConfig], None]
Case = Callable[[World], tuple[str, TlsConfig]]
connectors = pytest.mark.parametrize("connect", [by_pyarrow, by_grpcio, by_asyncio])

FAILURES: dict[str, tuple[Case, str, str]] = {
    "wrong authority": (
        lambda w: (w.tls, TlsConfig(root_certificates=w.stranger.root)),
        "its certificate is signed by an authority that is not trusted here",
        "root_certificates",
    ),
    "unknown to the system": (
        lambda w: (w.tls, TlsConfig()),
        "its certificate is signed by an authority that is not trusted here",
        "root_certificates",
    ),
    "wrong host name": (
        lambda w: (
            w.tls,
            TlsConfig(root_certificates=w.signer.root, override_hostname="w1.example"),
        ),
        "its certificate is for another host name",
        "override_hostname",
    ),
    "expired": (
        lambda w: (w.expired, TlsConfig(root_certificates=w.signer.root)),
        "its certificate has expired",
        "renew it",
    ),
    "not valid yet": (
        lambda w: (w.early, TlsConfig(root_certificates=w.signer.root)),
        "its certificate is not valid yet",
        "clocks",
    ),
    "no client certificate": (
        lambda w: (w.mutual, TlsConfig(root_certificates=w.signer.root)),
        "it asks for a client certificate, and none was given",
        "client_key",
    ),
    "client certificate of a stranger": (
        lambda w: (
            w.mutual,
            TlsConfig(
                root_certificates=w.signer.root, **w.stranger.issue("x@y.example").as_client()
            ),
        ),
        "it does not trust the authority that signed it",
        "an authority that the worker trusts",
    ),
    "client certificate expired": (
        lambda w: (
            w.mutual,
            TlsConfig(
                root_certificates=w.signer.root,
                **w.signer.issue("x@y.example", ends_in=-DAY).as_client(),
            ),
        ),
        "it refused the client certificate, which has expired",
        "renew client_certificate",
    ),
    "client certificate not valid yet": (
        lambda w: (
            w.mutual,
            TlsConfig(
                root_certificates=w.signer.root,
                **w.signer.issue("x@y.example", starts_in=DAY).as_client(),
            ),
        ),
        "it refused the client certificate, which is not valid yet",
        "clock",
    ),
    "TLS to a plaintext worker": (
        lambda w: (
            w.plain.replace("http:", "https:"),
            TlsConfig(root_certificates=w.signer.root),
        ),
        "it does not speak TLS",
        "use http://",
    ),
    "plaintext to a TLS worker": (
        lambda w: (w.tls.replace("https:", "http:"), TlsConfig()),
        "it speaks TLS",
        "use https://",
    ),
    "plaintext to a worker that asks for certificates": (
        lambda w: (w.mutual.replace("https:", "http:"), TlsConfig()),
        "it speaks TLS",
        "use https://",
    ),
}


@connectors
@pytest.mark.parametrize("failure", FAILURES)
def test_it_says_which_failure_it_was(failure: str, connect: Connect, world: World) -> None:
    case, reason, remedy = FAILURES[failure]
    url, tls = case(world)
    with pytest.raises(WorkerConnectError) as caught:
        connect(url, tls)
    message = str(caught.value)
    assert message.startswith(f"Could not connect to worker {url}: {reason}") or reason in message
    assert remedy in message
    assert url in message
    assert "BEGIN" not in repr(caught.value) + message + str(caught.value.__cause__)


@contextmanager
def server_of_others(
    pair: Pair, *, authority: bytes | None = None, alpn: str = "h2", newest: ssl.TLSVersion
) -> Iterator[str]:
    """The URL of what shakes hands as the standard library does, and then says nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_pair(context, *pair)
    context.maximum_version = newest
    context.set_alpn_protocols([alpn])
    if authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=authority.decode("ascii"))

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return  # closed
            with peer, contextlib.suppress(OSError):
                peer.settimeout(10)
                with context.wrap_socket(peer, server_side=True) as connection:
                    connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = Background(serve)
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        serving.result()


@connectors
@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_refusal_by_other_servers_than_grpcs_is_told_too(
    newest: ssl.TLSVersion, connect: Connect, world: World
) -> None:
    trusting = {"root_certificates": world.signer.root}
    stranger = world.stranger.issue("x@y.example").as_client()
    with server_of_others(world.signer.issue(), authority=world.signer.root, newest=newest) as url:
        with pytest.raises(WorkerConnectError, match="asks for a client certificate"):
            connect(url, TlsConfig(**trusting))
        with pytest.raises(WorkerConnectError, match="does not trust the authority"):
            connect(url, TlsConfig(**trusting, **stranger))


@connectors
def test_a_server_of_another_protocol_under_tls_is_told(connect: Connect, world: World) -> None:
    with (
        server_of_others(
            world.signer.issue(), alpn="http/1.1", newest=ssl.TLSVersion.TLSv1_3
        ) as url,
        pytest.raises(WorkerConnectError, match="not HTTP/2"),
    ):
        connect(url, TlsConfig(root_certificates=world.signer.root))


@connectors
def test_what_is_right_connects(connect: Connect, world: World) -> None:
    connect(world.tls, TlsConfig(root_certificates=world.signer.root))
    connect(
        world.mutual,
        TlsConfig(root_certificates=world.signer.root, **world.client.as_client()),
    )
    connect(world.plain, TlsConfig(root_certificates=world.signer.root))


@connectors
def test_files_that_are_missing_are_named(connect: Connect, world: World, tmp_path) -> None:
    missing = tmp_path / "root.pem"
    with pytest.raises(WorkerConnectError, match="could not be loaded") as caught:
        connect(world.tls, TlsConfig(root_certificates=missing))
    assert str(missing) in str(caught.value)
    assert world.tls in str(caught.value)


@connectors
def test_a_callable_that_fails_is_named_without_its_words(connect: Connect, world: World) -> None:
    def from_vault() -> bytes:
        raise RuntimeError("s3cret of the vault")

    with pytest.raises(WorkerConnectError, match="root_certificates failed") as caught:
        connect(world.tls, TlsConfig(root_certificates=from_vault))
    assert "s3cret" not in str(caught.value)


def test_unverified_servers_may_ask_for_certificates_too(world: World) -> None:
    with pytest.raises(WorkerConnectError, match="it asks for a client certificate"):
        FlightConnector(disable_server_verification=True).connect(world.mutual)


def test_a_look_at_what_resets_the_connection_leaves_none_open(monkeypatch, world: World) -> None:
    def reset(_connection: ssl.SSLSocket) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(ssl.SSLSocket, "getpeername", reset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        assert _look(parse_worker_url(world.tls), None, None, time.monotonic() + 10, True) is None
        gc.collect()
    assert not caught


def test_a_look_at_tls_ends_with_the_deadline(monkeypatch, world: World) -> None:
    """The handshake that tells failures apart may hang in a name server; nobody waits for it."""
    import threading

    from resolver import _handshake

    release = threading.Event()
    monkeypatch.setattr(_handshake, "_look", lambda *_: release.wait(30))
    started = time.monotonic()
    try:
        with pytest.raises(WorkerConnectError, match="was not accepted"):
            FlightConnector(
                tls=TlsConfig(root_certificates=world.stranger.root), connect_timeout=0.5
            ).connect(world.tls)
    finally:
        release.set()
    assert time.monotonic() - started < 20  # it would have been 30
