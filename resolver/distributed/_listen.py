"""Who may reach a worker: its listening address and what guards it.

A worker runs plans, and plans read files, so whoever can call it can read what it can.
Hence loopback by default, and TLS with a token or client certificates, or an explicit
``insecure=True``, for anything wider. Pure checks; no socket is opened here.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pyarrow import flight

from resolver._urls import WorkerUrl, parse_worker_url

from ._errors import InsecureListenError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from resolver._pem import Credentials

__all__ = ["CallHeaders", "CallMiddleware", "Guard", "ListenAddress"]

CALL_MIDDLEWARE: Final = "resolver.call"
_AUTHORIZATION: Final = "authorization"


@dataclass(frozen=True, slots=True)
class Guard:
    """What a caller must show. Secrets are in no ``repr``.

    ``tls_certificate`` and ``tls_key`` (PEM) turn TLS on; ``client_ca`` (PEM) then
    demands a client certificate signed by it; ``token`` is expected as
    ``authorization: Bearer <token>`` with every call.
    """

    tls_certificate: bytes | None = field(default=None, repr=False)
    tls_key: bytes | None = field(default=None, repr=False)
    client_ca: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if self.client_ca is not None and self.tls_certificate is None:
            raise ValueError("client_ca needs tls_certificate and tls_key")
        if self.token is not None and not self.token:
            raise ValueError("token is empty")

    @classmethod
    def of(cls, credentials: Credentials, token: str | None) -> Guard:
        """What the server's part of ``credentials`` demands."""
        return cls(
            credentials.server_certificate,
            credentials.server_key,
            credentials.client_authorities,
            token,
        )

    @property
    def has_tls(self) -> bool:
        return self.tls_certificate is not None

    @property
    def is_private(self) -> bool:
        """Enough for an address that other machines can reach."""
        return self.has_tls and (self.token is not None or self.client_ca is not None)

    def server_options(self) -> dict[str, Any]:
        """Keyword arguments of ``FlightServerBase``."""
        options: dict[str, Any] = {"middleware": {CALL_MIDDLEWARE: CallMiddleware(self.token)}}
        if self.has_tls:
            options["tls_certificates"] = [(self.tls_certificate, self.tls_key)]
        if self.client_ca is not None:
            options["root_certificates"] = self.client_ca
            options["verify_client"] = True
        return options


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """A worker URL to listen on, and the one by which others reach it if that differs.

    Port 0 asks for a free one, and in ``advertise`` means the one to listen on.
    """

    url: WorkerUrl
    any_port: bool
    advertise: WorkerUrl | None = None
    advertises_any_port: bool = False

    @property
    def asked(self) -> str:
        """The canonical URL to listen on, with the port that was asked for."""
        return _asked(self.url, self.any_port)

    @classmethod
    def parse(
        cls, location: object, guard: Guard, *, insecure: bool = False, advertise: object = None
    ) -> ListenAddress:
        """Check ``location`` against ``guard``.

        Raises ``InvalidWorkerUrlError`` for what is not a worker URL,
        ``InsecureListenError`` for an address that is not loopback and not guarded, and
        ``ValueError`` for one that nobody could call without ``advertise``.
        """
        url, any_port = _parse(location)
        asked = _asked(url, any_port)
        if url.is_tls and not guard.has_tls:
            raise InsecureListenError(
                f"{asked} means TLS: give tls_certificate and tls_key", url=asked
            )
        if not url.host and guard.has_tls:
            raise ValueError(
                f"{asked} is a Unix socket, which has no TLS: nobody would be asked for a "
                "certificate; give a token, or listen on 127.0.0.1"
            )
        if not (insecure or guard.is_private or url.is_loopback):
            raise InsecureListenError(
                f"{asked} can be reached by other machines, and whoever reaches a worker can "
                "read every file that it can: give a TLS certificate and a token (or client_ca), "
                "listen on 127.0.0.1, or say insecure=True on a network you trust",
                url=asked,
            )
        if advertise is None:
            if _is_wildcard(url):
                raise ValueError(
                    f"{asked} stands for all addresses of this machine, and none that others "
                    "could call: say by which URL they reach this worker, "
                    "advertise='grpc://HOST:PORT'"
                )
            return cls(url, any_port)
        advertised, advertises_any_port = _parse(advertise)
        if _is_wildcard(advertised):
            raise ValueError(f"{advertised.key} cannot be called, so it cannot be advertised")
        if advertised.is_tls != guard.has_tls:
            raise ValueError(
                f"{advertised.key} is advertised, but this worker "
                f"{'speaks' if guard.has_tls else 'does not speak'} TLS"
            )
        return cls(url, any_port, advertised, advertises_any_port)

    def flight_location(self, guard: Guard, port: int | None = None) -> str:
        """What ``FlightServerBase`` listens on; ``port`` if it has one already."""
        if not self.url.host:
            return self.url.location
        scheme = "grpc+tls" if guard.has_tls else "grpc+tcp"
        if port is None:
            port = 0 if self.any_port else self.url.port
        return f"{scheme}://{_bracketed(self.url.host)}:{port}"

    def located(self, port: int, guard: Guard) -> str:
        """The Flight location of a server that got ``port``."""
        return parse_worker_url(self.worker_url(port, guard)).location

    def worker_url(self, port: int, guard: Guard) -> str:
        """The canonical URL, for others, of a server that got ``port``."""
        if self.advertise is not None and not self.advertises_any_port:
            return self.advertise.key
        host = (self.advertise or self.url).host
        if not host:
            return self.url.key
        scheme = "https" if guard.has_tls else "http"
        return parse_worker_url(f"{scheme}://{_bracketed(host)}:{port}").key


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _parse(location: object) -> tuple[WorkerUrl, bool]:
    """The worker URL, and whether its port was 0."""
    written = location.uri.decode() if isinstance(location, flight.Location) else str(location)
    trimmed = written.rstrip("/")
    any_port = trimmed.endswith(":0") and not trimmed.startswith("grpc+unix:")
    # A worker URL has no port 0; only an address to listen on does.
    return parse_worker_url(f"{trimmed[:-1]}1" if any_port else location), any_port


