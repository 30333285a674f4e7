"""Worker URLs: from what a caller wrote to one canonical key and one Flight location.

Pure functions: nothing here resolves a name, opens a socket or keeps state. Two
spellings of one address (case, default port, trailing slash) give one key; two
addresses that merely lead to the same machine never do, because only the caller
knows whether ``localhost`` and ``127.0.0.1`` are the same worker.

=========================  ============================  ============================
written                    ``key``                       ``location``
=========================  ============================  ============================
http, grpc, grpc+tcp       ``http://host:port``          ``grpc+tcp://host:port``
https, grpc+tls            ``https://host:port``         ``grpc+tls://host:port``
grpc+unix                  ``grpc+unix:///path``         ``grpc+unix:///path``
=========================  ============================  ============================

The grammar is written out here instead of using ``urllib.parse``, which drops tabs
and newlines, empty queries and empty fragments without a word.
"""

from __future__ import annotations

import ipaddress
import re
import sys
import unicodedata
from dataclasses import dataclass
from typing import Final, NoReturn
from urllib.parse import quote, unquote_to_bytes

from ._errors import InvalidWorkerUrlError

MAX_URL_LENGTH: Final = 2_048
"""Characters of the longest URL that is looked at; a host name has 253 at most."""

_MAX_SHOWN: Final = 200
_MAX_UNIX_PATH_BYTES: Final = 107  # sun_path on Linux, less its terminating NUL
_MAX_HOST_LENGTH: Final = 253
_MAX_PORT: Final = 65_535

_PLAINTEXT: Final = "http"
_TLS: Final = "https"
_UNIX: Final = "grpc+unix"
_CANONICAL_SCHEME: Final = {
    "http": _PLAINTEXT,
    "grpc": _PLAINTEXT,
    "grpc+tcp": _PLAINTEXT,
    "https": _TLS,
    "grpc+tls": _TLS,
    "grpc+unix": _UNIX,
}
_FLIGHT_SCHEME: Final = {_PLAINTEXT: "grpc+tcp", _TLS: "grpc+tls"}
# A gRPC scheme has no well-known port, so only the web's own spellings may omit it.
_DEFAULT_PORT: Final = {"http": 80, "https": 443}

_HEAD = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_LABEL = re.compile(r"[a-z0-9_\-]{1,63}")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_UNIX_PATH = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+;=:@/\-]|%[0-9A-Fa-f]{2})*")
_UNIX_SAFE: Final = "/+:="
# Bytes that pyarrow decodes from the location and gRPC then cannot address.
_UNIX_REFUSED = re.compile(rb"[\x00-\x1f\x7f#?,]")
# Short digits, as far as a delimiter or to the end; letters could be a password's.
_PORT_SHOWN = re.compile(r"[0-9]{0,20}(?:[/\\?#;&=]|\s*$)|\Z")
_SECRET_FOLLOWS = re.compile(r"[/\\?#;&=|,!$'\"()<>{}^`~+]")
_BRACKETED_ADDRESS = re.compile(r"\[[0-9A-Fa-f:.%]*\]")
_SECRET_FOLLOWS_PATH = re.compile(r"[?#]")

_WRITE = "write the address alone, such as http://10.0.0.7:50051"


