"""The grammar of worker URLs: what is accepted, what is one address, what stays secret."""

from __future__ import annotations

import pickle
from enum import Enum

import pytest
from pyarrow import flight
from yarl import URL

from resolver import InvalidWorkerUrlError
from resolver._urls import MAX_URL_LENGTH, WorkerUrl, mask_url, parse_worker_url

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("written", "key", "location"),
    [
        ("http://w1:50051", "http://w1:50051", "grpc+tcp://w1:50051"),
        ("grpc://w1:50051", "http://w1:50051", "grpc+tcp://w1:50051"),
        ("grpc+tcp://w1:50051", "http://w1:50051", "grpc+tcp://w1:50051"),
        ("https://w1:50051", "https://w1:50051", "grpc+tls://w1:50051"),
        ("grpc+tls://w1:50051", "https://w1:50051", "grpc+tls://w1:50051"),
        ("http://w1", "http://w1:80", "grpc+tcp://w1:80"),
        ("https://w1", "https://w1:443", "grpc+tls://w1:443"),
        ("http://10.0.0.7:1", "http://10.0.0.7:1", "grpc+tcp://10.0.0.7:1"),
        ("http://[::1]:50051", "http://[::1]:50051", "grpc+tcp://[::1]:50051"),
        (
            "http://my_worker-1.a--b.xn--bcher-kva:65535",
            "http://my_worker-1.a--b.xn--bcher-kva:65535",
            "grpc+tcp://my_worker-1.a--b.xn--bcher-kva:65535",
        ),
        ("grpc+unix:///run/w.sock", "grpc+unix:///run/w.sock", "grpc+unix:///run/w.sock"),
        ("grpc+unix:///a%20b", "grpc+unix:///a%20b", "grpc+unix:///a%20b"),
    ],
)
def test_scheme_decides_key_and_location(written: str, key: str, location: str) -> None:
    parsed = parse_worker_url(written)
    assert (parsed.key, parsed.location) == (key, location)


@pytest.mark.parametrize(
    "spellings",
    [
        ["http://w1:80", "http://w1", "HTTP://W1/", "grpc://w1:80/", "grpc+tcp://W1:80"],
        ["https://w1:443", "https://w1/", "grpc+tls://w1:443", "GRPC+TLS://W1:443/"],
        ["http://[::1]:5", "http://[0:0:0:0:0:0:0:1]:5", "http://[0000::0001]:5/"],
        ["http://[2001:db8::a]:5", "grpc://[2001:DB8:0:0::A]:5"],
        ["http://[::ffff:1.2.3.4]:5", "http://[::FFFF:102:304]:5"],
        ["grpc+unix:///tmp/w.sock", "GRPC+UNIX:///tmp/w.sock", "grpc+unix:///tmp/%77.sock"],
        ["grpc+unix:///tmp/a%3Bb", "grpc+unix:///tmp/a;b", "grpc+unix:///tmp/a%3bb"],
    ],
)
def test_spellings_of_one_address_share_a_key(spellings: list[str]) -> None:
    assert len({parse_worker_url(spelling).key for spelling in spellings}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://localhost:5", "http://127.0.0.1:5"),
        ("http://127.0.0.1:5", "http://[::ffff:127.0.0.1]:5"),
        ("http://w1:5", "http://w1.:5"),
        ("http://w1:5", "https://w1:5"),
        ("http://w1:5", "http://w1:6"),
        ("grpc+unix:///a/b", "grpc+unix:///a//b"),
        ("grpc+unix:///a/b", "grpc+unix:///a/../a/b"),
        ("grpc+unix:///a/b", "grpc+unix:///A/b"),
    ],
)
def test_addresses_are_never_aliased(one: str, other: str) -> None:
    assert parse_worker_url(one).key != parse_worker_url(other).key


def test_parts_of_a_parsed_url() -> None:
    parsed = parse_worker_url("GRPC+TLS://[FE80::1]:7/")
    assert parsed == WorkerUrl(
        key="https://[fe80::1]:7",
        location="grpc+tls://[fe80::1]:7",
        scheme="https",
        host="[fe80::1]",
        port=7,
    )
    assert parsed.is_tls
    assert not parse_worker_url("http://w1").is_tls
    socket = parse_worker_url("grpc+unix:///a%20b")
    assert (socket.scheme, socket.host, socket.port, socket.path) == (
        "grpc+unix", "", None, "/a%20b",
    )  # fmt: skip


