"""FlightConnector as a value: what it accepts, compares, prints and pickles; no network."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from pyarrow import flight

from resolver import (
    Connector,
    FlightConnector,
    InvalidWorkerUrlError,
    WorkerConnectError,
    _flight,
    _fork,
)
from resolver._diagnosis import explain_unavailable, transport_detail
from resolver._headers import CallHeadersFactory, normalize_headers
from resolver.testing import FakeConnector

PEM = b"-----BEGIN CERTIFICATE-----\nc2VjcmV0\n-----END CERTIFICATE-----\n"
KEY = b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"


class Quiet(flight.ClientMiddlewareFactory):  # type: ignore[misc]
    """Middleware that does nothing."""

    def start_call(self, info: flight.CallInfo) -> None:
        return None


def token() -> dict[str, str]:
    return {"authorization": "Bearer fresh"}


# -- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"connect_timeout": 0}, ValueError, "connect_timeout"),
        ({"connect_timeout": -1.0}, ValueError, "connect_timeout"),
        ({"connect_timeout": math.inf}, ValueError, "connect_timeout"),
        ({"connect_timeout": math.nan}, ValueError, "connect_timeout"),
        ({"connect_timeout": 86_401}, ValueError, "86400 s"),
        ({"connect_timeout": "5"}, TypeError, "seconds"),
        ({"connect_timeout": None}, TypeError, "seconds"),
        ({"connect_timeout": True}, TypeError, "seconds"),
        ({"tls_root_certificates": PEM.decode()}, TypeError, "tls_root_certificates"),
        ({"tls_root_certificates": b""}, ValueError, "not PEM"),
        ({"tls_root_certificates": b"\x30\x82"}, ValueError, "not PEM"),
        ({"client_certificate": PEM}, ValueError, "together"),
        ({"client_key": KEY}, ValueError, "together"),
        ({"client_certificate": PEM, "client_key": b"no"}, ValueError, "client_key is not PEM"),
        ({"disable_server_verification": 1}, TypeError, "bool"),
        (
            {"disable_server_verification": True, "tls_root_certificates": PEM},
            ValueError,
            "ignored",
        ),
        ({"tls_override_hostname": b"w"}, TypeError, "tls_override_hostname"),
        ({"tls_override_hostname": ""}, ValueError, "tls_override_hostname"),
        ({"middleware": Quiet()}, TypeError, "sequence"),
        ({"middleware": [Quiet]}, TypeError, "ClientMiddlewareFactory"),
        ({"middleware": [None]}, TypeError, "NoneType"),
        ({"write_size_limit_bytes": 0}, ValueError, "write_size_limit_bytes"),
        ({"write_size_limit_bytes": 1.5}, TypeError, "bytes"),
        ({"write_size_limit_bytes": True}, TypeError, "bytes"),
        ({"generic_options": {"grpc.x": None}}, TypeError, "grpc.x"),
        ({"generic_options": {"grpc.x": 1.5}}, TypeError, "grpc.x"),
        ({"generic_options": {b"grpc.x": 1}}, TypeError, "str"),
        ({"generic_options": {"grpc.x": 2**31}}, ValueError, "32 bits"),
        ({"headers": "authorization: x"}, TypeError, "mapping"),
        ({"connect_timeout": 10**400}, ValueError, "connect_timeout"),
        ({"generic_options": "ab"}, TypeError, "generic_options"),
        ({"generic_options": None}, TypeError, "generic_options"),
        ({"generic_options": [1]}, TypeError, "generic_options"),
        ({"headers": 5}, TypeError, "headers"),
        ({"headers": [1]}, TypeError, "headers"),
        ({"headers": {1: "x"}}, TypeError, "name"),
        ({"headers": {"": "x"}}, ValueError, "name"),
        ({"headers": {"a b": "x"}}, ValueError, "name"),
        ({"headers": {":path": "x"}}, ValueError, "name"),
        ({"headers": {"\u00e4": "x"}}, ValueError, "name"),
        ({"headers": {"\u212aey": "x"}}, ValueError, "name"),
        ({"headers": {"grpc-timeout": "1S"}}, ValueError, "belongs to gRPC"),
        ({"headers": {"Content-Type": "x"}}, ValueError, "belongs to gRPC"),
        ({"headers": {"a-bin": "text"}}, TypeError, "needs bytes"),
        ({"headers": {"a": b"bytes"}}, TypeError, "needs a str"),
        ({"headers": {"a": 1}}, TypeError, "needs a str"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        FlightConnector(**options)


@pytest.mark.parametrize("value", ["tok\u00e9n", "tok\nen", "token\n", " token", "tok\x00en", "\t"])
def test_an_illegal_header_value_is_named_but_not_shown(value: str) -> None:
    with pytest.raises(ValueError, match="authorization") as caught:
        FlightConnector(headers={"authorization": value})
    assert "tok" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        FlightConnector(5.0)  # type: ignore[misc]


def test_headers_are_normalised() -> None:
    pairs = (("A", "1"), ("x-BIN", b"\xff"), ("a", "2"), ("empty", ""))
    assert FlightConnector(headers=pairs).headers == (
        ("a", "1"), ("a", "2"), ("empty", ""), ("x-bin", b"\xff"),
    )  # fmt: skip


def test_later_generic_options_win() -> None:
    connector = FlightConnector(generic_options=[("grpc.b", 1), ("grpc.a", "x"), ("grpc.b", 2)])
    assert connector.generic_options == (("grpc.a", "x"), ("grpc.b", 2))


# -- a value -------------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "connect_timeout": 1.5,
    "headers": {"Authorization": "Bearer s3cret", "key-bin": b"s3cret"},
    "tls_root_certificates": PEM,
    "client_certificate": PEM,
    "client_key": KEY,
    "tls_override_hostname": "w1",
    "write_size_limit_bytes": 1_000,
    "generic_options": {"grpc.http_proxy": "http://u:s3cret@p", "grpc.y": 1},
}


def test_equal_options_make_equal_connectors() -> None:
    one = FlightConnector(**FULL)
    other = FlightConnector(
        **{
            **FULL,
            "headers": [("key-bin", b"s3cret"), ("authorization", "Bearer s3cret")],
            "generic_options": [("grpc.y", 1), ("grpc.http_proxy", "http://u:s3cret@p")],
        }
    )
    assert one == other
    assert hash(one) == hash(other)
    assert one != FlightConnector()


@pytest.mark.parametrize("name", FULL)
def test_every_option_counts_in_a_comparison(name: str) -> None:
    if name in ("client_certificate", "client_key"):
        rest = {k: v for k, v in FULL.items() if not k.startswith("client_")}
    else:
        rest = {k: v for k, v in FULL.items() if k != name}
    assert FlightConnector(**FULL) != FlightConnector(**rest)


def test_a_connector_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FlightConnector().connect_timeout = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("headers", [FULL["headers"], token, None])
def test_a_connector_survives_pickling_and_replacing(headers: Any) -> None:
    connector = FlightConnector(**{**FULL, "headers": headers})
    assert pickle.loads(pickle.dumps(connector)) == connector
    assert dataclasses.replace(connector, connect_timeout=1.5) == connector
    assert dataclasses.replace(connector, connect_timeout=2) != connector


def test_repr_shows_options_and_masks_secrets() -> None:
    shown = repr(FlightConnector(**FULL, middleware=[Quiet()]))
    for word in ("1.5", "authorization", "key-bin", "'w1'", "1000", "grpc.http_proxy", "Quiet"):
        assert word in shown
    for secret in ("s3cret", "Bearer", "c2VjcmV0", "BEGIN"):
        assert secret not in shown
    assert repr(FlightConnector()) == "FlightConnector(connect_timeout=5.0)"
    assert "callable token" in repr(FlightConnector(headers=token))
    assert "<lambda>" in repr(FlightConnector(headers=lambda: {"a": "1"}))


def test_both_connectors_fulfil_the_protocol() -> None:
    assert isinstance(FlightConnector(), Connector)
    assert isinstance(FakeConnector(), Connector)
    assert not isinstance(object(), Connector)


# -- connecting, as far as it goes without a network -----------------------------------------


def test_a_bad_url_is_refused_before_a_client_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fork, "_used_by", None)
    with pytest.raises(InvalidWorkerUrlError):
        FlightConnector().connect("http://w1:0")
    assert _fork._used_by is None


def test_options_that_pyarrow_refuses_are_a_connect_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such option")

    monkeypatch.setattr(_flight.flight, "FlightClient", refuse)
    with pytest.raises(WorkerConnectError, match="http://w1:5") as caught:
        FlightConnector().connect("grpc://w1:5")
    assert isinstance(caught.value.__cause__, ValueError)


# -- headers of a call -----------------------------------------------------------------------


def sent(factory: CallHeadersFactory) -> dict[str, Any]:
    return dict(factory.start_call(None).sending_headers())


def test_static_headers_are_grouped_by_name() -> None:
    factory = CallHeadersFactory(normalize_headers([("a", "1"), ("A", "2"), ("b-bin", b"\0")]))
    assert sent(factory) == {"a": ["1", "2"], "b-bin": [b"\0"]}


def test_a_callable_is_asked_for_every_call() -> None:
    tokens = iter("abc")
    factory = CallHeadersFactory(lambda: {"authorization": next(tokens)})
    assert [sent(factory)["authorization"] for _ in range(3)] == [["a"], ["b"], ["c"]]


def failing() -> dict[str, str]:
    raise LookupError("no token")


def interrupted() -> dict[str, str]:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("provider", "error"),
    [
        (failing, LookupError),
        (interrupted, KeyboardInterrupt),
        (lambda: {"authorization": "line\n"}, ValueError),
        (lambda: None, TypeError),
        (lambda: [1], TypeError),
    ],
)
def test_a_callable_that_fails_makes_the_call_illegal(
    provider: Callable[[], Any], error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    factory = CallHeadersFactory(provider)
    (name,) = sent(factory)
    assert " " in name, "gRPC must find this header illegal, or the call would leave"
    assert isinstance(factory.failure, error)
    assert "headers callable" in caplog.text


def test_a_callable_that_recovers_is_used_again() -> None:
    answers: list[Any] = [None, {"a": "1"}]
    factory = CallHeadersFactory(lambda: answers.pop(0))
    sent(factory)
    assert factory.failure is not None
    assert sent(factory) == {"a": ["1"]}
    assert factory.failure is None


def test_values_are_redacted_from_text() -> None:
    factory = CallHeadersFactory(normalize_headers({"a": "s3cret", "b-bin": b"\xffkey", "c": ""}))
    assert factory.redact("bad s3cret and \xffkey!") == "bad *** and ***!"
    assert factory.redact("bad /2tleQ== n") == "bad *** n"
    factory = CallHeadersFactory(normalize_headers({"a": "Bearer s3cret", "b": "n", "c": "err"}))
    assert factory.redact("n error: rejected s3cret") == "n error: rejected ***"


# -- words -----------------------------------------------------------------------------------

UNAVAILABLE = "Flight returned unavailable error, with message: "
FAILED = UNAVAILABLE + "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:5: "


@pytest.mark.parametrize(
    ("message", "tls", "says"),
    [
        (FAILED + "Failed to connect to remote host: Connection refused", False, "refused"),
        (FAILED + "Failed to connect to remote host: Connection refused", True, "refused"),
        (FAILED + "No such file or directory", False, "no such socket"),
        (FAILED + "Permission denied", False, "rights"),
        (FAILED + "No route to host", False, "route"),
        (FAILED + "Network is unreachable", False, "network"),
        (FAILED + "Socket closed", False, "https://"),
        (FAILED + "Socket closed", True, "client_certificate"),
        (FAILED + "Failed parsing HTTP/2", False, "does not speak gRPC"),
        (FAILED + "SSL routines::wrong version number", True, "http://"),
        (FAILED + "certificate verify failed: unable", True, "tls_root_certificates"),
        (FAILED + "Peer name w2 is not in peer certificate", True, "tls_override_hostname"),
        (UNAVAILABLE + "empty address list", True, "PEM"),
        (UNAVAILABLE + "errors resolving w1:5: [Domain name not found]", False, "resolve"),
        (UNAVAILABLE + "DNS resolution failed for w1:5", True, "resolve"),
        ("draining, come back later. Detail: Unavailable", False, "draining"),
        ("", False, "unavailable"),
    ],
)
def test_each_failure_has_a_reason_and_a_remedy(message: str, tls: bool, says: str) -> None:
    diagnosis = explain_unavailable(message, tls=tls)
    assert says in f"{diagnosis.reason}; {diagnosis.remedy}"
    assert diagnosis.reason
    assert diagnosis.remedy


def test_an_unknown_message_is_passed_on_within_bounds() -> None:
    assert transport_detail(FAILED + "something\n new") == "ipv4:127.0.0.1:5: something new"
    assert len(transport_detail("x" * 10_000)) < 400
