"""Who may reach a worker."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.flight as flight
import pytest
import trustme

from resolver import DefaultChannelResolver, FlightConnector, InvalidWorkerUrlError
from resolver.distributed import (
    DistributedError,
    DistributedPhysicalOptimizerRule,
    InsecureListenError,
    SessionContext,
    SessionStateBuilder,
    StaticWorkerResolver,
    Worker,
)
from resolver.distributed._listen import CallMiddleware, Guard, ListenAddress
from tests.support.distributed import rows

TOKEN = "correct horse battery staple"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority):
    return authority.issue_cert("127.0.0.1", "localhost")


def pem(certificate):
    return b"".join(blob.bytes() for blob in certificate.cert_chain_pems)


@pytest.fixture
def tls(certificate):
    return {
        "tls_certificate": pem(certificate),
        "tls_key": certificate.private_key_pem.bytes(),
    }


@pytest.mark.parametrize(
    "location",
    ["grpc://0.0.0.0:0", "grpc://[::]:0", "http://10.0.0.7:50051", "grpc://example.com:1"],
)
def test_other_machines_need_tls_and_a_secret(location, tls):
    for guard in (Guard(), Guard(token=TOKEN), Guard(**tls)):
        with pytest.raises(InsecureListenError, match="insecure=True") as refused:
            ListenAddress.parse(location, guard)
        assert f":{location.rpartition(':')[2]} can be reached" in str(refused.value)
    secure, plain = "https://worker7.example:1", "http://worker7.example:1"
    ListenAddress.parse(location, Guard(**tls, token=TOKEN), advertise=secure)
    ListenAddress.parse(location, Guard(**tls, client_ca=b"ca"), advertise=secure)
    ListenAddress.parse(location, Guard(), insecure=True, advertise=plain)


@pytest.mark.parametrize(
    "location", ["grpc://0.0.0.0:0", "grpc://[::]:0", "grpc://[::ffff:0.0.0.0]:0"]
)
def test_an_address_that_nobody_can_call_is_not_announced(location):
    with pytest.raises(ValueError, match=r"advertise=.grpc://HOST:PORT"):
        ListenAddress.parse(location, Guard(), insecure=True)
    with pytest.raises(ValueError, match="cannot be advertised"):
        ListenAddress.parse(location, Guard(), insecure=True, advertise=location)
    with pytest.raises(ValueError, match="TLS"):
        ListenAddress.parse(location, Guard(), insecure=True, advertise="https://worker7.example:1")
    for port, url in (("7", "http://worker7.example:7"), ("0", "http://worker7.example:5005")):
        address = ListenAddress.parse(
            location, Guard(), insecure=True, advertise=f"grpc://worker7.example:{port}"
        )
        assert address.worker_url(5005, Guard()) == url


@pytest.mark.parametrize(
    "location",
    [
        "grpc://127.0.0.1:0",
        "http://127.8.9.1:5005",
        "grpc://[::1]:0/",
        "http://localhost:0",
        "grpc+unix:///tmp/worker:0",
        flight.Location.for_grpc_tcp("127.0.0.1", 0),
    ],
)
def test_this_machine_needs_nothing(location):
    ListenAddress.parse(location, Guard())


@pytest.mark.parametrize("location", ["", "127.0.0.1:0", "ftp://127.0.0.1:0", None, "grpc://:0"])
def test_what_is_no_address_is_refused(location):
    with pytest.raises(InvalidWorkerUrlError):
        ListenAddress.parse(location, Guard())


def test_a_tls_url_needs_a_certificate():
    with pytest.raises(InsecureListenError, match="tls_certificate"):
        ListenAddress.parse("https://127.0.0.1:0", Guard(), insecure=True)


@pytest.mark.parametrize("guard", [{}, {"token": TOKEN}, {"client_ca": b"ca"}])
def test_a_unix_socket_is_not_taken_for_one_with_tls(tls, guard):
    with pytest.raises(ValueError, match="Unix socket, which has no TLS"):
        ListenAddress.parse("grpc+unix:///tmp/worker", Guard(**tls, **guard))
    ListenAddress.parse("grpc+unix:///tmp/worker", Guard(token=TOKEN))


@pytest.mark.parametrize(
    "options",
    [{"tls_key": b"k"}, {"tls_certificate": b"c"}, {"client_ca": b"ca"}, {"token": ""}],
)
def test_half_a_guard_is_refused(options):
    with pytest.raises(ValueError, match=r"tls_certificate|empty"):
        Guard(**options)


def test_secrets_are_in_no_repr(tls):
    guard = Guard(**tls, token=TOKEN)
    assert TOKEN not in repr(guard)
    assert "PRIVATE KEY" not in repr(guard)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": []},
        {"authorization": ["Bearer wrong"]},
        {"authorization": [TOKEN]},
        {"authorization": [f"Bearer {TOKEN}", f"Bearer {TOKEN}"]},
        {"authorization": [f"Bearer {TOKEN}x"]},
        {"authorization": ["Bearer \xfc"]},
    ],
)
def test_a_call_without_the_token_is_refused(headers):
    with pytest.raises(flight.FlightUnauthenticatedError) as refused:
        CallMiddleware(TOKEN).start_call(None, headers)
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"Bearer {TOKEN}".encode()])
def test_the_token_is_not_among_the_headers(value):
    call = CallMiddleware(TOKEN).start_call(
        None, {"authorization": [value], "X-Tenant": ["a"], "trace-bin": [b"\x00"], "empty": []}
    )
    assert call.headers == {"x-tenant": "a"}


def session(url, connector, register):
    state = (
        SessionStateBuilder()
        .with_distributed_worker_resolver(StaticWorkerResolver([url]))
        .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
        .with_distributed_channel_resolver(DefaultChannelResolver(connector))
        .build()
    )
    session = SessionContext(state)
    register(session)
    return session


def test_a_query_over_tls_with_a_token(tls, authority, register, single, tmp_path):
    query = "SELECT l_shipmode, count(*) FROM lineitem GROUP BY 1"
    roots = authority.cert_pem.bytes()
    with Worker().into_flight_server(
        "https://127.0.0.1:0", exchange_dir=tmp_path, token=TOKEN, **tls
    ) as server:
        assert server.url.startswith("https://")
        assert server.location.startswith("grpc+tls://")
        let_in = FlightConnector(
            tls_root_certificates=roots, headers={"authorization": f"Bearer {TOKEN}"}
        )
        table = session(server.url, let_in, register).sql(query).to_arrow_table()
        assert rows(table) == rows(single.sql(query).to_arrow_table())
        refused = session(server.url, FlightConnector(tls_root_certificates=roots), register)
        with pytest.raises(DistributedError, match="did not let us in") as error:
            refused.sql(query).collect()
        assert server.url in str(error.value)
        assert TOKEN not in str(error.value)


def test_a_query_with_client_certificates(tls, authority, certificate, register, tmp_path):
    roots = authority.cert_pem.bytes()
    client = authority.issue_cert("coordinator.example")
    with Worker().into_flight_server(
        "grpc+tls://127.0.0.1:0", exchange_dir=tmp_path, client_ca=roots, **tls
    ) as server:
        options = {
            "tls_root_certs": roots,
            "cert_chain": pem(client),
            "private_key": client.private_key_pem.bytes(),
        }
        with flight.connect(server.location, **options) as known:
            assert known.list_actions()
        with (
            flight.connect(server.location, tls_root_certs=roots) as stranger,
            pytest.raises(pa.ArrowException),
        ):
            list(stranger.list_actions())
