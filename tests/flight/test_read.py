"""`resolver.read`: every endpoint once, from a location that answers, in bounded memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

import resolver
from resolver import DefaultChannelResolver, FlightConnector, GrpcConnector
from resolver._endpoints import SchemaMismatchError
from resolver._fetch import THREAD_NAME
from resolver.testing import FaultyProxy
from tests.support.flight_info import (
    REUSE,
    SCHEMA,
    EndpointServer,
    batch,
    endpoint,
    endpoints_at,
    make_info,
)
from tests.support.threads import Background, wait_until


@pytest.fixture
def server():
    with EndpointServer() as running:
        yield running


@pytest.fixture
def channels():
    with DefaultChannelResolver(FlightConnector(connect_timeout=1.0)) as made:
        yield made
    wait_until(lambda: not fetching())


def fetching():
    return [each for each in threading.enumerate() if each.name == THREAD_NAME]


def rows(table):
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def expected(endpoints, batches=3):
    return [(each, number) for each in range(endpoints) for number in range(batches)]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_dead_and_a_slow_location_are_followed_by_a_live_one(
    server, channels, closed_port, ordered
):
    with FaultyProxy(None, mode="silent") as slow:
        places = [f"http://127.0.0.1:{closed_port}", slow.url, server.url]
        info = make_info(endpoints_at(6, *places), ordered=ordered)
        table = resolver.read(info, channels, concurrency=2).read_all()
        assert sorted(rows(table)) == expected(6)
        # Two threads begin at once; after them the places that failed are tried last.
        assert channels.stats().connect_failures <= 4
    assert sorted(server.tickets) == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_an_ordered_info_keeps_the_order_of_its_endpoints(server, channels):
    may_begin = threading.Event()

    def late():
        may_begin.wait(30)
        yield batch(0, 0)

    def last():
        may_begin.set()
        yield batch(7, 0)

    server.streams = {0: late, 7: last}
    info = make_info(endpoints_at(8, server.url), ordered=True)
    # The buffer is full of later endpoints before the first one gives anything.
    batches = resolver.read_batches(info, channels, concurrency=8, prefetch=2)
    table = pa.Table.from_batches(batches, SCHEMA)
    middle = [row for row in expected(8) if row[0] in range(1, 7)]
    assert rows(table) == [(0, 0), *middle, (7, 0)]


def test_an_unordered_info_gives_batches_as_they_come(server, channels):
    may_begin = threading.Event()

    def late():
        may_begin.wait(30)
        yield batch(0, 0)

    server.streams = {0: late}
    reader = resolver.read(make_info(endpoints_at(2, server.url)), channels)
    first = [reader.read_next_batch().to_pylist()[0]["endpoint"] for _ in range(3)]
    may_begin.set()
    assert first == [1, 1, 1]
    assert [each.to_pylist() for each in reader] == [[{"endpoint": 0, "i": 0}]]


@pytest.mark.parametrize("ordered", [True, False])
def test_many_endpoints_are_read_a_few_at_a_time(server, channels, ordered):
    info = make_info(endpoints_at(200, server.url), ordered=ordered)
    table = resolver.read(info, channels, concurrency=4).read_all()
    found = rows(table)
    assert (found if ordered else sorted(found)) == expected(200)
    assert 1 <= server.peak <= 4
    assert channels.stats().connects == 1


@pytest.mark.parametrize("ordered", [True, False])
def test_a_slow_reader_makes_the_fetching_wait(server, channels, ordered):
    server.batches = 50
    info = make_info(endpoints_at(20, server.url), ordered=ordered)
    with resolver.read_batches(info, channels, concurrency=3, prefetch=5) as batches:
        next(batches)
        wait_until(lambda: batches._fetch._waiting >= 5)
        assert sum(1 for _ in batches) == 20 * 50 - 1
        assert batches.peak_waiting <= 6
    assert server.sent == 1_000


def test_what_nobody_reads_is_not_sent(server, channels):
    server.batches = 10_000
    wide = pa.schema([("endpoint", pa.int64()), ("i", pa.string())])
    block = "x" * 1_000_000
    server.schemas = {0: wide}
    server.streams = {
        0: lambda: (pa.record_batch([[0], [block]], schema=wide) for _ in range(10_000))
    }
    info = make_info(endpoints_at(1, server.url), schema=wide)
    with resolver.read_batches(info, channels, prefetch=2) as batches:
        next(batches)
        wait_until(lambda: batches._fetch._waiting >= 2)
    wait_until(lambda: server.active == 0)  # the server was told
    assert server.sent < 1_000


@pytest.mark.parametrize("end", ["close", "drop", "with"])
def test_the_reader_goes_and_the_fetching_ends(server, channels, end):
    server.batches = 1_000_000
    reader = resolver.read(make_info(endpoints_at(9, server.url)), channels, concurrency=3)
    assert not fetching()  # nothing is fetched before it is asked for
    if end == "with":
        with reader:
            reader.read_next_batch()
    else:
        reader.read_next_batch()
        assert fetching()
        if end == "close":
            reader.close()
    if end == "drop":
        del reader
        gc.collect()
    else:
        with pytest.raises(pa.ArrowInvalid, match="closed"):
            reader.read_next_batch()
    wait_until(lambda: not fetching())
    wait_until(lambda: server.active == 0)


def test_an_error_in_mid_stream_surfaces_and_stops_the_rest(server, channels):
    def broken():
        yield batch(1, 0)
        raise flight.FlightServerError("the disk is gone")

    server.batches = 1_000_000
    server.streams = {1: broken}
    info = make_info(endpoints_at(3, server.url, "http://127.0.0.1:1"))
    batches = resolver.read_batches(info, channels)
    with pytest.raises(flight.FlightServerError, match="the disk is gone") as caught:
        list(batches)
    assert any("endpoint 2 of 3" in note for note in caught.value.__notes__)
    wait_until(lambda: not fetching())
    wait_until(lambda: server.active == 0)
    # Nothing was read twice, and an application's error costs no connection.
    assert server.tickets.count(b"1") == 1
    assert channels.stats().invalidated == 0
    reader = resolver.read(info, channels)
    for _ in range(2):  # no short result afterwards
        with pytest.raises(OSError, match=r"FlightServerError.*the disk is gone.*endpoint 2 of 3"):
            reader.read_all()


@pytest.mark.parametrize("ask", [next, lambda batches: batches.schema], ids=["batch", "schema"])
def test_a_read_that_failed_leaves_nothing_in_memory(channels, closed_port, ask):
    info = make_info(endpoints_at(1, f"http://127.0.0.1:{closed_port}"), schema=None)
    batches = resolver.read_batches(info, channels)
    with pytest.raises(resolver.WorkerConnectError):
        ask(batches)
    left = weakref.ref(batches)
    del batches
    wait_until(lambda: gc.collect() >= 0 and left() is None)


def test_after_an_interrupt_there_is_no_short_result(server, channels, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    server.batches = 1_000_000
    batches = resolver.read_batches(make_info(endpoints_at(3, server.url)), channels)
    next(batches)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(batches._fetch, "take", interrupt)
        next(batches)
    wait_until(lambda: server.active == 0)
    with pytest.raises(resolver.ResolverError, match="interrupted"):
        next(batches)


def test_a_lost_connection_costs_that_very_client(channels):
    with EndpointServer() as server, FaultyProxy(server.port) as proxy:
        server.batches = 1_000_000
        info = make_info(endpoints_at(1, proxy.url, server.url))
        batches = resolver.read_batches(info, channels)
        next(batches)
        proxy.set_mode("refuse")
        proxy.drop_connections()
        with pytest.raises(flight.FlightUnavailableError):
            list(batches)
        assert channels.stats().invalidated == 1
        assert proxy.url not in channels
        assert server.tickets == [b"0"]  # after a first batch, no other location


def test_a_late_failure_keeps_the_replacement(channels):
    with EndpointServer() as server, FaultyProxy(server.port) as proxy:
        server.batches = 1_000_000
        batches = resolver.read_batches(make_info(endpoints_at(1, proxy.url)), channels)
        next(batches)
        channels.invalidate(proxy.url)
        replacement = channels.get_flight_client_for_url(proxy.url)
        proxy.drop_connections()
        with pytest.raises(flight.FlightUnavailableError):
            list(batches)
        assert channels.get_flight_client_for_url(proxy.url) is replacement


def test_dropped_batches_end_the_fetching(server, channels):
    server.batches = 1_000_000
    batches = resolver.read_batches(make_info(endpoints_at(2, server.url)), channels)
    next(batches)
    assert fetching()
    del batches
    gc.collect()
    wait_until(lambda: not fetching())
    wait_until(lambda: server.active == 0)


@pytest.mark.parametrize("error", [flight.FlightServerError, flight.FlightUnavailableError])
def test_a_server_that_says_no_is_followed_by_the_next(server, channels, error):
    with EndpointServer() as other:

        def refuse():
            raise error("no such ticket here")

        other.streams = {0: refuse}
        info = make_info([endpoint(b"0", other.url, server.url)])
        assert rows(resolver.read(info, channels).read_all()) == expected(1)
        assert channels.stats().invalidated == 0


def test_when_no_location_answers_the_error_tells_what_each_said(channels, closed_port):
    with EndpointServer() as other:

        def refuse():
            raise flight.FlightServerError("no such ticket here")

        other.streams = {0: refuse}
        dead = f"http://127.0.0.1:{closed_port}"
        info = make_info([endpoint(b"0", other.url, dead)])
        with pytest.raises(flight.FlightServerError, match="no such ticket") as caught:
            list(resolver.read_batches(info, channels))
        assert any(dead in note for note in caught.value.__notes__)
        with pytest.raises(resolver.WorkerConnectError):
            list(resolver.read_batches(make_info([endpoint(b"0", dead)]), channels))


def test_a_hanging_call_ends_with_its_timeout(channels):
    go_on = threading.Event()
    with EndpointServer() as server:

        def hang():
            go_on.wait(30)
            yield batch(0, 0)

        server.streams = {0: hang}
        try:
            with pytest.raises(flight.FlightTimedOutError):
                list(
                    resolver.read_batches(
                        make_info(endpoints_at(1, server.url)), channels, timeout=0.2
                    )
                )
        finally:
            go_on.set()


@pytest.fixture(params=["before", "after"])
def hanging(request):
    """A server that answers a probe and then says nothing, or its schema alone."""
    with EndpointServer() as server:
        server.hangs = request.param
        yield server


@pytest.mark.parametrize("connector", [FlightConnector, GrpcConnector])
def test_a_location_that_hangs_is_left_for_the_next(server, hanging, connector):
    info = make_info(endpoints_at(6, hanging.url, server.url))
    with DefaultChannelResolver(connector()) as channels:
        table = resolver.read(info, channels, concurrency=2, answer_timeout=2.0).read_all()
        assert sorted(rows(table)) == expected(6)
        # Two threads begin at once; after them it is tried last.
        assert len(hanging.tickets) <= 2
        hanging.go_on.set()
        wait_until(lambda: not fetching())


def test_where_all_hang_the_error_says_so(channels, hanging):
    info = make_info(endpoints_at(1, hanging.url))
    with pytest.raises(flight.FlightTimedOutError, match=r"no batch within 0\.1 s"):
        list(resolver.read_batches(info, channels, answer_timeout=0.1))
    hanging.go_on.set()  # for pyarrow, which cannot cancel a call without a first word


def test_a_slow_reader_and_an_empty_stream_are_no_hanging_location(server, channels):
    server.streams = {1: lambda: iter(())}
    batches = resolver.read_batches(
        make_info(endpoints_at(2, server.url)), channels, prefetch=1, answer_timeout=30.0
    )
    next(batches)
    wait_until(lambda: server.active == 0)
    assert len(list(batches)) == 2


def test_closing_ends_a_stream_that_has_yet_to_give_a_batch(server, channels):
    with EndpointServer() as hanging:
        hanging.hangs = "after"
        info = make_info(endpoints_at(1, hanging.url, server.url))
        batches = resolver.read_batches(info, channels, answer_timeout=3_600)
        reading = Background(lambda: list(batches))
        wait_until(lambda: hanging.tickets)
        batches.close()
        assert reading.result() == []
        wait_until(lambda: not fetching())


@pytest.mark.parametrize("locations", [(), (REUSE,)])
def test_a_descriptor_is_asked_of_the_url_and_its_endpoints_reuse_that(server, channels, locations):
    server.info = make_info(endpoints_at(2, *locations))
    descriptor = flight.FlightDescriptor.for_command(b"x")
    reader = resolver.read(descriptor, channels, url=server.url)
    assert reader.schema == SCHEMA
    assert sorted(rows(reader.read_all())) == expected(2)
    assert channels.urls() == [server.url]
    with pytest.raises(TypeError, match="url="):
        resolver.read(descriptor, channels)
    with pytest.raises(resolver.ResolverError, match=r"endpoint 1 of 2.*url="):
        list(resolver.read_batches(server.info, channels, concurrency=1))


def test_allow_restricts_where_headers_go(server, channels):
    with EndpointServer() as stranger:
        info = make_info([endpoint(b"0", stranger.url, server.url)])
        seen = []

        def allow(url):
            seen.append(url)
            return url == server.url

        assert rows(resolver.read(info, channels, allow=allow).read_all()) == expected(1)
        assert seen == [stranger.url, server.url]
        assert channels.urls() == [server.url]
        with pytest.raises(resolver.ResolverError, match="allow= refused"):
            list(resolver.read_batches(info, channels, allow=lambda _: False))


def test_a_location_that_is_no_worker_is_left_out(server, channels):
    info = make_info([endpoint(b"0", "s3://bucket/file", server.url)])
    assert rows(resolver.read(info, channels).read_all()) == expected(1)


def test_an_expired_endpoint_is_renewed(server, channels):
    def renew(old):
        assert old.ticket.ticket == b"0-" + b"x" * 300  # more than one byte of length
        return endpoint(b"0-renewed", server.url, expires_in=60)

    server.renew = renew
    info = make_info(
        [
            endpoint(b"0-" + b"x" * 300, server.url, expires_in=-1),
            endpoint(b"1", server.url, expires_in=60),
        ]
    )
    table = resolver.read(info, channels, url=server.url).read_all()
    assert sorted(rows(table)) == expected(2)
    assert sorted(server.tickets) == [b"0-renewed", b"1"]


def test_an_endpoint_that_cannot_be_renewed_is_tried_as_it_is(server, channels):
    info = make_info([endpoint(b"0", server.url, expires_in=-1)])
    assert rows(resolver.read(info, channels, url=server.url).read_all()) == expected(1)

    def refuse():
        raise flight.FlightServerError("too late")

    server.streams = {0: refuse}
    for url, words in [(server.url, "was not renewed"), (None, "without url=")]:
        with pytest.raises(flight.FlightServerError, match="too late") as caught:
            list(resolver.read_batches(info, channels, url=url))
        assert any("has expired" in note and words in note for note in caught.value.__notes__)


def test_another_schema_is_an_error_that_names_the_endpoint(server, channels):
    other = pa.schema([("endpoint", pa.int64()), ("j", pa.int64())])
    server.schemas = {1: other}
    info = make_info(endpoints_at(3, server.url), ordered=True)
    with pytest.raises(SchemaMismatchError, match=r"endpoint 2 of 3.*j: int64") as caught:
        list(resolver.read_batches(info, channels))
    assert caught.value.url == server.url
    with pytest.raises(pa.ArrowInvalid, match="endpoint 2 of 3"):
        resolver.read(info, channels).read_all()


def test_metadata_is_no_part_of_the_schema(server, channels):
    server.schemas = {0: SCHEMA.with_metadata({"made": "yesterday"})}
    assert resolver.read(make_info(endpoints_at(2, server.url)), channels).read_all().num_rows == 6


def test_without_a_schema_the_first_answer_counts(server, channels):
    info = make_info(endpoints_at(2, server.url), schema=None)
    reader = resolver.read(info, channels)
    assert reader.schema == SCHEMA
    assert reader.read_all().num_rows == 6
    with pytest.raises(resolver.ResolverError, match="neither a schema"):
        resolver.read(make_info([], schema=None), channels)


def test_who_closed_before_the_schema_came_is_told_so(server, channels):
    info = make_info(endpoints_at(1, server.url), schema=None)
    batches = resolver.read_batches(info, channels)
    batches.close()
    with pytest.raises(resolver.ResolverError, match="closed before"):
        _ = batches.schema
    with resolver.read_batches(info, channels) as batches:
        next(batches)
    assert batches.schema == SCHEMA


def test_no_endpoints_are_no_rows(channels):
    assert resolver.read(make_info([]), channels).read_all().num_rows == 0


def test_closing_wakes_a_reader_that_waits(server, channels):
    go_on = threading.Event()

    def hang():
        yield batch(0, 0)
        go_on.wait(30)

    server.streams = {0: hang}
    try:
        batches = resolver.read_batches(make_info(endpoints_at(1, server.url)), channels)
        next(batches)
        reading = Background(lambda: list(batches))
        batches.close()
        assert reading.result() == []
        wait_until(lambda: not fetching())  # though the server says nothing still
    finally:
        go_on.set()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"concurrency": 0}, ValueError),
        ({"concurrency": True}, TypeError),
        ({"prefetch": 1.5}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"answer_timeout": -1}, ValueError),
        ({"answer_timeout": True}, TypeError),
        ({"allow": "all"}, TypeError),
        ({"url": "nowhere"}, ValueError),
    ],
)
def test_arguments_that_make_no_sense_are_refused(channels, options, error):
    with pytest.raises(error):
        resolver.read(make_info([]), channels, **options)
    with pytest.raises(TypeError, match="FlightInfo"):
        resolver.read("grpc://x:1", channels)


def test_a_process_may_end_in_the_middle_of_a_reader():
    top = Path(__file__).parents[2]
    script = """
import resolver
from resolver.testing import FlightServerProcess
from pyarrow import flight
from tests.support.flight_info import make_info
from resolver.testing._flight_server import SCHEMA
server = FlightServerProcess()
server.start()
where = [flight.Location(server.url.replace("http", "grpc"))]
info = make_info([flight.FlightEndpoint(b"endless", where)] * 4, schema=SCHEMA)
reader = resolver.read(info)
print(reader.read_next_batch().num_rows)
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=top, env={**os.environ, "PYTHONPATH": str(top)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1024\n", "")
