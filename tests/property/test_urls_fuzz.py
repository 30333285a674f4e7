"""The URL parser under random input: one exception type, one key per address, no secrets."""

from __future__ import annotations

import ipaddress
import string

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pyarrow import flight

from resolver import InvalidWorkerUrlError
from resolver._urls import mask_url, parse_worker_url

SCHEMES = ["http", "https", "grpc", "grpc+tcp", "grpc+tls"]
PLAINTEXT = {"http", "grpc", "grpc+tcp"}
DELIMITERS = "@:/?#[]%;&=\\\uff20\uff1f\t\n\r \x00\u00e9"

labels = st.text(string.ascii_lowercase + string.digits + "-_", min_size=1, max_size=12)
names = (
    st.lists(labels, min_size=1, max_size=4)
    .map(".".join)
    .filter(
        lambda name: (
            not name.rpartition(".")[2].isdigit() and not name.rpartition(".")[2].startswith("0x")
        )
    )
)
ipv4 = st.ip_addresses(v=4).map(str)
ipv6 = st.ip_addresses(v=6).map(lambda address: f"[{address}]")
ports = st.integers(1, 65_535)


@st.composite
def nearly_urls(draw: st.DrawFn) -> str:
    """Text made of the pieces of URLs, in an order that is often almost right."""
    piece = st.one_of(
        st.sampled_from([*SCHEMES, "grpc+unix", "ftp", "://", ":", "/", "@", "?", "#", "[", "]"]),
        st.sampled_from(["localhost", "127.0.0.1", "[::1]", ":50051", "%40", "%00", "..", "::"]),
        st.text(DELIMITERS, max_size=3),
        labels,
        st.text(max_size=5),
    )
    body = "".join(draw(st.lists(piece, max_size=8)))
    head = draw(st.sampled_from(["", "http://", "grpc://", "grpc+unix:///", "https://w1:5"]))
    return head + body


@st.composite
def case_spelling(draw: st.DrawFn, text: str) -> str:
    flips = draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
    return "".join(c.upper() if flip else c for c, flip in zip(text, flips, strict=True))


@given(st.one_of(st.text(), nearly_urls()))
@example("http://\ud800")
@example("http://[::1")
@example("http://0x:1")
@example("grpc+unix:///%")
@example("http://\u0130:1")
@example("http://\u212a:1")
def test_only_one_kind_of_error_and_keys_are_fixed_points(text: str) -> None:
    try:
        parsed = parse_worker_url(text)
    except InvalidWorkerUrlError as error:
        message = str(error)
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 600
        return
    assert type(parsed.key) is str
    again = parse_worker_url(parsed.key)
    assert again == parsed
    # The same address under its Flight name.
    assert parse_worker_url(parsed.location) == parsed
    assert flight.Location(parsed.location).uri == parsed.location.encode()
    assert mask_url(parsed.key) == parsed.key


@given(
    st.one_of(
        st.none(), st.integers(), st.floats(), st.binary(), st.booleans(),
        st.lists(st.text()), st.dictionaries(st.text(), st.text()), st.builds(object),
    )
)  # fmt: skip
def test_any_object_is_answered(value: object) -> None:
    with pytest.raises(InvalidWorkerUrlError):
        parse_worker_url(value)


@given(st.data(), st.sampled_from(SCHEMES), st.one_of(names, ipv4, ipv6), ports)
def test_spellings_agree(data: st.DataObject, scheme: str, host: str, port: int) -> None:
    canonical = "http" if scheme in PLAINTEXT else "https"
    written = data.draw(case_spelling(f"{scheme}://{host}:{port}"))
    written += data.draw(st.sampled_from(["", "/"]))
    parsed = parse_worker_url(written)
    assert parsed.key == parse_worker_url(f"{canonical}://{host}:{port}").key
    assert parsed.key.startswith(canonical + "://")
    assert parsed.port == port
    if not host.startswith("["):
        assert parsed.host == host


@given(st.sampled_from([("http", 80), ("https", 443)]), st.one_of(names, ipv4, ipv6))
def test_default_port_may_be_left_out(scheme: tuple[str, int], host: str) -> None:
    name, port = scheme
    assert parse_worker_url(f"{name}://{host}") == parse_worker_url(f"{name}://{host}:{port}")


@given(st.ip_addresses(v=6))
def test_every_spelling_of_an_ipv6_address_is_one_key(address: ipaddress.IPv6Address) -> None:
    keys = {
        parse_worker_url(f"http://[{spelling}]:5").key
        for spelling in (address.compressed, address.exploded, address.exploded.upper())
    }
    assert len(keys) == 1
    assert ipaddress.IPv6Address(parse_worker_url(keys.pop()).host[1:-1]) == address


@given(st.one_of(names, ipv4, ipv6), st.one_of(names, ipv4, ipv6), ports)
def test_distinct_hosts_have_distinct_keys(one: str, other: str, port: int) -> None:
    assume(one != other)
    assert (
        parse_worker_url(f"http://{one}:{port}").key
        != parse_worker_url(f"http://{other}:{port}").key
    )


@given(
    st.sampled_from(["http://", "https://", "grpc://", "ftp://", "http:", "http:/", "//", "", " "]),
    st.text(DELIMITERS + "ab", max_size=6),
    st.text(string.ascii_uppercase, min_size=12, max_size=20),
    st.text(DELIMITERS + "ab", max_size=6),
    st.sampled_from(["w1:5", "w1", "[::1]:5", "", "w1:5/p", "w1:5?q"]),
)
def test_user_info_never_shows(
    head: str, before: str, secret: str, after: str, address: str
) -> None:
    # The scheme stays visible; "u://SECRET" is one, so the text must not start a new one.
    written = f"{head}u{before}{secret}{after}@{address}"
    assume(head.endswith("://") or "://" not in before + after)
    assert secret not in mask_url(written)
    with pytest.raises(InvalidWorkerUrlError) as caught:
        parse_worker_url(written)
    assert secret not in str(caught.value)
    assert secret not in repr(caught.value.url)


@given(
    st.sampled_from(["http://w1:5", "https://w1:5/", "grpc+unix:///run/w", "w1:5", "http://"]),
    st.sampled_from("?#"),
    st.text(DELIMITERS + "ab", max_size=6),
    st.text(string.ascii_uppercase, min_size=12, max_size=20),
    st.text(DELIMITERS + "ab", max_size=6),
)
def test_query_and_fragment_never_show(
    address: str, delimiter: str, before: str, secret: str, after: str
) -> None:
    written = f"{address}{delimiter}{before}{secret}{after}"
    assert secret not in mask_url(written)
    with pytest.raises(InvalidWorkerUrlError) as caught:
        parse_worker_url(written)
    assert secret not in str(caught.value)