def test_a_parsed_url_is_a_value() -> None:
    parsed = parse_worker_url("http://w1:5")
    assert parsed == parse_worker_url("grpc://W1:5")
    assert hash(parsed) == hash(parse_worker_url("grpc://W1:5"))
    assert pickle.loads(pickle.dumps(parsed)) == parsed
    with pytest.raises(AttributeError):
        parsed.key = "http://w2:5"  # type: ignore[misc]


class Shouting(str):
    """A str whose own methods lie; none of them may be asked."""

    __slots__ = ()

    def __str__(self) -> str:
        return "http://liar:1"

    def __hash__(self) -> int:
        raise AssertionError("a key's hash must be str's own")

    __eq__ = None  # type: ignore[assignment]


class Member(str, Enum):  # noqa: UP042 -- whose str() is not its value
    WORKER = "http://w1:5"


@pytest.mark.parametrize(
    "given",
    [
        Shouting("http://w1:5"),
        Member.WORKER,
        URL("http://w1:5/"),
        flight.Location("grpc+tcp://w1:5"),
        flight.Location.for_grpc_tcp("w1", 5),
    ],
    ids=lambda given: type(given).__name__,
)
def test_objects_that_are_urls(given: object) -> None:
    key = parse_worker_url(given).key
    assert key == "http://w1:5"
    assert type(key) is str


def test_location_of_a_unix_socket() -> None:
    assert parse_worker_url(flight.Location.for_grpc_unix("/run/w")).key == "grpc+unix:///run/w"


class Broken:
    def __str__(self) -> str:
        raise LookupError(SECRET)


class Unfriendly:
    def __str__(self) -> str:
        return None  # type: ignore[return-value]  # noqa: PLE0307


@pytest.mark.parametrize("given", [Broken(), Unfriendly()])
def test_failing_str_is_chained_and_not_repeated(given: object) -> None:
    with pytest.raises(InvalidWorkerUrlError) as caught:
        parse_worker_url(given)
    assert isinstance(caught.value.__cause__, (LookupError, TypeError))
    assert type(given).__name__ in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("given", [b"http://w1:5", bytearray(b"http://w1:5"), memoryview(b"x")])
def test_bytes_are_not_guessed_at(given: object) -> None:
    with pytest.raises(InvalidWorkerUrlError, match="decode it first"):
        parse_worker_url(given)


