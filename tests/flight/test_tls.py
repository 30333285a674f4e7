"""TLS and mutual TLS: who is let in, and which of the many failures it was."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pyarrow import flight

from resolver import DefaultChannelResolver, FlightConnector, WorkerConnectError
from resolver.testing import FlightServerProcess


def fails(connector: FlightConnector, url: str) -> str:
    """The message of the connect error, which must come in time and keep secrets."""
    started = time.monotonic()
    with pytest.raises(WorkerConnectError) as caught:
        connector.connect(url)
    assert time.monotonic() - started <= connector.connect_timeout + 0.5
    message = str(caught.value)
    assert url in message
    assert "BEGIN" not in message
    assert "BEGIN" not in str(caught.value.__cause__)
    return message


def test_trusted_authority(tls_server: FlightServerProcess, authority: Any) -> None:
    connector = FlightConnector(tls_root_certificates=authority.root)
    assert connector.connect(tls_server.url).list_actions()


@pytest.mark.parametrize("scheme", ["https", "grpc+tls"])
def test_every_tls_spelling_reaches_one_client(
    scheme: str, tls_server: FlightServerProcess, authority: Any
) -> None:
    with DefaultChannelResolver(FlightConnector(tls_root_certificates=authority.root)) as resolver:
        client = resolver.get_flight_client_for_url(f"{scheme}://127.0.0.1:{tls_server.port}/")
        assert resolver.get_flight_client_for_url(tls_server.url) is client
        assert resolver.urls() == [tls_server.url]


def test_wrong_authority(tls_server: FlightServerProcess, stranger: Any) -> None:
    message = fails(FlightConnector(tls_root_certificates=stranger.root), tls_server.url)
    assert "tls_root_certificates" in message


def test_authority_unknown_to_the_system(tls_server: FlightServerProcess) -> None:
    assert "tls_root_certificates" in fails(FlightConnector(), tls_server.url)


def test_wrong_host_name(tls_server: FlightServerProcess, authority: Any) -> None:
    connector = FlightConnector(
        tls_root_certificates=authority.root, tls_override_hostname="w1.example"
    )
    assert "another host name" in fails(connector, tls_server.url)


def test_overridden_host_name(tls_server: FlightServerProcess, authority: Any) -> None:
    connector = FlightConnector(
        tls_root_certificates=authority.root, tls_override_hostname="localhost"
    )
    assert connector.connect(tls_server.url).list_actions()


def test_disabled_verification(tls_server: FlightServerProcess) -> None:
    connector = FlightConnector(disable_server_verification=True)
    assert connector.connect(tls_server.url).list_actions()


def test_plaintext_to_a_tls_port(tls_server: FlightServerProcess) -> None:
    url = f"http://127.0.0.1:{tls_server.port}"
    assert "use https://" in fails(FlightConnector(), url)


def test_tls_to_a_plaintext_port(plain_server: FlightServerProcess, authority: Any) -> None:
    url = f"https://127.0.0.1:{plain_server.port}"
    connector = FlightConnector(tls_root_certificates=authority.root)
    assert "use http://" in fails(connector, url)


def test_mutual_tls(mtls_server: FlightServerProcess, authority: Any) -> None:
    connector = FlightConnector(
        tls_root_certificates=authority.root,
        client_certificate=authority.client_certificate,
        client_key=authority.client_key,
    )
    assert connector.connect(mtls_server.url).list_actions()


def test_missing_client_certificate(mtls_server: FlightServerProcess, authority: Any) -> None:
    connector = FlightConnector(tls_root_certificates=authority.root)
    assert "client_certificate" in fails(connector, mtls_server.url)


def test_client_certificate_of_a_stranger(
    mtls_server: FlightServerProcess, authority: Any, stranger: Any
) -> None:
    connector = FlightConnector(
        tls_root_certificates=authority.root,
        client_certificate=stranger.client_certificate,
        client_key=stranger.client_key,
    )
    assert "client_certificate" in fails(connector, mtls_server.url)


@pytest.mark.parametrize(
    "options",
    [
        {"tls_root_certificates": b"-----BEGIN CERTIFICATE-----\nno\n"},
        {"client_certificate": b"-----BEGIN no", "client_key": b"-----BEGIN no"},
    ],
    ids=["roots", "client pair"],
)
def test_credentials_that_cannot_be_loaded(
    options: dict[str, Any], tls_server: FlightServerProcess
) -> None:
    assert "could not be loaded" in fails(FlightConnector(**options), tls_server.url)


def test_key_that_belongs_to_another_certificate(
    mtls_server: FlightServerProcess, authority: Any, stranger: Any
) -> None:
    connector = FlightConnector(
        tls_root_certificates=authority.root,
        client_certificate=authority.client_certificate,
        client_key=stranger.client_key,
    )
    assert "could not be loaded" in fails(connector, mtls_server.url)


def test_one_connector_serves_a_mixed_fleet(
    plain_server: FlightServerProcess, tls_server: FlightServerProcess, authority: Any
) -> None:
    connector = FlightConnector(
        tls_root_certificates=authority.root,
        client_certificate=authority.client_certificate,
        client_key=authority.client_key,
    )
    with DefaultChannelResolver(connector) as resolver:
        for server in (plain_server, tls_server):
            client = resolver.get_flight_client_for_url(server.url)
            assert client.do_get(flight.Ticket(b"1")).read_all().num_rows == 1_024
