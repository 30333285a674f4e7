"""A worker whose certificate, key or authorities change while it serves."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import signal
import socket
import ssl
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datafusion
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import flight

from resolver import DefaultChannelResolver, FlightConnector, TlsConfig, WorkerConnectError
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    SessionContext,
    SessionStateBuilder,
    StaticWorkerResolver,
    Worker,
    _listener,
)
from tests.support.certificates import PemFiles, Signer
from tests.support.distributed import rows
from tests.support.threads import wait_until

QUERY = "SELECT k % 7 AS g, count(*) AS n, sum(k) AS s FROM t GROUP BY 1"
_NEVER = 3_600.0  # as check_interval: whoever tests says when


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer()


@pytest.fixture
def files(tmp_path, signer) -> PemFiles:
    return PemFiles(tmp_path, signer.issue())


@pytest.fixture
def tls(files, signer) -> TlsConfig:
    """What the workers of a test have: a certificate for callers, and trust in each other."""
    return TlsConfig(
        server_certificate=files.certificate,
        server_key=files.key,
        root_certificates=signer.root,
        check_interval=_NEVER,
    )


@pytest.fixture
def server(tls, tmp_path) -> Iterator[Any]:
    with serving(tls, tmp_path) as server:
        yield server


@contextlib.contextmanager
def serving(tls: TlsConfig, folder: Path) -> Iterator[Any]:
    with (
        Worker()
        .with_slots(1)
        .into_flight_server("https://127.0.0.1:0", exchange_dir=folder, tls=tls) as server
    ):
        yield server


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("table")
    for part in range(4):
        pq.write_table(
            pa.table({"k": range(part * 10_000, (part + 1) * 10_000)}), folder / f"{part}.parquet"
        )
    return str(folder)


def session(urls: list[str], resolver: DefaultChannelResolver, table: str) -> SessionContext:
    ctx = SessionContext(
        SessionStateBuilder()
        .with_distributed_worker_resolver(StaticWorkerResolver(urls))
        .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
        .with_distributed_channel_resolver(resolver)
        .with_distributed_option("scan_bytes_per_task", 0)
        .with_distributed_option("bytes_per_task", 0)
        .with_distributed_option("broadcast_threshold", 0)
        .build()
    )
    ctx.register_parquet("t", table)
    return ctx


def shown(port: int) -> bytes:
    """The certificate that a new connection is shown, as DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain) as secure,
    ):
        certificate = secure.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def seen(port: int) -> bytes | None:
    """The same, or ``None`` while nobody answers there."""
    with contextlib.suppress(OSError):
        return shown(port)
    return None


def first(pem: bytes) -> bytes:
    end = b"-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert((pem.partition(end)[0] + end).decode())


def is_serving(connector: FlightConnector, url: str) -> bool:
    with DefaultChannelResolver(connector) as resolver:
        (answer,) = resolver.get_flight_client_for_url(url).do_action("resolver.health")
        return json.loads(answer.body.to_pybytes()) == {"status": "serving"}


def test_new_connections_are_shown_the_new_certificate(server, files, tls, signer):
    assert shown(server.port) == first(files.certificate.read_bytes())
    port = server.port
    for _ in range(3):
        fresh = signer.issue()
        files.replace(fresh)
        server.renew_certificate()
        assert shown(port) == first(fresh.certificate)
        assert is_serving(FlightConnector(tls_root_certificates=signer.root), server.url)
    assert server.port == port


def test_a_changed_file_is_noticed(tmp_path, files, signer):
    tls = TlsConfig(server_certificate=files.certificate, server_key=files.key, check_interval=0.05)
    with serving(tls, tmp_path) as server:
        fresh = signer.issue()
        files.replace(fresh)
        wait_until(lambda: seen(server.port) == first(fresh.certificate))


