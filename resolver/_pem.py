"""PEM: certificates and keys as bytes, checked to be whole and to fit together.

Where they come from and when they change is ``_tls``'s business.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "PAIRS",
    "Credentials",
    "UnusableCredentialsError",
    "check_fit",
    "check_pem",
    "checked_hostname",
    "is_whole",
    "load_pair",
]

PAIRS: Final = (("client_certificate", "client_key"), ("server_certificate", "server_key"))
"""The fields of `Credentials` that are a certificate and its key."""

_MARK: Final = b"-----BEGIN "


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Credentials:
    """PEM that was read and found to fit together at one moment; ``None``: not configured."""

    root_certificates: bytes | None = None
    client_certificate: bytes | None = None
    client_key: bytes | None = None
    server_certificate: bytes | None = None
    server_key: bytes | None = None
    client_authorities: bytes | None = None

    def __repr__(self) -> str:
        given = [name for name in _NAMES if getattr(self, name) is not None]
        return f"<Credentials: {', '.join(given) or 'none'}>"


_NAMES: Final = tuple(each.name for each in fields(Credentials))


class UnusableCredentialsError(ValueError):
    """What was read is no PEM, or does not fit together. Holds no secret."""


def check_fit(credentials: Credentials) -> None:
    """Raise ``ValueError`` unless each key belongs to its certificate and all can be read."""
    import ssl  # noqa: PLC0415 -- only users of TLS pay for it

    for certificate, key in PAIRS:
        if getattr(credentials, certificate) is None:
            continue
        try:
            load_pair(
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                getattr(credentials, certificate),
                getattr(credentials, key),
            )
        except (ssl.SSLError, ValueError) as error:
            why = getattr(error, "reason", None) or "not readable without a password"
            raise UnusableCredentialsError(
                f"{certificate} and {key} could not be loaded together ({why}): check that both "
                "are whole, that the key belongs to the certificate and has no password"
            ) from None
    for name in ("root_certificates", "client_authorities"):
        pem = getattr(credentials, name)
        if pem is None:
            continue
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
                cadata=pem.decode("ascii", "ignore")
            )
        except (ssl.SSLError, ValueError):
            raise UnusableCredentialsError(
                f"{name} could not be loaded: check that it is whole PEM"
            ) from None


def load_pair(context: Any, certificate: bytes, key: bytes) -> None:
    """Give an ``ssl.SSLContext`` a certificate and key, which it takes from files only."""
    with _as_file(certificate + b"\n" + key) as path:
        context.load_cert_chain(path, password=_no_password)


def check_pem(name: str, value: object) -> None:
    """Raise unless ``value`` is ``None`` or looks like PEM."""
    if value is None:
        return
    if not isinstance(value, bytes):
        raise TypeError(f"{name} must be bytes (PEM), not {type(value).__name__}")
    if _MARK not in value:
        raise ValueError(f"{name} is not PEM: it has no '-----BEGIN' line")


def is_whole(pem: bytes) -> bool:
    """Whether everything that begins in ``pem`` also ends there."""
    begun = pem.count(_MARK)
    return begun > 0 and begun == pem.count(b"-----END ")


def checked_hostname(name: str, value: object) -> str | None:
    """Return ``value`` if it can be a host name, or ``None``."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str")
    if value == "":
        raise ValueError(f"{name} must not be empty")
    return value


def _no_password() -> str:
    raise ValueError("the key has a password")


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """The path of a file that only this process can read, in memory where there is such."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("resolver-tls")
        try:
            os.write(descriptor, content)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    import tempfile  # noqa: PLC0415 -- loads much, and Linux does without

    with tempfile.NamedTemporaryFile(prefix="resolver-tls-") as file:  # readable by its owner
        file.write(content)
        file.flush()
        yield file.name