def test_other_objects_are_named_by_type_only() -> None:
    with pytest.raises(InvalidWorkerUrlError, match="a dict is none") as caught:
        parse_worker_url({"token": SECRET})
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize("given", [None, 0, 1.5, object(), [], ["http://w1:5"], {}, ("http", "w1")])
def test_other_objects_are_refused(given: object) -> None:
    with pytest.raises(InvalidWorkerUrlError):
        parse_worker_url(given)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("", "no scheme"),
        ("w1:50051", "no scheme"),
        ("//w1:50051", "no scheme"),
        ("http:w1:5", "no scheme"),
        ("http:/w1:5", "no scheme"),
        ("://w1:5", "no scheme"),
        ("1http://w1:5", "no scheme"),
        ("ftp://w1:5", "scheme is not one"),
        ("grpc+udp://w1:5", "scheme is not one"),
        ("h2c://w1:5", "grpc+tcp://"),
        ("arrow-flight-reuse-connection://?", "URL that you asked for the FlightInfo"),
        ("grpc://w1", "no port and grpc:// has no default; write the port"),
        ("grpc+tcp://w1/", "no port"),
        ("grpc+tls://w1", "no port"),
        ("http://", "no host"),
        ("http:///", "no host"),
        ("http://:5", "no host"),
        ("http://w1:", "port is not a number"),
        ("http://w1:0", "port is not a number"),
        ("http://w1:65536", "port is not a number"),
        ("http://w1:99999999999999999999", "port is not a number"),
        ("http://w1:080", "leading zeros"),
        ("http://w1:+80", "sign"),
        ("http://w1:-80", "sign"),
        ("http://w1:8_0", "port is not a number"),
        ("http://w1:8a", "port is not a number"),
        ("http://w1:\u0664\u0662", "port is not a number"),
        ("http://w1:\u00b2", "port is not a number"),
        ("http://w1:5/api", "a path"),
        ("http://w1:5//", "a path"),
        ("http://w1:5/.", "a path"),
        ("http://w1:5?", "a query"),
        ("http://w1:5/?a=1", "a query"),
        ("http://w1:5#", "a fragment"),
        ("http://w1:5/#x", "a fragment"),
        ("http://w1:5\\x", "a backslash"),
        ("http:\\\\w1:5", "no scheme"),
        ("http://user@w1:5", "user-info"),
        ("http://@w1:5", "user-info"),
        ("http:// w1:5", "white space"),
        (" http://w1:5", "white space"),
        ("http://w1:5 ", "white space"),
        ("http://w1\t:5", "white space"),
        ("http://w\n1:5", "white space"),
        ("ht\rtp://w1:5", "white space"),
        ("http://w1\x00:5", "control character"),
        ("http://w1\x7f:5", "control character"),
        ("http://w1\u00a0:5", "white space"),
        ("http://w1\u2028:5", "white space"),
        ("http://b\u00fccher:5", "xn--"),
        ("http://w\uff11:5", "xn--"),
        ("http://w\u200b1:5", "xn--"),
        ("http://w1..x:5", "labels"),
        ("http://.w1:5", "labels"),
        ("http://.:5", "labels"),
        ("http://w1..:5", "labels"),
        ("http://w,1:5", "labels"),
        ("http://w*:5", "labels"),
        ("http://w%31:5", "labels"),
        (f"http://{'a' * 64}:5", "labels of 1 to 63"),
        (f"http://{'a.' * 127}:5", "longer than 253"),
        ("http://127.1:5", "no dotted IPv4"),
        ("http://2130706433:5", "no dotted IPv4"),
        ("http://0x7f.0.0.1:5", "no dotted IPv4"),
        ("http://127.0.0.0x1:5", "no dotted IPv4"),
        ("http://127.0.0.01:5", "no dotted IPv4"),
        ("http://127.0.0.256:5", "no dotted IPv4"),
        ("http://127.0.0.1.:5", "no dotted IPv4"),
        ("http://1.2.3.4.5:5", "no dotted IPv4"),
        ("http://::1:5", "in brackets"),
        ("http://w1:5:6", "in brackets"),
        ("http://[::1:5", "closing bracket"),
        ("http://[::1]5", "other than a port"),
        ("http://[::1]]:5", "other than a port"),
        ("http://[]:5", "no IPv6 address"),
        ("http://[127.0.0.1]:5", "no IPv6 address"),
        ("http://[v1.x]:5", "no IPv6 address"),
        ("http://[[::1]:5", "no IPv6 address"),
        ("http://[fe80::1%eth0]:5", "zone identifier"),
        ("http://[fe80::1%25eth0]:5", "zone identifier"),
        ("grpc://[::1]", "no port"),
        ("grpc+unix://", "must be absolute"),
        ("grpc+unix://run/w.sock", "must be absolute"),
        ("grpc+unix:///", "names no socket"),
        ("grpc+unix:///run/", "names no socket"),
        ("grpc+unix:///run/%2F", "names no socket"),
        ("grpc+unix:///run/w?x", "percent-encode"),
        ("grpc+unix:///run/w#x", "percent-encode"),
        ("grpc+unix:///run/w%zz", "percent-encode"),
        ("grpc+unix:///run/\u00fc", "percent-encode"),
        ("grpc+unix:///run/a%2Cb", "cannot address"),
        ("grpc+unix:///run/a%00b", "cannot address"),
        ("grpc+unix:///run/a%3Fb", "cannot address"),
        (f"grpc+unix:///{'a' * 107}", "107 bytes"),
        ("http://" + "a" * MAX_URL_LENGTH, "characters, at most"),
    ],
)
def test_what_is_no_worker_url(written: str, says: str) -> None:
    with pytest.raises(InvalidWorkerUrlError) as caught:
        parse_worker_url(written)
    assert says in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.url == mask_url(written)
    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()


def test_longest_addresses_are_accepted() -> None:
    host = ".".join(["a" * 63] * 3 + ["a" * 61])
    assert len(host) == 253
    assert parse_worker_url(f"http://{host}:65535").host == host
    path = "/" + "a" * 106
    assert parse_worker_url(f"grpc+unix://{path}").path == path


