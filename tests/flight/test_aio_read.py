"""`resolver.aio.read`: all endpoints of an info, from whoever answers, in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import weakref

import pyarrow as pa
import pytest
from pyarrow import flight

pytest.importorskip("grpc")

import resolver
from resolver import aio
from resolver.testing import FaultyProxy
from tests.support.aio import run, until
from tests.support.flight_info import (
    REUSE,
    SCHEMA,
    EndpointServer,
    batch,
    endpoint,
    endpoints_at,
    make_info,
)


@pytest.fixture
def server():
    with EndpointServer() as running:
        yield running


@contextlib.asynccontextmanager
async def channels():
    """A resolver; afterwards nothing may be left that fetches."""
    async with aio.DefaultChannelResolver(aio.GrpcConnector(connect_timeout=1.0)) as made:
        yield made
    await until(lambda: not fetching())


def fetching():
    return [task for task in asyncio.all_tasks() if task.get_name() == "resolver-read"]


def rows(table):
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def expected(endpoints, batches=3):
    return [(each, number) for each in range(endpoints) for number in range(batches)]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_dead_and_a_slow_location_are_followed_by_a_live_one(server, closed_port, ordered):
    async def main(slow):
        places = [f"http://127.0.0.1:{closed_port}", slow.url, server.url]
        info = make_info(endpoints_at(6, *places), ordered=ordered)
        async with channels() as made, await aio.read(info, made, concurrency=2) as batches:
            table = await batches.read_all()
            # Two tasks begin at once; after them the places that failed are tried last.
            assert made.stats().connect_failures <= 4
            return table

    with FaultyProxy(None, mode="silent") as slow:
        assert sorted(rows(run(main(slow)))) == expected(6)
    assert sorted(server.tickets) == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_an_ordered_info_keeps_the_order_of_its_endpoints(server):
    may_begin = threading.Event()

    def late():
        may_begin.wait(30)
        yield batch(0, 0)

    def last():
        may_begin.set()
        yield batch(7, 0)

    server.streams = {0: late, 7: last}

    async def main():
        info = make_info(endpoints_at(8, server.url), ordered=True)
        # The buffer is full of later endpoints before the first one gives anything.
        async with channels() as made:
            return await (await aio.read(info, made, concurrency=8, prefetch=2)).read_all()

    middle = [row for row in expected(8) if row[0] in range(1, 7)]
    assert rows(run(main())) == [(0, 0), *middle, (7, 0)]


def test_an_unordered_info_gives_batches_as_they_come(server):
    may_begin = threading.Event()

    def late():
        may_begin.wait(30)
        yield batch(0, 0)

    server.streams = {0: late}

    async def main():
        async with channels() as made:
            batches = await aio.read(make_info(endpoints_at(2, server.url)), made)
            first = [(await anext(batches)).to_pylist()[0]["endpoint"] for _ in range(3)]
            may_begin.set()
            return first, [each.to_pylist() async for each in batches]

    assert run(main()) == ([1, 1, 1], [[{"endpoint": 0, "i": 0}]])


@pytest.mark.parametrize("ordered", [True, False])
def test_many_endpoints_are_read_a_few_at_a_time(server, ordered):
    async def main():
        async with channels() as made:
            info = make_info(endpoints_at(100, server.url), ordered=ordered)
            table = await (await aio.read(info, made, concurrency=4)).read_all()
            return table, made.stats().connects

    table, connects = run(main())
    found = rows(table)
    assert (found if ordered else sorted(found)) == expected(100)
    assert 1 <= server.peak <= 4
    assert connects == 1


@pytest.mark.parametrize("ordered", [True, False])
def test_a_slow_reader_makes_the_fetching_wait(server, ordered):
    server.batches = 50

    async def main():
        info = make_info(endpoints_at(20, server.url), ordered=ordered)
        async with (
            channels() as made,
            await aio.read(info, made, concurrency=3, prefetch=5) as batches,
        ):
            await anext(batches)
            await until(lambda: batches._fetch._waiting >= 5)
            count = 1
            async for _ in batches:
                count += 1
            return count, batches.peak_waiting

    count, peak = run(main())
    assert count == 20 * 50
    assert peak <= 6


@pytest.mark.parametrize("end", ["aclose", "drop", "cancel", "leave the block"])
def test_the_reader_goes_and_the_fetching_ends(server, end):
    server.batches = 1_000_000

    async def main():
        async with channels() as made:
            info = make_info(endpoints_at(3, server.url))
            batches = await aio.read(info, made)
            await anext(batches)
            assert fetching()
            if end == "aclose":
                await batches.aclose()
                assert not fetching()
                assert [each async for each in batches] == []
                await batches.aclose()
            elif end == "drop":
                del batches
                gc.collect()
            elif end == "cancel":
                task = asyncio.create_task(batches.read_all())
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: not fetching())
            else:
                async with batches:
                    pass
                assert not fetching()
            await until(lambda: not fetching())
            await until(lambda: server.active == 0)

    run(main())


def test_closing_wakes_a_task_that_waits(server):
    go_on = threading.Event()

    def silent():
        go_on.wait(30)
        yield batch(0, 0)

    server.streams = {0: silent}

    async def main():
        async with channels() as made:
            batches = await aio.read(make_info(endpoints_at(1, server.url)), made)
            waiting = asyncio.create_task(batches.read_all())
            await until(fetching)
            await batches.aclose()
            return await waiting

    try:
        assert run(main()).num_rows == 0
    finally:
        go_on.set()


def test_an_error_in_mid_stream_surfaces_and_stops_the_rest(server):
    def broken():
        yield batch(1, 0)
        raise flight.FlightServerError("the disk is gone")

    server.batches = 1_000_000
    server.streams = {1: broken}

    async def main():
        async with channels() as made:
            info = make_info(endpoints_at(3, server.url, "http://127.0.0.1:1"))
            batches = await aio.read(info, made)
            with pytest.raises(flight.FlightServerError, match="the disk is gone") as caught:
                async for _ in batches:
                    pass
            assert any("endpoint 2 of 3" in note for note in caught.value.__notes__)
            await until(lambda: server.active == 0)
            assert made.stats().invalidated == 0

    run(main())
    assert server.tickets.count(b"1") == 1  # nothing was read twice


@pytest.mark.parametrize("ask", [anext, aio.FlightBatches.read_schema], ids=["batch", "schema"])
def test_a_read_that_failed_leaves_nothing_in_memory(closed_port, ask):
    async def main():
        async with channels() as made:
            info = make_info(endpoints_at(1, f"http://127.0.0.1:{closed_port}"), schema=None)
            batches = await aio.read(info, made)
            with pytest.raises(resolver.WorkerConnectError):
                await ask(batches)
            left = weakref.ref(batches)
            del batches
            await until(lambda: gc.collect() >= 0 and left() is None)

    run(main())


def test_after_a_wait_that_was_cancelled_there_is_no_short_result(server):
    may_go_on = threading.Event()

    def slow():
        yield batch(0, 0)
        may_go_on.wait(30)
        yield batch(0, 1)

    server.streams = {0: slow}

    async def main():
        async with channels() as made:
            batches = await aio.read(make_info(endpoints_at(1, server.url)), made)
            await anext(batches)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(batches), 0.1)
            may_go_on.set()
            with pytest.raises(resolver.ResolverError, match="interrupted"):
                await batches.read_all()

    run(main())


def test_a_fetching_task_that_is_cancelled_is_an_error_to_who_reads(server):
    server.batches = 1_000_000

    async def main():
        async with channels() as made:
            batches = await aio.read(make_info(endpoints_at(3, server.url)), made)
            await anext(batches)
            fetching()[0].cancel()
            with pytest.raises(resolver.ResolverError, match="interrupted"):
                await batches.read_all()
            await until(lambda: server.active == 0)

    run(main())


def test_a_lost_connection_costs_that_very_client():
    async def main(server, proxy):
        server.batches = 1_000_000
        async with channels() as made:
            info = make_info(endpoints_at(1, proxy.url, server.url))
            batches = await aio.read(info, made)
            await anext(batches)
            proxy.set_mode("refuse")
            proxy.drop_connections()
            with pytest.raises(flight.FlightUnavailableError):
                async for _ in batches:
                    pass
            assert made.stats().invalidated == 1
            assert proxy.url not in made
            assert server.tickets == [b"0"]  # after a first batch, no other location

    with EndpointServer() as server, FaultyProxy(server.port) as proxy:
        run(main(server, proxy))


def test_when_no_location_answers_the_error_tells_what_each_said(server, closed_port):
    def refuse():
        raise flight.FlightServerError("no such ticket here")

    server.streams = {0: refuse}
    dead = f"http://127.0.0.1:{closed_port}"

    async def main():
        async with channels() as made:
            batches = await aio.read(make_info([endpoint(b"0", server.url, dead)]), made)
            with pytest.raises(flight.FlightServerError, match="no such ticket") as caught:
                await batches.read_all()
            assert any(dead in note for note in caught.value.__notes__)
            batches = await aio.read(make_info([endpoint(b"0", dead)]), made)
            with pytest.raises(resolver.WorkerConnectError):
                await batches.read_all()

    run(main())


@pytest.mark.parametrize("hangs", ["before", "after"])
def test_a_location_that_hangs_is_left_for_the_next(server, hangs):
    async def main(hanging):
        async with channels() as made:
            info = make_info(endpoints_at(6, hanging.url, server.url))
            async with await aio.read(info, made, concurrency=2, answer_timeout=2.0) as batches:
                table = await batches.read_all()
            assert len(hanging.tickets) <= 2
            only = make_info(endpoints_at(1, hanging.url))
            with pytest.raises(flight.FlightTimedOutError, match=r"no batch within 0\.1 s"):
                await (await aio.read(only, made, answer_timeout=0.1)).read_all()
            return table

    with EndpointServer() as hanging:
        hanging.hangs = hangs
        assert sorted(rows(run(main(hanging)))) == expected(6)


@pytest.mark.parametrize("locations", [[], [REUSE]])
def test_a_descriptor_is_asked_of_the_url_and_its_endpoints_reuse_that(server, locations):
    server.info = make_info(
        [flight.FlightEndpoint(b"0", [flight.Location(each) for each in locations])]
    )

    async def main():
        async with channels() as made:
            descriptor = flight.FlightDescriptor.for_command(b"x")
            batches = await aio.read(descriptor, made, url=server.url)
            assert batches.info.descriptor == descriptor
            return await batches.read_all()

    assert rows(run(main())) == expected(1)


def test_an_expired_endpoint_is_renewed(server):
    renewed = []

    def renew(asked):
        renewed.append(asked.ticket.ticket)
        return endpoint(b"1", server.url, expires_in=60)

    server.renew = renew

    async def main():
        async with channels() as made:
            info = make_info([endpoint(b"0", server.url, expires_in=-1)])
            return await (await aio.read(info, made, url=server.url)).read_all()

    assert rows(run(main())) == [(1, 0), (1, 1), (1, 2)]
    assert renewed == [b"0"]


def test_an_endpoint_that_cannot_be_renewed_is_tried_as_it_is(server):
    async def main(url):
        async with channels() as made:
            info = make_info([endpoint(b"0", server.url, expires_in=-1)])
            return await (await aio.read(info, made, url=url)).read_all()

    for url in (server.url, None):
        assert rows(run(main(url))) == expected(1)


def test_schemas_agree_or_it_is_an_error(server):
    other = pa.schema([("endpoint", pa.int64()), ("i", pa.string())])
    server.schemas = {1: other}
    server.streams = {1: lambda: iter([pa.record_batch([[1], ["x"]], schema=other)])}

    async def main(schema):
        async with channels() as made:
            info = make_info(endpoints_at(2, server.url), ordered=True, schema=schema)
            batches = await aio.read(info, made, concurrency=1)
            assert (await batches.read_schema()).equals(SCHEMA)
            with pytest.raises(ValueError, match="endpoint 2 of 2"):
                await batches.read_all()

    run(main(SCHEMA))
    run(main(None))


def test_no_endpoints_are_no_rows():
    async def main():
        async with channels() as made:
            assert (await (await aio.read(make_info([]), made)).read_all()).num_rows == 0
            batches = await aio.read(make_info([], schema=None), made)
            with pytest.raises(resolver.ResolverError, match="neither a schema"):
                await batches.read_schema()
            await batches.aclose()
            with pytest.raises(resolver.ResolverError, match="closed before"):
                await batches.read_schema()

    run(main())


def test_allow_restricts_where_headers_go(server):
    async def main():
        async with channels() as made:
            info = make_info([endpoint(b"0", server.url)])
            batches = await aio.read(info, made, allow=lambda _: False)
            with pytest.raises(resolver.ResolverError):
                await batches.read_all()

    run(main())
    assert server.tickets == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"concurrency": 0}, ValueError),
        ({"prefetch": "8"}, TypeError),
        ({"timeout": -1}, ValueError),
        ({"answer_timeout": 0}, ValueError),
        ({"allow": "all"}, TypeError),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, error):
    async def main():
        async with channels() as made:
            with pytest.raises(error):
                await aio.read(make_info([]), made, **options)
            with pytest.raises(TypeError, match="FlightInfo"):
                await aio.read("info", made)
            with pytest.raises(TypeError, match="url="):
                await aio.read(flight.FlightDescriptor.for_command(b"x"), made)

    run(main())


def test_a_loop_may_end_in_the_middle_of_a_read(server):
    server.batches = 1_000_000
    held = []

    async def main():
        made = aio.DefaultChannelResolver()
        batches = await aio.read(make_info(endpoints_at(2, server.url)), made)
        await anext(batches)
        held.append(batches)

    run(main())
    held.clear()  # its loop is closed by now
    gc.collect()


def test_a_reader_of_another_loop_says_whose_it_is(server):
    async def begin():
        made = aio.DefaultChannelResolver()
        batches = await aio.read(make_info(endpoints_at(1, server.url)), made)
        await anext(batches)
        return made, batches

    async def end(made, batches):
        assert (await batches.read_all()).num_rows == 2
        await made.aclose()

    with asyncio.Runner() as first, asyncio.Runner() as second:
        made, batches = first.run(begin())
        for use in (lambda: anext(batches), batches.aclose):

            async def elsewhere(use=use):
                async with asyncio.timeout(5):
                    await use()

            with pytest.raises(RuntimeError, match="belongs to the event loop in which"):
                second.run(elsewhere())
        first.run(end(made, batches))


def test_a_task_cancelled_at_whatever_moment_leaves_no_call_behind(server):
    """One that was just about to begin went on, unread, until its server was stopped."""
    server.batches = 1_000_000
    choose = random.Random(7)

    async def main():
        async with channels() as made:
            client = await made.get_flight_client_for_url(server.url)

            async def read():
                async for _ in await client.do_get(flight.Ticket(b"0")):
                    pass

            for _ in range(200):
                tasks = [asyncio.create_task(read()) for _ in range(3)]
                for _ in range(choose.randrange(12)):
                    await asyncio.sleep(choose.choice([0, 0, 0.0003]))
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            await until(lambda: server.active == 0)

    run(main())
