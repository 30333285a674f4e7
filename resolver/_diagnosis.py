"""From gRPC's words to a reason and a remedy that a person can act on.

Pure functions over text. The patterns are fragments of messages of the gRPC that
pyarrow carries; a message that none of them knows is passed on as it is, so a change
of wording costs clarity, never correctness.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_DETAIL: Final = 300
_LAST_ERROR = re.compile(r"last error: [A-Z_]+: (?P<detail>.*)", re.DOTALL)
_NOISE = re.compile(r"Flight returned \w+ error, with message: ")

_NO_CHANNEL = re.compile(
    r"(?:Flight returned [\w ]+ error, with message: )?Failed to create channel to '[^']*':"
    r"\s*(?P<why>.*?)(?:\. gRPC client debug context: .*)?",
    re.DOTALL,
)
_ARROW_CODE = re.compile(r"Detail: (?:Unavailable|TimedOut)\b")
_FROM_TRANSPORT: Final = "failed to connect to all addresses"

_CHECK_ANSWER: Final = "check the worker and any proxy in front of it"
_CHECK_WORKER: Final = "check that the worker runs and that host and port are right"


class Diagnosis(NamedTuple):
    """Why a worker could not be reached, and what its user can do."""

    reason: str
    remedy: str


_ANY_TRANSPORT: Final = (
    ("connection refused", Diagnosis("connection refused", _CHECK_WORKER)),
    ("no such file or directory", Diagnosis("there is no such socket", _CHECK_WORKER)),
    (
        "permission denied",
        Diagnosis("permission denied", "check the rights of the socket or the firewall"),
    ),
    ("no route to host", Diagnosis("no route to the host", "check network and firewall")),
    ("network is unreachable", Diagnosis("network unreachable", "check network and firewall")),
)
_UNRESOLVED: Final = Diagnosis(
    "its host name does not resolve", "check the spelling and this machine's name service"
)
_CLOSED_UNDER_TLS: Final = Diagnosis(
    "it closed the connection during or right after the TLS handshake",
    "pass client_certificate and client_key if it asks for them, and check that the port is "
    "a Flight worker's",
)
OTHER_NAME: Final = Diagnosis(
    "its certificate is for another host name",
    "use that name in the URL, or pass it as override_hostname (tls_override_hostname)",
)
_TLS: Final = (
    (
        "empty address list",
        Diagnosis(
            "the TLS roots, client certificate or client key could not be loaded",
            "check that they are PEM and that the key belongs to the certificate",
        ),
    ),
    (
        "wrong version number",
        Diagnosis("it does not speak TLS", "use http:// if the worker is a plaintext one"),
    ),
    (
        "certificate verify failed",
        Diagnosis(
            "its certificate was not accepted",
            "pass the authority that signed it as tls_root_certificates and check its dates",
        ),
    ),
    ("is not in peer certificate", OTHER_NAME),
    ("hostname verification check failed", OTHER_NAME),
    (
        "missing selected alpn",
        Diagnosis(
            "it speaks TLS, but not HTTP/2 as gRPC does",
            "check that the port is a Flight worker's, and any proxy in front of it",
        ),
    ),
    ("socket closed", _CLOSED_UNDER_TLS),
    ("connection reset", _CLOSED_UNDER_TLS),
)
_ALERTS: Final = ("handshake failed", "unwrap failed")
"""Of a handshake that the other side ended: why, only a closer look can tell."""
_OTHER_PROTOCOL: Final = (
    "use https:// if the worker has TLS, else check that the port is a Flight worker's"
)
_CLOSED: Final = Diagnosis("it closed the connection before speaking gRPC", _OTHER_PROTOCOL)
_PLAINTEXT: Final = (
    ("socket closed", _CLOSED),
    ("connection reset", _CLOSED),
    ("http/2", Diagnosis("it does not speak gRPC", _OTHER_PROTOCOL)),
)


def is_about_tls(message: str, *, tls: bool) -> bool:
    """Whether a closer look at TLS may tell more than this message of an ``UNAVAILABLE``."""
    if "errors resolving" in message or "DNS resolution failed" in message:
        return False
    text = _searched(message)
    if tls and any(fragment in text for fragment in _ALERTS):
        return True
    return any(fragment in text for fragment, _ in (_TLS if tls else _PLAINTEXT))


def transport_detail(message: str) -> str:
    """Return the part of a gRPC message that tells what happened, bounded in length."""
    last = _LAST_ERROR.search(message)
    detail = last.group("detail") if last else _NOISE.sub("", message)
    detail = " ".join(detail.split())
    return detail if len(detail) <= _MAX_DETAIL else detail[:_MAX_DETAIL] + "..."


def _searched(message: str) -> str:
    # pyarrow's gRPC and grpcio's do not agree on how to write the names of OpenSSL's errors.
    return transport_detail(message).lower().replace("_", " ")


def is_workers_answer(message: str) -> bool:
    """Whether a Flight server itself made this status: only those carry Arrow's own code."""
    return not message.startswith("Flight returned ") and bool(_ARROW_CODE.search(message))


def why_no_channel(message: str) -> str | None:
    """Why gRPC made no channel, which it says as if a call had been answered; ``None``: it did."""
    found = _NO_CHANNEL.fullmatch(message)
    return None if found is None else transport_detail(found.group("why"))


def is_attempt_timeout(message: str) -> bool:
    """Whether gRPC gave up a connection attempt of its own after its time."""
    return _FROM_TRANSPORT in message and "timed out" in transport_detail(message)


def explain_unavailable(
    message: str, *, tls: bool, redact: Callable[[str], str] = str
) -> Diagnosis:
    """Explain the message of an ``UNAVAILABLE`` status; an unknown one is quoted redacted."""
    # A name lookup fails in many words, but always in front of any address.
    if "errors resolving" in message or "DNS resolution failed" in message:
        return _UNRESOLVED
    text = _searched(message)
    for fragment, diagnosis in _ANY_TRANSPORT + (_TLS if tls else _PLAINTEXT):
        if fragment in text:
            return diagnosis
    detail = transport_detail(redact(message))
    if _FROM_TRANSPORT in message or not detail:
        return Diagnosis(detail or "unavailable", _CHECK_WORKER)
    return Diagnosis(f"the call was answered UNAVAILABLE: {detail}", _CHECK_ANSWER)