def test_message_is_bounded() -> None:
    with pytest.raises(InvalidWorkerUrlError) as caught:
        parse_worker_url("http://w1:" + "9" * 2_000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "written",
    [
        f"http://user:{SECRET}@w1:5",
        f"http://{SECRET}@w1:5",
        f"http://user:{SECRET}@w1:5@w2:5",
        f"http://user:a@{SECRET}@w1:5",
        f"http://user:pa/{SECRET}@w1:5",
        f"http://us?er:{SECRET}@w1:5",
        f"http://us#er:{SECRET}@w1:5",
        f"http://user:{SECRET}%40w1:5",
        f"http://user:{SECRET}%2540w1:5",
        f"http://user:{SECRET}\uff20w1:5",
        f"http://user:{SECRET}\ufe6bw1:5",
        f"http:/user:{SECRET}@w1:5",
        f"http:user:{SECRET}@w1:5",
        f"user:{SECRET}@w1:5",
        f"//user:{SECRET}@w1:5",
        f"http:\\\\user:{SECRET}@w1:5",
        f"ht\ntp://user:{SECRET}@w1:5",
        f" http://user:{SECRET}@w1:5",
        f"http://user:{SECRET}\t@w1:5",
        f"user:http://{SECRET}@w1:5",
        f"ftp://user:{SECRET}@w1:5",
        f"http://[user:{SECRET}@::1]:5",
        f"http://w1:5?token={SECRET}",
        f"http://w1:5/?token={SECRET}",
        f"http://w1:5?{SECRET}",
        f"http://w1:5?a@b&token={SECRET}",
        f"http://w1:5/?to\nken={SECRET}",
        f"http://w1:5%3Ftoken={SECRET}",
        f"http://w1:5\uff1ftoken\uff1d{SECRET}",
        f"http://w1:5;token={SECRET}",
        f"http://w1:5&token={SECRET}",
        f"http://w1:5#{SECRET}",
        f"http://w1:5/#{SECRET}",
        f"http://w1:5/{SECRET}",
        f"w1:5?token={SECRET}",
        f"token={SECRET}",
        f"grpc+unix:///run/w?token={SECRET}",
        f"grpc+unix:///run/w=1?token={SECRET}",
        f"grpc+unix:///user:{SECRET}@w1#",
        f"grpc+unix://user:{SECRET}@/run/w",
        f"http://user:{SECRET}",
        f"http://w1:5 --token {SECRET}",
        f"http://user:{SECRET}{'x' * 3_000}@w1:5",
        f"http://{'x' * 3_000}?token={SECRET}",
    ],
)
def test_secrets_are_masked_in_any_spelling(written: str) -> None:
    assert SECRET not in mask_url(written)
    with pytest.raises(InvalidWorkerUrlError) as caught:
        parse_worker_url(written)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert SECRET not in str(caught.value.url)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("http://user:pw@w1:5", "http://***@w1:5"),
        ("http://w1:5?a=1", "http://w1:5?***"),
        ("http://w1:5/api/v1", "http://w1:5/***"),
        ("http://w1:5#f", "http://w1:5#***"),
        ("w1:5", "w1:5"),
        ("http://b\u00fccher:5", "http://b\\xfccher:5"),
        ("http://w1:5\n", "http://w1:5\\n"),
        ("http://w\ud800:5", "http://w\\ud800:5"),
        ("grpc+unix:///run/a=b.sock", "grpc+unix:///run/a=b.sock"),
    ],
)
def test_masking_keeps_the_address(written: str, shown: str) -> None:
    assert mask_url(written) == shown


@pytest.mark.parametrize(
    "key", ["http://w1:5", "https://[2001:db8::1]:443", "grpc+unix:///run/a%20b+c=d;e"]
)
def test_masking_leaves_a_canonical_url_alone(key: str) -> None:
    canonical = parse_worker_url(key).key
    assert mask_url(canonical) == canonical


@pytest.mark.parametrize(
    "url", ["http://[user:s3cr3t]", "http://[user:s3cr3t", "http://h|s3cr3t", "http://h,s3cr3t:1"]
)
def test_a_secret_is_masked_where_no_standard_would_put_it(url):
    assert "s3cr3t" not in mask_url(url)
    with pytest.raises(InvalidWorkerUrlError) as caught:
        parse_worker_url(url)
    assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t" not in str(caught.value.url)