def test_a_worker_outlives_its_first_certificate(tmp_path, signer):
    """Its certificate ends within the test, the one after it does not."""
    files = PemFiles(tmp_path, signer.issue(ends_in=2.0))
    ended = datetime.now(UTC).timestamp() + 2.0
    tls = TlsConfig(
        server_certificate=files.certificate, server_key=files.key, check_interval=_NEVER
    )
    connector = FlightConnector(tls_root_certificates=signer.root)
    with serving(tls, tmp_path) as server:
        assert is_serving(connector, server.url)
        wait_until(lambda: datetime.now(UTC).timestamp() > ended)
        with pytest.raises(WorkerConnectError, match="expired"):
            is_serving(connector, server.url)
        files.replace(signer.issue())
        server.renew_certificate()
        assert is_serving(connector, server.url)


def test_other_authorities_are_asked_for(tmp_path, files, signer):
    other = Signer()
    trusted = [signer.root]
    tls = TlsConfig(
        server_certificate=files.certificate,
        server_key=files.key,
        client_authorities=lambda: trusted[0],
        check_interval=_NEVER,
    )
    old, new = (
        FlightConnector(
            tls=TlsConfig(root_certificates=signer.root, **who.issue("a@b.example").as_client())
        )
        for who in (signer, other)
    )
    with serving(tls, tmp_path) as server:
        assert is_serving(old, server.url)
        with pytest.raises(WorkerConnectError, match="refused the client certificate"):
            is_serving(new, server.url)
        trusted[0] = other.root
        server.renew_certificate()
        assert is_serving(new, server.url)
        with pytest.raises(WorkerConnectError, match="refused the client certificate"):
            is_serving(old, server.url)


def test_a_stream_under_way_runs_to_its_end(server, files, signer, monkeypatch):
    """It began on the server of before, and has batches left when that has given up the port."""
    sent, go_on = threading.Event(), threading.Event()
    schema = pa.schema([("n", pa.int64())])

    def batches():
        yield pa.record_batch([[0]], schema=schema)
        sent.set()
        assert go_on.wait(30)
        yield pa.record_batch([[1]], schema=schema)

    def do_get(_ticket):
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, batches()))

    monkeypatch.setattr(server._calls, "do_get", do_get)
    with flight.connect(server.location, tls_root_certs=signer.root) as client:
        stream = client.do_get(flight.Ticket(b""))
        assert sent.wait(30)
        fresh = signer.issue()
        files.replace(fresh)
        server.renew_certificate()
        assert shown(server.port) == first(fresh.certificate)
        go_on.set()
        assert stream.read_all()["n"].to_pylist() == [0, 1]
        # The same client, whose connection the old server has ended, finds the new one.
        assert client.list_actions()


def test_queries_go_on_while_a_certificate_changes(tls, files, signer, table, tmp_path):
    """Every query gives its answer. Ten times a second is too often to keep the worker in all
    of them: a call that comes in the very moment is cut off, and its task runs on the other.
    """
    single = datafusion.SessionContext()
    single.register_parquet("t", table)
    expected = rows(single.sql(QUERY).to_arrow_table())
    still = TlsConfig(**signer.issue().as_tls_server(), root_certificates=signer.root)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.1):
            files.replace(signer.issue())
            tls.rotate()

    connector = FlightConnector(tls_root_certificates=signer.root)
    with (
        serving(tls, tmp_path) as one,
        serving(still, tmp_path) as two,
        DefaultChannelResolver(connector) as resolver,
    ):
        ctx = session([one.url, two.url], resolver, table)
        renewing = threading.Thread(target=renew)
        renewing.start()
        try:
            for _ in range(20):
                assert rows(ctx.sql(QUERY).to_arrow_table()) == expected
            wait_until(lambda: tls.generation > 3)
        finally:
            done.set()
            renewing.join(30)


def test_half_a_pair_changes_nothing(server, files, signer):
    before = first(files.certificate.read_bytes())
    files.certificate.write_bytes(signer.issue().certificate)  # its key is not written yet
    with pytest.raises(ValueError, match="could not be loaded together"):
        server.renew_certificate()
    assert shown(server.port) == before