@dataclass(frozen=True, slots=True)
class WorkerUrl:
    """A worker's address, taken apart. Immutable, hashable, picklable.

    ``key`` is the canonical URL, an exact ``str``, under which the client is cached
    and which a connector is given; ``parse_worker_url(key).key == key``. ``location``
    is the same address as pyarrow wants it. ``scheme`` is ``"http"`` (plaintext),
    ``"https"`` (TLS) or ``"grpc+unix"``; for the last, ``host`` is empty, ``port`` is
    ``None`` and ``path`` is the socket's path, percent-encoded.
    """

    key: str
    location: str
    scheme: str
    host: str
    port: int | None
    path: str = ""

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme == _TLS

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can be meant; also a Unix socket. No name is looked up."""
        if not self.host or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_worker_url(url: object) -> WorkerUrl:
    """Return the canonical form of a worker URL.

    ``url`` is a ``str`` (or subclass), a ``pyarrow.flight.Location``, or any object
    whose ``str()`` is a URL, such as ``yarl.URL``. Raises ``InvalidWorkerUrlError``,
    and nothing else, when it is not the URL of a worker; the message masks user-info,
    path, query and fragment. Safe to call from any thread.
    """
    text = _text_of(url)
    if len(text) > MAX_URL_LENGTH:
        _refuse(text, f"it has {len(text)} characters, at most {MAX_URL_LENGTH} are read", _WRITE)
    for char in text:
        if char <= " " or char == "\x7f" or char.isspace():
            _refuse(text, "it contains white space or a control character", "remove or encode it")
    head = _HEAD.match(text)
    if head is None:
        _refuse(text, "it has no scheme", "write it with one, such as http://10.0.0.7:50051")
    scheme = head.group()[:-3].lower()
    canonical = _CANONICAL_SCHEME.get(scheme)
    if canonical is None:
        _refuse_scheme(text)
    rest = text[head.end() :]
    if canonical is _UNIX:
        return _parse_unix(text, rest)
    return _parse_network(text, scheme, canonical, rest)


def mask_url(text: str) -> str:
    """Return ``text`` fit for a message: secrets as ``***``, printable ASCII, bounded.

    Meant for malformed input too: wherever a password or token may hide, in a spelling
    that no parser accepts, is masked. Of a well-formed worker URL nothing is.
    """
    match = _HEAD.match(text)
    head = match.group() if match else ""
    tail = text[len(head) :]
    words = tail.split(maxsplit=1)
    if len(words) > 1 and "@" not in tail and not tail[0].isspace():
        return mask_url(head + words[0]) + " ***"
    is_unix_path = head.lower() == _UNIX + "://" and tail.startswith("/") and "@" not in tail
    if len(text) > MAX_URL_LENGTH or _has_disguised_delimiter(tail):
        return _shown(head + "***")
    if is_unix_path:
        return _shown(head + _until(_SECRET_FOLLOWS_PATH, tail))
    before, at, after = tail.rpartition("@")
    # An '@' behind one of these may end a password or stand in a query: trust neither side.
    if "%" in tail or _SECRET_FOLLOWS.search(before):
        return _shown(head + "***")
    return _shown(head + ("***@" if at else "") + _masked_port(_until(_SECRET_FOLLOWS, after)))


def _masked_port(address: str) -> str:
    """``address`` without a port that is no number: a password may stand there."""
    if address.startswith("["):
        return address if _BRACKETED_ADDRESS.match(address) else "[***"
    host, colon, port = address.partition(":")
    digits = _PORT_SHOWN.match(port)
    return address if not colon or digits or "***" in port else f"{host}:***"


def _until(delimiter: re.Pattern[str], text: str) -> str:
    """``text`` up to the first delimiter and, where something follows that, ``***``."""
    found = delimiter.search(text)
    if found is None or found.end() == len(text):
        return text
    return text[: found.end()] + "***"


def _text_of(url: object) -> str:
    """Return the URL as an exact ``str``; a subclass could run its own code in the cache."""
    # Whoever holds a Location has imported pyarrow.flight; this module need not.
    flight = sys.modules.get("pyarrow.flight")
    try:
        if isinstance(url, str):
            return str.__str__(url)
        if flight is not None and isinstance(url, flight.Location):
            return str(url.uri, "utf-8")
        if not isinstance(url, (bytes, bytearray, memoryview)):
            text = str.__str__(str(url))
            if _HEAD.match(text):
                return text
    except Exception as error:
        raise InvalidWorkerUrlError(
            f"Not a worker URL: str() of a {type(url).__name__} failed "
            f"({type(error).__name__}); pass the URL as a str"
        ) from error
    kind = type(url).__name__
    if isinstance(url, (bytes, bytearray, memoryview)):
        raise InvalidWorkerUrlError(f"A worker URL is text, not {kind}; decode it first")
    # What such an object prints is not shown: it may hold anything.
    raise InvalidWorkerUrlError(f"Not a worker URL: a {kind} is none; pass the URL as a str")


def _parse_network(text: str, scheme: str, canonical: str, rest: str) -> WorkerUrl:
    if "@" in rest:
        _refuse(
            text,
            "it carries user-info",
            "send credentials as headers, FlightConnector(headers=...)",
        )
    for delimiter, name in (("?", "a query"), ("#", "a fragment"), ("\\", "a backslash")):
        if delimiter in rest:
            _refuse(text, f"it has {name}", _WRITE)
    authority, _, path = rest.partition("/")
    if path:
        _refuse(text, "it has a path", _WRITE)
    if not authority:
        _refuse(text, "it has no host", _WRITE)
    host_text, port_text = _split_authority(text, authority)
    host = _ipv6(text, host_text) if host_text.startswith("[") else _host(text, host_text)
    port = _port(text, scheme, port_text)
    address = f"{host}:{port}"
    return WorkerUrl(
        key=f"{canonical}://{address}",
        location=f"{_FLIGHT_SCHEME[canonical]}://{address}",
        scheme=canonical,
        host=host,
        port=port,
    )


def _split_authority(text: str, authority: str) -> tuple[str, str | None]:
    """Host (with its brackets) and port text; ``None`` where no port is written."""
    if authority.startswith("["):
        host, bracket, after = authority.partition("]")
        if not bracket:
            _refuse(text, "its IPv6 address has no closing bracket", "write http://[::1]:50051")
        if after and not after.startswith(":"):
            _refuse(text, "something other than a port follows its IPv6 address", _WRITE)
        return host + bracket, after[1:] if after else None
    if authority.count(":") > 1:
        _refuse(
            text,
            "it has more than one colon after the scheme",
            "put an IPv6 address in brackets, such as http://[::1]:50051",
        )
    host, colon, port = authority.partition(":")
    return host, port if colon else None


def _ipv6(text: str, bracketed: str) -> str:
    inner = bracketed[1:-1]
    if "%" in inner:
        _refuse(
            text,
            "its IPv6 address has a zone identifier, which means nothing on another machine",
            "write a global or unique local address",
        )
    try:
        address = ipaddress.IPv6Address(inner)
    except ValueError:
        address = None  # its message would repeat the text unmasked
    if address is None:
        _refuse(text, "there is no IPv6 address between its brackets", _WRITE)
    # Python 3.13 changed how it prints a mapped address; a key must not depend on that.
    if address.ipv4_mapped is not None:
        return f"[::ffff:{address.ipv4_mapped}]"
    return f"[{address.compressed}]"


def _host(text: str, host: str) -> str:
    if not host:
        _refuse(text, "it has no host", _WRITE)
    if not host.isascii():
        _refuse(text, "its host name is not ASCII", "write the name's xn-- form")
    host = host.lower()
    if len(host) > _MAX_HOST_LENGTH:
        _refuse(text, f"its host name is longer than {_MAX_HOST_LENGTH} characters", _WRITE)
    labels = host.removesuffix(".").split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        _refuse(
            text,
            "its host name is not made of labels of 1 to 63 letters, digits, '-' and '_'",
            _WRITE,
        )
    if _NUMERIC_LABEL.fullmatch(labels[-1]) and not _is_ipv4(host):
        _refuse(
            text,
            "its host looks like a number but is no dotted IPv4 address",
            "write four numbers from 0 to 255 without leading zeros",
        )
    return host


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _port(text: str, scheme: str, port: str | None) -> int:
    if port is None:
        default = _DEFAULT_PORT.get(scheme)
        if default is None:
            _refuse(text, f"it has no port and {scheme}:// has no default", "write the port")
        return default
    if not _PORT.fullmatch(port) or int(port) > _MAX_PORT:
        _refuse(
            text,
            "its port is not a number from 1 to 65535",
            "write it in plain digits, without sign or leading zeros",
        )
    return int(port)


def _parse_unix(text: str, rest: str) -> WorkerUrl:
    remedy = "write grpc+unix:///absolute/path"
    if not rest.startswith("/"):
        _refuse(text, "a Unix socket has no host; its path must be absolute", remedy)
    if not _UNIX_PATH.fullmatch(rest):
        _refuse(
            text,
            "its path has a character that a URL path may not hold",
            "percent-encode it",
        )
    raw = unquote_to_bytes(rest)
    if raw.endswith(b"/"):
        _refuse(text, "its path names no socket", remedy)
    if _UNIX_REFUSED.search(raw):
        _refuse(
            text,
            "gRPC cannot address a socket whose path has '#', '?', ',' or control characters",
            "rename the socket",
        )
    if len(raw) > _MAX_UNIX_PATH_BYTES:
        _refuse(
            text,
            f"its path is longer than the {_MAX_UNIX_PATH_BYTES} bytes of a socket address",
            "use a shorter directory",
        )
    path = quote(raw, safe=_UNIX_SAFE)
    key = f"{_UNIX}://{path}"
    return WorkerUrl(key=key, location=key, scheme=_UNIX, host="", port=None, path=path)


def _has_disguised_delimiter(text: str) -> bool:
    """Whether a character outside ASCII stands for one that ends user-info or a host."""
    return not text.isascii() and any(
        not char.isascii()
        and not set("@?#;&=%:/\\").isdisjoint(unicodedata.normalize("NFKC", char))
        for char in text
    )


def _shown(text: str) -> str:
    if len(text) > _MAX_SHOWN:
        text = text[:_MAX_SHOWN] + "..."
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text)


def _refuse_scheme(text: str) -> NoReturn:
    if text.lower().startswith("arrow-flight-reuse-connection:"):
        _refuse(
            text,
            "it means the connection that the FlightInfo came over",
            "pass the URL that you asked for the FlightInfo",
        )
    known = ", ".join(f"{scheme}://" for scheme in sorted(_CANONICAL_SCHEME))
    _refuse(text, "its scheme is not one that workers speak", f"use one of {known}")


def _refuse(text: str, reason: str, remedy: str) -> NoReturn:
    shown = mask_url(text)
    raise InvalidWorkerUrlError(f"Not a worker URL: '{shown}': {reason}; {remedy}", url=shown)
