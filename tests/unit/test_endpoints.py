"""What `resolver.read` decides about endpoints, without a server."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import flight

from resolver import ResolverError, WorkerConnectError
from resolver._endpoints import (
    check_schema,
    endpoint_name,
    has_expired,
    in_order_of_trial,
    most_telling,
    places_of,
    renewal_of,
    renewed_endpoint,
)
from tests.support.flight_info import REUSE, endpoint

NAME = endpoint_name(0, 1)


def places(*locations, origin="http://origin:1", allow=None):
    return places_of(endpoint(b"t", *locations), name=NAME, origin=origin, allow=allow)


def test_spellings_of_one_worker_are_one_place_in_the_servers_order():
    found = places("grpc://B:2", "http://a:1", "grpc+tcp://b:2", "grpc+tls://b:2")
    assert found == ["http://b:2", "http://a:1", "https://b:2"]


@pytest.mark.parametrize("locations", [(), (REUSE,), ("arrow-flight-reuse-connection://",)])
def test_reuse_is_no_url(locations):
    assert places(*locations) == [None]


def test_reuse_stands_in_its_place_among_others():
    assert places("grpc://a:1", REUSE, "grpc://b:1") == ["http://a:1", None, "http://b:1"]
    assert places("grpc://a:1", REUSE, origin=None) == ["http://a:1"]


def test_allow_is_not_asked_about_the_origin():
    assert places(REUSE, "grpc://a:1", allow=lambda _: False) == [None]


def test_nothing_usable_tells_why_and_no_secret():
    with pytest.raises(ResolverError) as caught:
        places("grpc://user:pass@host:1", "s3://bucket/x", REUSE, origin=None)
    assert "pass@" not in str(caught.value)
    assert NAME in str(caught.value)
    assert "url=" in str(caught.value)


@given(
    st.lists(st.sampled_from(["a", "b", "c", "d", None]), unique=True),
    st.sets(st.sampled_from(["a", "b", "c", "d", None])),
)
def test_what_failed_comes_last_and_nothing_else_moves(given_places, failed):
    ordered = in_order_of_trial(given_places, failed)
    assert ordered == [p for p in given_places if p not in failed] + [
        p for p in given_places if p in failed
    ]


def test_expiry():
    assert not has_expired(endpoint(b"t"), 2**62)
    one = endpoint(b"t", expires_in=10)
    at = one.expiration_time.value
    assert not has_expired(one, at - 1)
    assert has_expired(one, at)


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_400])
def test_a_renewal_is_the_request_that_protobuf_encodes(size):
    wrappers = pytest.importorskip("google.protobuf.wrappers_pb2")
    old = endpoint(b"x" * size, "grpc://a:1")
    action = renewal_of(old)
    assert action.type == "RenewFlightEndpoint"
    # A message and bytes look alike on the wire, and BytesValue's only field is 1 as well.
    body = action.body.to_pybytes()
    assert wrappers.BytesValue.FromString(body).value == old.serialize()


def test_a_renewal_without_an_answer_is_an_error():
    with pytest.raises(ResolverError, match="without an endpoint"):
        renewed_endpoint([])
    answer = flight.Result(pa.py_buffer(endpoint(b"new", "grpc://a:1").serialize()))
    assert renewed_endpoint([answer]).ticket.ticket == b"new"


def test_metadata_of_schema_and_fields_does_not_count_but_the_rest_does():
    plain = pa.schema([("a", pa.int64())])
    marked = pa.schema([pa.field("a", pa.int64(), metadata={"k": "v"})], metadata={"k": "v"})
    check_schema(plain, marked, name=NAME, url="http://a:1")
    for other in [
        pa.schema([("a", pa.int32())]),
        pa.schema([("b", pa.int64())]),
        pa.schema([pa.field("a", pa.int64(), nullable=False)]),
        pa.schema([]),
    ]:
        with pytest.raises(ResolverError, match=r"endpoint 1 of 1.*http://a:1.*a: int64"):
            check_schema(plain, other, name=NAME, url="http://a:1")


def test_a_servers_own_answer_is_told_before_a_lost_connection():
    lost, said, late = WorkerConnectError("lost"), flight.FlightServerError("no"), OSError("late")
    assert most_telling([lost, said, late]) is said
    assert [note.split(": ", 1)[1] for note in said.__notes__] == [
        "WorkerConnectError: lost",
        "OSError: late",
    ]
    assert most_telling([lost]) is lost
