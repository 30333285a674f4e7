"""Messages between coordinator and worker: they round-trip, and nothing else parses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resolver.distributed._wire import (
    OutputKey,
    PartitionReport,
    PartitionTicket,
    TaskReport,
    TaskRequest,
    WireError,
    parse_query_id,
)

QUERY = "0123456789abcdef" * 2
KEY = OutputKey(QUERY, 1, 2, 0)
TICKET = {"query": QUERY, "stage": 1, "task": 2, "attempt": 0, "partition": 3}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def test_messages_round_trip():
    ticket = PartitionTicket(KEY, 3)
    assert PartitionTicket.parse(ticket.to_bytes()) == ticket
    request = TaskRequest(KEY, b"plan\nwith\nlines\x00", {"a": "b"})
    assert TaskRequest.parse(request.to_bytes()) == request
    report = TaskReport((PartitionReport(1, 2, 3), PartitionReport(0, 0, 0)), b"\x00schema", 0.5)
    assert TaskReport.parse(report.to_bytes()) == report
    assert TaskReport.parse(TaskReport((), None, 0.0).to_bytes()).schema is None
    assert parse_query_id(QUERY.encode()) == QUERY


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
    "parse", [PartitionTicket.parse, TaskRequest.parse, TaskReport.parse, parse_query_id]
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


@pytest.mark.parametrize("settings", [None, [], {"a": 1}, {"a": None}])
def test_settings_must_be_strings(settings):
    header = {"query": QUERY, "stage": 1, "task": 2, "attempt": 0, "settings": settings}
    with pytest.raises(WireError, match="settings"):
        TaskRequest.parse(json.dumps(header).encode() + b"\nplan")


@pytest.mark.parametrize(
    "change",
    [
        {"partitions": [[1, 2]]},
        {"partitions": 3},
        {"schema": "%%%"},
        {"schema": 1},
        {"seconds": "x"},
    ],
)
def test_a_malformed_report_is_refused(change):
    report = {"partitions": [[1, 2, 3]], "schema": None, "seconds": 1.0}
    TaskReport.parse(json.dumps(report).encode())
    with pytest.raises(WireError, match="report"):
        TaskReport.parse(json.dumps({**report, **change}).encode())


def test_the_report_of_a_very_wide_table_is_accepted():
    report = TaskReport((PartitionReport(1, 1, 1),), b"s" * (2 << 20), 0.5)
    assert TaskReport.parse(report.to_bytes()) == report
