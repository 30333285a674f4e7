"""Credentials that change while clients are in use, with real servers that see who calls."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pyarrow import flight

from resolver import (
    DefaultChannelResolver,
    FlightConnector,
    GrpcConnector,
    TlsConfig,
    WorkerConnectError,
)
from resolver.testing import FlightServerProcess
from tests.support.aio import until
from tests.support.certificates import PemFiles, Signer
from tests.support.threads import Background, wait_until

FIRST, SECOND = "first@workers.example", "second@workers.example"


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer()


@pytest.fixture(scope="module")
def server(signer: Signer) -> Iterator[FlightServerProcess]:
    with FlightServerProcess(**signer.issue().as_server(), client_authority=signer.root) as running:
        yield running


@pytest.fixture
def files(tmp_path, signer: Signer) -> PemFiles:
    return PemFiles(tmp_path, signer.issue(FIRST))


@pytest.fixture
def tls(files: PemFiles, signer: Signer) -> TlsConfig:
    return TlsConfig(
        root_certificates=signer.root,
        client_certificate=files.certificate,
        client_key=files.key,
        check_interval=0.05,
    )


@pytest.fixture(params=["by_pyarrow", "by_grpcio"])
def connector_class(request) -> type[Any]:
    if request.param == "by_pyarrow":
        return FlightConnector
    pytest.importorskip("grpc")
    return GrpcConnector


@pytest.fixture
def resolver(connector_class, tls: TlsConfig) -> Iterator[DefaultChannelResolver]:
    with DefaultChannelResolver(connector_class(tls=tls)) as resolver:
        yield resolver


def identity(resolver: DefaultChannelResolver, url: str) -> str:
    """Who the server thinks is calling."""
    client = resolver.get_flight_client_for_url(url)
    (result,) = client.do_action(flight.Action("identity", b""))
    return result.body.to_pybytes().decode()


async def aio_identity(resolver: Any, url: str) -> str:
    """The same of an asyncio resolver."""
    client = await resolver.get_flight_client_for_url(url)
    results = [result async for result in client.do_action(flight.Action("identity", b""))]
    return results[0].body.to_pybytes().decode()


def test_a_changed_file_is_noticed(resolver, server, files, signer) -> None:
    assert identity(resolver, server.url) == FIRST
    files.replace(signer.issue(SECOND))
    wait_until(lambda: identity(resolver, server.url) == SECOND)


def test_nobody_has_to_look_anything_up_for_old_clients_to_go(
    resolver, server, files, signer
) -> None:
    resolver.get_flight_client_for_url(server.url)
    files.replace(signer.issue(SECOND))
    wait_until(lambda: resolver.urls() == [])
    assert resolver.stats().invalidated == 1


def test_rotate_acts_at_once(connector_class, server, signer) -> None:
    issued = iter([signer.issue(FIRST), signer.issue(SECOND)])
    current = [next(issued)]
    tls = TlsConfig(
        root_certificates=signer.root,
        client_certificate=lambda: current[0].certificate,
        client_key=lambda: current[0].key,
        check_interval=3_600.0,
    )
    with DefaultChannelResolver(connector_class(tls=tls)) as resolver:
        old = resolver.get_flight_client_for_url(server.url)
        assert identity(resolver, server.url) == FIRST
        current[0] = next(issued)
        tls.rotate()
        assert resolver.urls() == []
        assert identity(resolver, server.url) == SECOND
        assert resolver.get_flight_client_for_url(server.url) is not old


def test_a_stream_on_the_old_connection_runs_to_its_end(
    resolver, server, tls, files, signer
) -> None:
    client = resolver.get_flight_client_for_url(server.url)
    stream = client.do_get(flight.Ticket(b"400"))
    rows = stream.read_chunk().data.num_rows
    files.replace(signer.issue(SECOND))
    tls.rotate()
    assert identity(resolver, server.url) == SECOND
    del client  # the stream alone is left of it
    rows += sum(chunk.data.num_rows for chunk in stream)
    assert rows == 400 * 1_024


def test_the_old_connection_is_closed_once_nobody_uses_it(
    resolver, server, tls, files, signer
) -> None:
    import weakref

    client = resolver.get_flight_client_for_url(server.url)
    ended = weakref.ref(client)
    files.replace(signer.issue(SECOND))
    tls.rotate()
    assert ended() is client  # somebody does
    assert list(client.do_action(flight.Action("identity", b"")))
    del client
    wait_until(lambda: ended() is None)


def test_plaintext_clients_stay(connector_class, tls, files, signer, plain_server) -> None:
    with DefaultChannelResolver(connector_class(tls=tls)) as resolver:
        client = resolver.get_flight_client_for_url(plain_server.url)
        tls.rotate()
        assert resolver.get_flight_client_for_url(plain_server.url) is client


def test_a_half_written_pair_keeps_the_old_one_in_use(
    resolver, server, tls, files, signer, caplog
) -> None:
    assert identity(resolver, server.url) == FIRST
    caplog.set_level(logging.WARNING, "resolver")
    second = signer.issue(SECOND)
    files.certificate.write_bytes(second.certificate)  # the key follows later
    wait_until(lambda: caplog.records)
    resolver.invalidate(server.url)
    assert identity(resolver, server.url) == FIRST
    files.key.write_bytes(second.key[: len(second.key) // 2])
    resolver.invalidate(server.url)
    assert identity(resolver, server.url) == FIRST
    files.key.write_bytes(second.key)
    wait_until(lambda: identity(resolver, server.url) == SECOND)
    text = "".join(record.getMessage() for record in caplog.records)
    assert "cannot be used" in text
    assert "BEGIN" not in text


def test_callers_never_fail_while_credentials_rotate(
    connector_class, server, tls, files, signer
) -> None:
    with DefaultChannelResolver(connector_class(tls=tls)) as resolver:
        done = threading.Event()

        def call_on() -> set[str]:
            seen = set()
            while not done.is_set():
                seen.add(identity(resolver, server.url))
            return seen

        callers = [Background(call_on) for _ in range(4)]
        names = [f"client-{number}@workers.example" for number in range(5)]
        try:
            for name in names:
                files.replace(signer.issue(name))
                tls.rotate()
                wait_until(lambda name=name: identity(resolver, server.url) == name)
        finally:
            done.set()
        seen = set().union(*(caller.result() for caller in callers))
    assert seen <= {FIRST, *names}
    assert names[-1] in seen


def test_a_connect_under_way_leaves_no_old_client_behind(
    connector_class, server, tls, files, signer
) -> None:
    class Slow(connector_class):
        def connect(self, url: str) -> Any:
            client = super().connect(url)
            reached.set()
            assert go_on.wait(30)
            return client

    reached, go_on = threading.Event(), threading.Event()
    with DefaultChannelResolver(Slow(tls=tls)) as resolver:
        looking_up = Background(lambda: resolver.get_flight_client_for_url(server.url))
        assert reached.wait(30)
        files.replace(signer.issue(SECOND))
        tls.rotate()
        go_on.set()
        old = looking_up.result()
        (result,) = old.do_action(flight.Action("identity", b""))
        assert result.body.to_pybytes().decode() == FIRST
        assert identity(resolver, server.url) == SECOND


def test_certificates_that_expire_during_use(connector_class, server, tmp_path, signer) -> None:
    """The first expires while its connection is in use; the second is there in time."""
    files = PemFiles(tmp_path, signer.issue(FIRST, ends_in=3.0))
    connector = connector_class(
        tls=TlsConfig(
            root_certificates=signer.root,
            client_certificate=files.certificate,
            client_key=files.key,
            check_interval=0.05,
        )
    )
    with DefaultChannelResolver(connector) as resolver:
        assert identity(resolver, server.url) == FIRST
        client = resolver.get_flight_client_for_url(server.url)
        stream = client.do_get(flight.Ticket(b"endless"))
        assert stream.read_chunk().data.num_rows

        refusals = []

        def expired() -> list[str]:
            try:
                connector.connect(server.url)
            except WorkerConnectError as error:
                refusals.append(str(error))
            return refusals

        wait_until(expired)
        assert "has expired" in refusals[0]
        assert stream.read_chunk().data.num_rows  # what is connected stays so
        assert identity(resolver, server.url) == FIRST
        files.replace(signer.issue(SECOND))
        wait_until(lambda: identity(resolver, server.url) == SECOND)
        assert stream.read_chunk().data.num_rows
        stream.cancel()


def test_a_failure_of_before_is_forgotten(connector_class, server, tmp_path, signer) -> None:
    files = PemFiles(tmp_path, signer.issue(FIRST, ends_in=-1.0))
    tls = TlsConfig(
        root_certificates=signer.root, client_certificate=files.certificate, client_key=files.key
    )
    with DefaultChannelResolver(connector_class(tls=tls), failure_ttl=3_600) as resolver:
        for _ in range(2):
            with pytest.raises(WorkerConnectError, match="has expired"):
                resolver.get_flight_client_for_url(server.url)
        files.replace(signer.issue(SECOND))
        tls.rotate()
        assert identity(resolver, server.url) == SECOND


def test_a_failure_of_before_that_comes_late_is_not_remembered(
    connector_class, server, tmp_path, signer
) -> None:
    class Slow(connector_class):
        def connect(self, url: str) -> Any:
            try:
                return super().connect(url)
            finally:
                if not reached.is_set():
                    reached.set()
                    assert go_on.wait(30)

    reached, go_on = threading.Event(), threading.Event()
    files = PemFiles(tmp_path, signer.issue(FIRST, ends_in=-1.0))
    tls = TlsConfig(
        root_certificates=signer.root, client_certificate=files.certificate, client_key=files.key
    )
    with DefaultChannelResolver(Slow(tls=tls), failure_ttl=3_600) as resolver:
        looking_up = Background(lambda: resolver.get_flight_client_for_url(server.url))
        assert reached.wait(30)
        files.replace(signer.issue(SECOND))
        tls.rotate()
        go_on.set()
        with pytest.raises(WorkerConnectError):
            looking_up.result()
        assert identity(resolver, server.url) == SECOND


def test_a_first_reading_by_others_holds_nobody_up_beyond_the_deadline(
    connector_class, server, signer
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> bytes:
        begun.set()
        assert go_on.wait(30)
        return signer.root

    connector = connector_class(tls=TlsConfig(root_certificates=slow), connect_timeout=0.2)
    with DefaultChannelResolver(connector) as resolver:
        first = Background(lambda: resolver.prefetch([server.url]))
        assert begun.wait(30)
        with pytest.raises(WorkerConnectError, match="in time"):
            resolver.get_flight_client_for_url("https://127.0.0.1:1")
        go_on.set()
        first.result()


def test_asyncio_clients_rotate_too(server, tls, files, signer) -> None:
    pytest.importorskip("grpc")
    from resolver import aio

    async def main() -> None:
        async with aio.DefaultChannelResolver(aio.GrpcConnector(tls=tls)) as resolver:
            assert await aio_identity(resolver, server.url) == FIRST
            client = await resolver.get_flight_client_for_url(server.url)
            stream = await client.do_get(flight.Ticket(b"200"))
            rows = (await anext(aiter(stream))).data.num_rows
            files.replace(signer.issue(SECOND))
            await until(lambda: resolver.urls() == [])
            assert await aio_identity(resolver, server.url) == SECOND
            assert await resolver.get_flight_client_for_url(server.url) is not client
            rows += sum([chunk.data.num_rows async for chunk in stream])
            assert rows == 200 * 1_024

    asyncio.run(asyncio.wait_for(main(), 60))


def test_asyncio_callers_never_fail_while_credentials_rotate(server, tls, files, signer) -> None:
    pytest.importorskip("grpc")
    from resolver import aio

    names = [f"client-{number}@workers.example" for number in range(5)]

    async def main() -> set[str]:
        async with aio.DefaultChannelResolver(aio.GrpcConnector(tls=tls)) as resolver:
            assert await aio_identity(resolver, server.url) == FIRST
            done = asyncio.Event()

            async def call_on() -> set[str]:
                seen = set()
                while not done.is_set():
                    seen.add(await aio_identity(resolver, server.url))
                return seen

            callers = [asyncio.create_task(call_on()) for _ in range(8)]
            try:
                for name in names:
                    files.certificate.write_bytes(signer.issue("half@a.pair").certificate)
                    tls.refresh()  # a look at what does not fit together
                    files.replace(signer.issue(name))
                    tls.rotate()
                    assert await aio_identity(resolver, server.url) == name
            finally:
                done.set()
            return set().union(*await asyncio.gather(*callers))

    seen = asyncio.run(asyncio.wait_for(main(), 60))
    assert seen <= {FIRST, *names}
    assert names[-1] in seen
