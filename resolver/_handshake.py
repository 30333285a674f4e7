"""What exactly is wrong with TLS between here and a worker, found out by one handshake.

gRPC words most of these failures alike. So after a connect has failed, and within what is
left of its deadline, the standard library shakes hands once more and tells them apart. No
call is made, and nothing is concluded from a handshake that works.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Final

from ._diagnosis import OTHER_NAME, Diagnosis, is_about_tls
from ._pem import Credentials, load_pair

if TYPE_CHECKING:
    import ssl

    from ._urls import WorkerUrl

__all__ = ["look_at_tls"]

_ANSWER: Final = 1.0  # seconds in which a server refuses a certificate, or speaks HTTP/2
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"

# Codes of X509_verify_cert.
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY: Final = frozenset({2, 18, 19, 20, 21})
_FOR_OTHER_NAME: Final = frozenset({62, 64})

_SPEAKS_TLS: Final = Diagnosis("it speaks TLS", "use https:// for it")
_SPEAKS_NO_TLS: Final = Diagnosis(
    "it does not speak TLS", "use http:// if the worker is a plaintext one"
)
_WORKER: Final = {
    "expired": Diagnosis(
        "its certificate has expired", "renew it at the worker, or check this machine's clock"
    ),
    "early": Diagnosis(
        "its certificate is not valid yet", "check the clocks of the worker and of this machine"
    ),
    "authority": Diagnosis(
        "its certificate is signed by an authority that is not trusted here",
        "pass that authority as root_certificates (tls_root_certificates)",
    ),
    "name": OTHER_NAME,
}
_MISSING: Final = Diagnosis(
    "it ended the connection right after the handshake; most likely it asks for a client "
    "certificate, and none was given",
    "pass client_certificate and client_key",
)
_RENEW: Final = "renew client_certificate and client_key; a TlsConfig notices renewed files"
_EXPIRED_HERE: Final = Diagnosis("it refused the client certificate, which has expired", _RENEW)
_EARLY_HERE: Final = Diagnosis(
    "it refused the client certificate, which is not valid yet", "check this machine's clock"
)
_UNTRUSTED_HERE: Final = Diagnosis(
    "it refused the client certificate, which is within its dates: most likely it does not "
    "trust the authority that signed it",
    "pass a client_certificate of an authority that the worker trusts",
)


def look_at_tls(
    worker: WorkerUrl,
    message: str,
    credentials: Credentials | None,
    override_hostname: str | None,
    timeout: float,
    *,
    verify: bool = True,
) -> Diagnosis | None:
    """Why a connect failed with gRPC's ``message``; ``None`` if that is no matter of TLS.

    Blocks for at most ``timeout`` seconds, a slow name server included.
    """
    if not worker.host or timeout <= 0 or not is_about_tls(message, tls=worker.is_tls):
        return None
    found: list[Diagnosis | None] = []

    def look() -> None:
        with contextlib.suppress(Exception):  # whatever it is: gRPC's own words will do
            until = time.monotonic() + timeout
            found.append(_look(worker, credentials, override_hostname, until, verify))

    thread = threading.Thread(target=look, name="resolver-handshake", daemon=True)
    thread.start()
    thread.join(timeout)
    return found[0] if found else None


def _look(
    worker: WorkerUrl,
    credentials: Credentials | None,
    name: str | None,
    deadline: float,
    verify: bool,
) -> Diagnosis | None:
    import socket  # noqa: PLC0415 -- nobody needs these until something is wrong
    import ssl  # noqa: PLC0415

    class Connection(ssl.SSLSocket):
        """Closed even if the peer resets it while it is made, and nobody gets it."""

        def __del__(self) -> None:
            self.close()

    host = worker.host.strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = Connection
    context.set_alpn_protocols(["h2"])
    if credentials is not None:
        _trust(context, credentials)
    if credentials is None or not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((host, worker.port), deadline - time.monotonic()) as plain:
        plain.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            with context.wrap_socket(plain, server_hostname=name or host) as connection:
                if not worker.is_tls:
                    return _SPEAKS_TLS
                if connection.selected_alpn_protocol() != "h2":
                    return None
                connection.settimeout(max(min(deadline - time.monotonic(), _ANSWER), 0.001))
                return _of_silence(credentials) if _closes(connection) else None
        except ssl.SSLCertVerificationError as error:
            return _of_worker(error)
        except ssl.SSLError as error:
            return _of_refusal(error, worker, credentials)
        except ConnectionError:
            return None


def _closes(connection: ssl.SSLSocket) -> bool:
    """Whether a server of HTTP/2 ends the connection instead of speaking it.

    In TLS 1.3 a client has shaken hands before it is known what the server thinks of its
    certificate. gRPC's server then closes the connection, and most say nothing.
    """
    import ssl  # noqa: PLC0415 -- loaded already

    try:
        connection.sendall(_PREFACE)
        return not connection.recv(1)
    except (ConnectionError, ssl.SSLEOFError):  # the latter of what it was too late to send
        return True


def _trust(context: ssl.SSLContext, credentials: Credentials) -> None:
    if credentials.root_certificates is None:
        context.load_default_certs()
    else:
        roots = credentials.root_certificates.decode("ascii", "ignore")
        context.load_verify_locations(cadata=roots)
    if credentials.client_certificate is not None and credentials.client_key is not None:
        load_pair(context, credentials.client_certificate, credentials.client_key)


def _of_worker(error: ssl.SSLCertVerificationError) -> Diagnosis | None:
    code = error.verify_code
    if code == _EXPIRED:
        return _WORKER["expired"]
    if code == _NOT_YET_VALID:
        return _WORKER["early"]
    if code in _UNKNOWN_AUTHORITY:
        return _WORKER["authority"]
    return _WORKER["name"] if code in _FOR_OTHER_NAME else None


def _of_refusal(
    error: ssl.SSLError, worker: WorkerUrl, credentials: Credentials | None
) -> Diagnosis | None:
    reason: str = error.reason or ""
    if "ALERT" not in reason:
        no_tls = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}
        return _SPEAKS_NO_TLS if worker.is_tls and reason in no_tls else None
    if not worker.is_tls:
        return _SPEAKS_TLS
    about_ours = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE")
    return _of_silence(credentials) if any(word in reason for word in about_ours) else None


def _of_silence(credentials: Credentials | None) -> Diagnosis:
    """Why a server that asks for client certificates ends a connection."""
    if credentials is None or credentials.client_certificate is None:
        return _MISSING
    return {_EXPIRED: _EXPIRED_HERE, _NOT_YET_VALID: _EARLY_HERE}.get(
        _code_of_own(credentials), _UNTRUSTED_HERE
    )


def _code_of_own(credentials: Credentials) -> int:
    """What is wrong with the client certificate, to one who trusts its issuer; 0: nothing.

    Found by a handshake in memory with ourselves: the standard library reads no certificates
    in any other way.
    """
    import ssl  # noqa: PLC0415 -- loaded already

    pair = credentials.client_certificate or b"", credentials.client_key or b""
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    for context in server, client:
        load_pair(context, *pair)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    server.load_verify_locations(cadata=pair[0].decode("ascii", "ignore"))
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(there, here, server_side=True),
        client.wrap_bio(here, there, server_side=False),
    ]
    for _ in range(4):  # flights of a handshake
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_code
    return 0
