"""Certificates for tests: an authority that signs for any dates, and files that rotate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import trustme

HOSTS = ("localhost", "127.0.0.1")


class Pair(NamedTuple):
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes

    def as_client(self) -> dict[str, bytes]:
        """Options of a TlsConfig."""
        return {"client_certificate": self.certificate, "client_key": self.key}

    def as_server(self) -> dict[str, bytes]:
        """Options of a FlightServerProcess."""
        return {"tls_certificate": self.certificate, "tls_key": self.key}

    def as_tls_server(self) -> dict[str, bytes]:
        """Options of a TlsConfig for a worker."""
        return {"server_certificate": self.certificate, "server_key": self.key}


class Signer:
    """A certificate authority."""

    def __init__(self) -> None:
        self._authority = trustme.CA()
        self.root: bytes = self._authority.cert_pem.bytes()

    def issue(
        self, *names: str, starts_in: float | None = None, ends_in: float | None = None
    ) -> Pair:
        """A certificate whose dates are in seconds from now; for this host by default."""
        now = datetime.now(UTC)
        leaf = self._authority.issue_cert(
            *(names or HOSTS),
            not_before=None if starts_in is None else now + timedelta(seconds=starts_in),
            not_after=None if ends_in is None else now + timedelta(seconds=ends_in),
        )
        return Pair(leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes())


class PemFiles:
    """A certificate and its key in a directory that is replaced as a whole, as kubelet does."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self._directory = directory
        self._number = 0
        self.certificate = directory / "current" / "tls.crt"
        self.key = directory / "current" / "tls.key"
        self.replace(pair)

    def replace(self, pair: Pair) -> None:
        """Switch both files at once."""
        self._number += 1
        fresh = self._directory / f"version-{self._number}"
        fresh.mkdir()
        (fresh / "tls.crt").write_bytes(pair.certificate)
        (fresh / "tls.key").write_bytes(pair.key)
        link = self._directory / "next"
        link.symlink_to(fresh.name)
        link.replace(self._directory / "current")
