"""Messages between coordinator and worker: they round-trip, and nothing else parses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resolver.distributed._wire import (
    AwaitRequest,
    NodeMetrics,
    OutputKey,
    PartitionReport,
    PartitionSource,
    PartitionTicket,
    ReleaseRequest,
    StageInput,
    TaskReport,
    TaskRequest,
    WireError,
    parse_query_id,
)

QUERY = "0123456789abcdef" * 2
KEY = OutputKey(QUERY, 1, 2, 0)
TICKET = {"query": QUERY, "stage": 1, "task": 2, "attempt": 0, "partition": 3, "first_batch": 0}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def source(number, *files):
    return PartitionSource("http://a:1", KEY, number, 10, 2, 300, files)


REQUEST = TaskRequest(
    output=KEY,
    plan=b"plan\nwith\nlines\x00",
    settings={"a": "b"},
    inputs=(
        StageInput(7, b"schema", ((source(0, b"one\n", b"two"), source(1)), ())),
        StageInput(8, b"", ((source(2, b""),),)),
    ),
    passthrough=("x-tenant",),
    wait=1.5,
    compression="lz4",
    lease=30.0,
    worker_timeout=4,
)
REPORT = TaskReport(
    partitions=(PartitionReport(1, 2, 3), PartitionReport(0, 0, 0)),
    schema=b"\x00schema",
    seconds=0.5,
    fetched_bytes=9,
    nodes=(NodeMetrics(1, 0.25, 0),),
    files=((b"a\nb", b"c"), ()),
    probed=True,
)


def test_messages_round_trip():
    ticket = PartitionTicket(KEY, 3, 17)
    assert PartitionTicket.parse(ticket.to_bytes()) == ticket
    assert TaskRequest.parse(REQUEST.to_bytes()) == REQUEST
    assert TaskReport.parse(REPORT.to_bytes()) == REPORT
    plain = TaskReport((), b"", 0.0)
    assert TaskReport.parse(plain.to_bytes()) == plain
    awaited = AwaitRequest(KEY, 2.5)
    assert AwaitRequest.parse(awaited.to_bytes()) == awaited
    released = ReleaseRequest((KEY, OutputKey(QUERY, 9, 8, 7)))
    assert ReleaseRequest.parse(released.to_bytes()) == released
    assert parse_query_id(QUERY.encode()) == QUERY


@pytest.mark.parametrize(
    "outputs", [None, [], {}, [1], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, "3"]], [[1, 2, 3], [-1, 0, 0]]]
)
def test_a_release_with_anything_unexpected_is_refused(outputs):
    with pytest.raises(WireError):
        ReleaseRequest.parse(json.dumps({"query": QUERY, "outputs": outputs}).encode())


@pytest.mark.parametrize("message", [REQUEST, REPORT])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x"])
def test_a_message_that_is_cut_or_longer_is_refused(message, change):
    with pytest.raises(WireError, match=r"shorter|longer"):
        type(message).parse(change(message.to_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        {"query": "../../etc/passwd"},
        {"query": QUERY.upper()},
        {"query": QUERY + "\n"},
        {"query": None},
        {"query": [QUERY]},
        {"stage": -1},
        {"stage": True},
        {"task": 1.0},
        {"task": "2"},
        {"attempt": 1 << 40},
        {"partition": None},
        {"path": "/etc/passwd"},
    ],
)
def test_a_ticket_with_anything_unexpected_is_refused(change):
    assert PartitionTicket.parse(json.dumps(TICKET).encode()) == PartitionTicket(KEY, 3)
    with pytest.raises(WireError):
        PartitionTicket.parse(json.dumps({**TICKET, **change}).encode())


@pytest.mark.parametrize("missing", TICKET)
def test_a_ticket_without_a_field_is_refused(missing):
    fields = {name: value for name, value in TICKET.items() if name != missing}
    with pytest.raises(WireError, match="exactly the fields"):
        PartitionTicket.parse(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "parse",
    [
        PartitionTicket.parse,
        ReleaseRequest.parse,
        TaskRequest.parse,
        TaskReport.parse,
        parse_query_id,
    ],
)
@pytest.mark.parametrize(
    "data", [b"", b"\n", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b"x" * 2_000_000]
)
def test_what_is_no_message_is_refused(parse, data):
    with pytest.raises(WireError):
        parse(data)


@given(st.binary(max_size=200))
def test_random_bytes_never_parse_into_a_ticket(data):
    with pytest.raises(WireError):
        PartitionTicket.parse(data)


@given(st.dictionaries(st.sampled_from(sorted(TICKET)), JSON))
def test_random_fields_parse_strictly_or_not_at_all(fields):
    try:
        ticket = PartitionTicket.parse(json.dumps({**TICKET, **fields}).encode())
    except WireError:
        return
    assert json.loads(ticket.to_bytes()) == {**TICKET, **fields}


@given(JSON, st.binary(max_size=20))
def test_random_headers_never_become_a_request(header, rest):
    with pytest.raises(WireError):
        TaskRequest.parse(json.dumps(header).encode() + b"\n" + rest)


def changed(message, change):
    """The message with these fields in its line of JSON."""
    line, _, body = message.to_bytes().partition(b"\n")
    return json.dumps({**json.loads(line), **change}).encode() + b"\n" + body


INPUT = {"number": 1, "schema": "", "partitions": []}


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"settings": {"a": 1}},
        {"passthrough": "x"},
        {"passthrough": [1]},
        {"inputs": {}},
        {"inputs": [{}]},
        {"inputs": [{**INPUT, "number": -1}]},
        {"inputs": [{**INPUT, "schema": "%%%"}]},
        {"inputs": [{**INPUT, "partitions": [[[]]]}]},
        {"inputs": [{**INPUT, "partitions": 3}]},
        {"inputs": [{**INPUT, "partitions": [[["u", QUERY, 1, 2, 0, 0, 1, 1, 1, [-1]]]]}]},
        {"inputs": [{**INPUT, "partitions": [[[5, QUERY, 1, 2, 0, 0, 1, 1, 1, []]]]}]},
        {"inputs": [{**INPUT, "partitions": [[["u", "../..", 1, 2, 0, 0, 1, 1, 1, []]]]}]},
        {"plan": -1},
        {"plan": 1 << 40},
        {"plan": True},
        {"wait": 1e9},
        {"wait": "1"},
        {"lease": float("inf")},
        {"lease": 10**400},
        {"lease": -1},
        {"worker_timeout": None},
        {"compression": "gzip"},
    ],
)
def test_a_malformed_request_is_refused(change):
    assert TaskRequest.parse(changed(REQUEST, {})) == REQUEST
    with pytest.raises(WireError):
        TaskRequest.parse(changed(REQUEST, change))


@pytest.mark.parametrize(
    "change",
    [
        {"partitions": [[1, 2]]},
        {"partitions": 3},
        {"schema": "%%%"},
        {"schema": 1},
        {"seconds": "x"},
        {"nodes": [[1]]},
        {"files": [[1]]},
        {"files": [["x"], []]},
    ],
)
def test_a_malformed_report_is_refused(change):
    assert TaskReport.parse(changed(REPORT, {})) == REPORT
    with pytest.raises(WireError):
        TaskReport.parse(changed(REPORT, change))


def test_the_report_of_a_very_wide_table_is_accepted():
    report = TaskReport((PartitionReport(1, 1, 1),), b"s" * (2 << 20), 0.5)
    assert TaskReport.parse(report.to_bytes()) == report