def _asked(url: WorkerUrl, any_port: bool) -> str:
    return f"{url.key[:-1]}0" if any_port else url.key  # see _parse


def _is_wildcard(url: WorkerUrl) -> bool:
    try:
        address = ipaddress.ip_address(url.host.strip("[]"))
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_unspecified


class CallHeaders(flight.ServerMiddleware):  # type: ignore[misc]  # pyarrow has no types
    """The headers of one call, lower-case names, without the authorization.

    ``headers`` are those with text values, the last one of each name.
    """

    def __init__(self, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        super().__init__()
        self._all = headers
        self.headers: Mapping[str, str] = {
            name: values[-1]
            for name, values in headers.items()
            if values and isinstance(values[-1], str)
        }

    def named(self, names: Iterable[str]) -> list[tuple[bytes, bytes]]:
        """The headers of these names as a call of our own takes them, repeated ones too."""
        return [
            (name.encode(), _bytes(value))
            for name in dict.fromkeys(map(str.lower, names))
            for value in self._all.get(name, ())
        ]


class CallMiddleware(flight.ServerMiddlewareFactory):  # type: ignore[misc]  # as above
    """Lets a call in, or not, before anything of it is looked at."""

    def __init__(self, token: str | None) -> None:
        self._expected = None if token is None else f"Bearer {token}".encode()

    def start_call(self, _info: object, headers: Mapping[str, list[Any]]) -> CallHeaders:
        if self._expected is not None:
            given = [_bytes(value) for value in headers.get(_AUTHORIZATION, [])]
            # compare_digest takes the same time whatever the first wrong byte is.
            if len(given) != 1 or not hmac.compare_digest(given[0], self._expected):
                raise flight.FlightUnauthenticatedError("a valid bearer token is required")
        return CallHeaders(
            {
                name.lower(): values
                for name, values in headers.items()
                if name.lower() != _AUTHORIZATION
            }
        )


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