def test_what_grpc_does_not_take_changes_nothing(server, files, signer, monkeypatch, caplog):
    before = first(files.certificate.read_bytes())

    def refuse(_guard):
        raise pa.ArrowInvalid("Server did not start properly")

    monkeypatch.setattr(_listener, "_try_out", refuse)
    files.replace(signer.issue())
    with caplog.at_level(logging.WARNING, "resolver"):
        server.renew_certificate()
    assert shown(server.port) == before
    assert "the one of before stays in use" in caplog.text


def test_rotating_what_is_the_same_does_not_touch_the_port(server):
    serving_before = server._listener._server
    server.renew_certificate()
    assert server._listener._server is serving_before


def test_a_lost_port_is_told(server, files, signer, monkeypatch, caplog):
    """Somebody else takes it in the moment when nobody listens there."""
    squatter = socket.socket()

    def take(host, port):
        with contextlib.suppress(OSError):
            squatter.bind((host, port))
            squatter.listen()
        return False

    monkeypatch.setattr(_listener, "_is_free", take)
    monkeypatch.setattr(_listener, "_RELEASE_PATIENCE", 0.5)
    files.replace(signer.issue())
    with squatter, caplog.at_level(logging.ERROR, "resolver"):
        server.renew_certificate()
        with pytest.raises(OSError, match=f"^{server.url}: the port was lost"):
            server.serve()
    assert isinstance(server.failure, OSError)
    assert "start the worker anew" in caplog.text


def test_a_config_keeps_no_server(tls, tmp_path):
    server = Worker().into_flight_server("https://127.0.0.1:0", exchange_dir=tmp_path, tls=tls)
    gone = weakref.ref(server)
    server.shutdown()
    del server
    gc.collect()
    assert gone() is None
    tls.rotate()


def test_a_server_that_is_shut_down_does_not_listen_again(tls, files, signer, tmp_path):
    server = Worker().into_flight_server("https://127.0.0.1:0", exchange_dir=tmp_path, tls=tls)
    server.shutdown()
    files.replace(signer.issue())
    server.renew_certificate()
    assert seen(server.port) is None


def test_a_process_renews_on_sighup(files, signer, table, tmp_path):
    """And is called, and calls others, with what the command line says."""
    ca, client = (
        tmp_path / "ca.pem",
        PemFiles(make(tmp_path / "client"), signer.issue("c@d.example")),
    )
    ca.write_bytes(signer.root)
    command = [sys.executable, "-m", "resolver", "worker", "--listen", "https://127.0.0.1:0"]
    command += ["--tls-certificate", files.certificate, "--tls-key", files.key]
    command += ["--client-ca", ca, "--tls-root-certs", ca]
    command += ["--client-certificate", client.certificate, "--client-key", client.key]
    command += ["--slots", "1", "--exchange-dir", make(tmp_path / "exchange")]
    caller = TlsConfig(
        root_certificates=ca, client_certificate=client.certificate, client_key=client.key
    )
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        ]
        try:
            urls = [json.loads(process.stdout.readline())["url"] for process in processes]
            resolver = stack.enter_context(DefaultChannelResolver(FlightConnector(tls=caller)))
            ctx = session(urls, resolver, table)
            assert ctx.sql(QUERY).count() == 7
            fresh = signer.issue()
            files.replace(fresh)
            for process in processes:
                process.send_signal(signal.SIGHUP)
            for url in urls:
                port = int(url.rpartition(":")[2])
                wait_until(lambda port=port: seen(port) == first(fresh.certificate))
            assert ctx.sql(QUERY).count() == 7
            files.certificate.write_bytes(signer.issue().certificate)
            for process in processes:
                process.send_signal(signal.SIGHUP)  # tells so, and changes nothing
            assert ctx.sql(QUERY).count() == 7
        finally:
            for process in processes:
                process.terminate()
        assert [process.wait(60) for process in processes] == [0, 0]


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder
