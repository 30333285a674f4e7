"""What an asyncio look-up gives: the contracts of the blocking resolver, on one event loop."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import weakref

import pytest

from resolver import (
    InvalidWorkerUrlError,
    ResolverClosedError,
    ResolverError,
    ResolverStats,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)
from resolver.aio import ChannelResolver
from tests.support.aio import AioClient, AioConnector, run, until

URL = "http://10.0.0.7:50051"
OTHER = "http://10.0.0.8:50051"


@pytest.fixture
def connector():
    return AioConnector()


def validate(resolver):
    for home in resolver._live_homes():
        for cache in home.caches:
            cache._validate()


def on_a_loop(resolver_type, connector, test, **options):
    """Run `test(resolver)` and check every invariant after it."""

    async def main():
        async with resolver_type(connector, **options) as resolver:
            await test(resolver)
            validate(resolver)

    run(main())


# -- hits ------------------------------------------------------------------------------------


def test_the_same_client_every_time(aio_resolver_type, connector):
    async def test(resolver):
        client = await resolver.get_flight_client_for_url(URL)
        assert client.url == URL
        for _ in range(3):
            assert await resolver.get_flight_client_for_url(URL) is client
        assert resolver.stats() == ResolverStats(3, 1, 0, 1, 0, 0, 0, 0, 1)
        assert connector.calls == 1

    on_a_loop(aio_resolver_type, connector, test)


def test_spellings_of_one_address_share_a_client_and_hit(aio_resolver_type, connector):
    class Text(str):
        __slots__ = ()

    async def test(resolver):
        client = await resolver.get_flight_client_for_url(URL)
        spellings = ["grpc://10.0.0.7:50051", "HTTP://10.0.0.7:50051/", "grpc+tcp://10.0.0.7:50051"]
        for spelling in [*spellings, Text(URL)]:
            assert await resolver.get_flight_client_for_url(spelling) is client
        before = resolver.stats().hits
        for spelling in spellings:
            found = resolver.get_flight_client_for_url(spelling)
            assert type(found).__name__ == "Found"
            assert await found is client
        assert resolver.stats().hits == before + len(spellings)
        assert connector.calls == 1

    on_a_loop(aio_resolver_type, connector, test)


def test_it_may_be_asked_for_before_there_is_a_loop(aio_resolver_type, connector):
    resolver = aio_resolver_type(connector)
    assert asyncio.run(resolver.get_flight_client_for_url(URL)).url == URL


@pytest.mark.parametrize(
    "url", ["nonsense", "http://", None, 7, "ftp://h:1", "http://u:s3cret@h:1"]
)
def test_what_is_no_worker_url_is_refused_when_awaited(aio_resolver_type, connector, url):
    async def test(resolver):
        with pytest.raises(InvalidWorkerUrlError) as caught:
            await resolver.get_flight_client_for_url(url)
        assert "s3cret" not in str(caught.value)
        assert url not in resolver

    on_a_loop(aio_resolver_type, connector, test)
    assert connector.calls == 0


def test_a_subclass_may_override_and_call_super(aio_resolver_type, connector):
    class Renaming(aio_resolver_type):
        async def get_flight_client_for_url(self, url):
            return await super().get_flight_client_for_url(url.replace("worker", "10.0.0.7"))

    async def test(resolver):
        client = await resolver.get_flight_client_for_url("http://worker:50051")
        assert client.url == URL
        assert await resolver.get_flight_client_for_url("http://worker:50051") is client

    on_a_loop(Renaming, connector, test)


def test_it_is_a_channel_resolver(aio_resolver_type):
    assert issubclass(aio_resolver_type, ChannelResolver)


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"idle_timeout": 0}, ValueError, "idle_timeout"),
        ({"idle_timeout": float("nan")}, ValueError, "idle_timeout"),
        ({"idle_timeout": "5"}, TypeError, "idle_timeout"),
        ({"failure_ttl": -1}, ValueError, "failure_ttl"),
        ({"failure_ttl": True}, TypeError, "failure_ttl"),
        ({"max_clients": 0}, ValueError, "max_clients"),
        ({"max_clients": 1.5}, TypeError, "max_clients"),
        ({"connections_per_url": 0}, ValueError, "connections_per_url"),
        ({"connections_per_url": 2000}, ValueError, "connections_per_url"),
        ({"connections_per_url": 4, "max_clients": 2}, ValueError, "max_clients"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    aio_resolver_type, connector, options, error, match
):
    with pytest.raises(error, match=match):
        aio_resolver_type(connector, **options)


def test_what_is_no_connector_is_refused(aio_resolver_type):
    with pytest.raises(TypeError, match="not the class"):
        aio_resolver_type(AioConnector)
    with pytest.raises(TypeError, match=r"no connect\(url\)"):
        aio_resolver_type(object())
    with pytest.raises(ValueError, match="connect_timeout"):
        aio_resolver_type(AioConnector(connect_timeout=0))


def test_idle_clients_are_dropped(aio_resolver_type, connector):
    async def test(resolver):
        client = await resolver.get_flight_client_for_url(URL)
        (home,) = resolver._live_homes()
        home.caches[0]._advance_clock(11)
        assert URL not in resolver
        assert await resolver.get_flight_client_for_url(URL) is not client
        home.caches[0]._advance_clock(11)
        assert resolver._expire(0) == 1
        assert resolver.urls() == []
        assert resolver.stats().evicted_idle == 2

    on_a_loop(aio_resolver_type, connector, test, idle_timeout=10)


def test_the_least_recently_used_client_goes_first(aio_resolver_type, connector):
    async def test(resolver):
        (home,) = [resolver._home()]
        for number in range(4):
            home.caches[0]._advance_clock(1)
            await resolver.get_flight_client_for_url(f"http://h{number}:1")
        assert resolver.urls() == ["http://h2:1", "http://h3:1"]
        assert resolver.stats().evicted_capacity == 2

    on_a_loop(aio_resolver_type, connector, test, max_clients=2)


def test_several_connections_per_url(aio_resolver_type, connector):
    async def test(resolver):
        async def ask():
            client = await resolver.get_flight_client_for_url(URL)
            assert await resolver.get_flight_client_for_url(URL) is client
            assert await resolver.get_flight_client_for_url("grpc://10.0.0.7:50051") is client
            return client

        clients = await asyncio.gather(*[ask() for _ in range(256)])
        assert len(set(clients)) == connector.calls == resolver.stats().clients == 3
        assert len(resolver) == 1
        assert resolver.invalidate(URL, clients[0])
        assert resolver.stats().clients == 2
        assert resolver.invalidate(URL)
        assert len(resolver) == 0

    on_a_loop(aio_resolver_type, connector, test, connections_per_url=3)


def test_all_connections_together_keep_to_max_clients(aio_resolver_type, connector):
    async def test(resolver):
        assert await resolver.prefetch([f"http://h{n}:1" for n in range(9)]) == {}
        assert resolver.stats().clients == 4

    on_a_loop(aio_resolver_type, connector, test, connections_per_url=2, max_clients=5)


# -- failures --------------------------------------------------------------------------------


def test_a_failed_connect_names_the_worker_and_the_cause(aio_resolver_type, connector):
    connector.error = cause = OSError("no route")

    async def test(resolver):
        with pytest.raises(WorkerConnectError, match=r"10\.0\.0\.7.*no route") as caught:
            await resolver.get_flight_client_for_url("grpc://10.0.0.7:50051")
        assert caught.value.url == URL
        assert caught.value.__cause__ is cause
        connector.error = TimeoutError("slow")
        with pytest.raises(WorkerConnectTimeoutError):
            await resolver.get_flight_client_for_url(URL)
        connector.error = own = ResolverClosedError("of another")
        with pytest.raises(ResolverClosedError, match=str(own)):
            await resolver.get_flight_client_for_url(URL)
        connector.error = None
        assert await resolver.get_flight_client_for_url(URL)
        assert resolver.stats().connect_failures == 3

    on_a_loop(aio_resolver_type, connector, test)


@pytest.mark.parametrize(
    ("connect", "match"),
    [
        (lambda self, url: object(), "not async"),
        (lambda self, url: asyncio.sleep(0), "returned None"),
    ],
)
def test_a_connector_that_gives_no_client_is_told_so(aio_resolver_type, connect, match):
    async def test(resolver):
        with pytest.raises(WorkerConnectError, match=match):
            await resolver.get_flight_client_for_url(URL)
        assert len(resolver) == 0

    on_a_loop(aio_resolver_type, type("Odd", (), {"connect": connect})(), test)


def test_a_remembered_failure_is_answered_without_a_connect(aio_resolver_type, connector):
    connector.error = OSError("no")

    async def test(resolver):
        raised = []
        for _ in range(4):
            with pytest.raises(WorkerConnectError, match="no") as caught:
                await resolver.get_flight_client_for_url("grpc://10.0.0.7:50051")
            raised.append(caught.value)
        assert connector.calls == 1
        assert len({id(each) for each in raised}) == 4
        assert len({id(each.__cause__) for each in raised}) == 1
        assert resolver.stats().waits == 3
        connector.error = None
        resolver._home().caches[0]._advance_clock(11)
        resolver._failures.advance_clock(11)
        await resolver.get_flight_client_for_url(URL)
        assert connector.calls == 2

    on_a_loop(aio_resolver_type, connector, test, failure_ttl=10.0)


@pytest.mark.parametrize("lanes", [1, 2])
def test_failures_in_a_row_are_remembered_for_longer(aio_resolver_type, connector, lanes):
    connector.error = OSError("no")

    async def test(resolver):
        longest = 0.0
        for failures in range(1, 6):
            for _ in range(3):
                with pytest.raises(WorkerConnectError) as caught:
                    await resolver.get_flight_client_for_url(URL)
                left = caught.value.retry_after
                assert 0.7 * min(2 ** (failures - 1), 8) <= left / 10 <= min(2 ** (failures - 1), 8)
            assert connector.calls == failures
            longest = max(longest, left)
            for cache in resolver._home().caches:
                cache._advance_clock(left + 0.1)
            resolver._failures.advance_clock(left + 0.1)
        assert longest <= 80

    options = {"failure_ttl": 10.0, "max_failure_ttl": 80.0, "connections_per_url": lanes}
    on_a_loop(aio_resolver_type, connector, test, **options)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_worker_that_is_forgiven_is_tried_again(aio_resolver_type, connector, lanes):
    connector.error = OSError("no")

    async def test(resolver):
        assert not resolver.forgive(URL)
        with pytest.raises(WorkerConnectError):
            await resolver.get_flight_client_for_url(URL)
        connector.error = None
        assert resolver.forgive(URL)
        assert await resolver.get_flight_client_for_url(URL)
        assert not resolver.forgive(URL)
        assert URL in resolver

    options = {"failure_ttl": 10.0, "connections_per_url": lanes}
    on_a_loop(aio_resolver_type, connector, test, **options)


@pytest.mark.parametrize("lanes", [1, 3])
def test_one_failure_answers_for_every_lane(aio_resolver_type, connector, lanes):
    connector.error = OSError("no")

    async def test(resolver):
        with pytest.raises(WorkerConnectError):
            await resolver.get_flight_client_for_url(URL)
        assert list(await resolver.prefetch([URL])) == [URL]
        stats = resolver.stats()
        assert (stats.misses, stats.waits, stats.connect_failures) == (1, lanes, 1)
        assert connector.calls == 1

    on_a_loop(aio_resolver_type, connector, test, failure_ttl=10.0, connections_per_url=lanes)


def test_one_success_ends_the_memory_of_every_lane(aio_resolver_type, connector):
    connector.error, connector.failures = OSError("no"), 1

    async def test(resolver):
        with pytest.raises(WorkerConnectError):
            await resolver.get_flight_client_for_url(URL)
        resolver._failures.advance_clock(11)
        assert await resolver.prefetch([URL]) == {}

    on_a_loop(aio_resolver_type, connector, test, failure_ttl=10.0, connections_per_url=3)


def test_invalidate_forgets_a_remembered_failure(aio_resolver_type, connector):
    connector.error, connector.failures = OSError("no"), 1

    async def test(resolver):
        with pytest.raises(WorkerConnectError):
            await resolver.get_flight_client_for_url(URL)
        assert not resolver.invalidate(URL)
        await resolver.get_flight_client_for_url(URL)

    on_a_loop(aio_resolver_type, connector, test, failure_ttl=1000.0)


def test_a_remembered_failure_keeps_no_frame_of_its_callers(aio_resolver_type, connector):
    class Local:
        pass

    connector.error = OSError("no")

    async def test(resolver):
        async def call():
            local = Local()
            with pytest.raises(WorkerConnectError):
                await resolver.get_flight_client_for_url(URL)
            return weakref.ref(local)

        reference = await call()
        gc.collect()
        assert reference() is None

    on_a_loop(aio_resolver_type, connector, test, failure_ttl=1000.0)


def test_a_failed_connect_leaves_no_reference_cycle(aio_resolver_type, no_gc):
    class RefusedError(OSError):
        pass

    class Refusing:
        async def connect(self, url):
            raise RefusedError("no")

    async def main():
        resolver = aio_resolver_type(Refusing(), idle_timeout=1000.0)
        try:
            await resolver.get_flight_client_for_url(URL)
        except WorkerConnectError as error:
            return [weakref.ref(error), weakref.ref(error.__cause__)]
        raise AssertionError("did not fail")

    assert [reference() for reference in asyncio.run(main())] == [None, None]


# -- prefetch --------------------------------------------------------------------------------


def test_prefetch_connects_in_parallel_and_reports_each_failure(aio_resolver_type, connector):
    async def test(resolver):
        connector.blocked = True
        good = [f"http://h{n}:1" for n in range(8)]
        given = [*good, "grpc://h0:1", "nonsense", None]
        prefetch = asyncio.create_task(resolver.prefetch(given))
        await until(lambda: connector.waiting == 8)
        connector.release()
        failures = await prefetch
        assert set(failures) == {"nonsense", "None"}
        assert all(type(each) is InvalidWorkerUrlError for each in failures.values())
        assert resolver.urls() == good
        connector.error = OSError("no")
        failures = await resolver.prefetch([URL, "grpc://10.0.0.7:50051", good[0]])
        assert set(failures) == {URL, "grpc://10.0.0.7:50051"}
        assert all(each.__traceback__ is None for each in failures.values())
        assert connector.urls[URL] == 1

    on_a_loop(aio_resolver_type, connector, test)


def test_prefetch_runs_no_more_than_its_parallelism(aio_resolver_type, connector):
    async def test(resolver):
        connector.blocked = True
        prefetch = asyncio.create_task(
            resolver.prefetch((f"http://h{n}:1" for n in range(5)), parallelism=2)
        )
        for _ in range(50):
            await asyncio.sleep(0)
        assert connector.waiting == connector.calls == 2
        connector.release()
        assert await prefetch == {}
        assert len(resolver) == 5

    on_a_loop(aio_resolver_type, connector, test)


def test_prefetch_checks_what_it_is_given(aio_resolver_type, connector):
    async def test(resolver):
        for urls in (URL, URL.encode()):
            with pytest.raises(TypeError, match="several URLs"):
                await resolver.prefetch(urls)
        for parallelism, error in [(0, ValueError), (10_001, ValueError), (1.5, TypeError)]:
            with pytest.raises(error, match="parallelism"):
                await resolver.prefetch([URL], parallelism=parallelism)
        assert await resolver.prefetch([]) == {}

    on_a_loop(aio_resolver_type, connector, test)


# -- what it says about itself ---------------------------------------------------------------


def test_snapshots(aio_resolver_type, connector):
    async def test(resolver):
        assert resolver
        assert len(resolver) == 0
        for url in ("http://b:2", "http://a:1", "grpc+unix:///tmp/x"):
            await resolver.get_flight_client_for_url(url)
        assert resolver.urls() == ["grpc+unix:///tmp/x", "http://a:1", "http://b:2"]
        assert len(resolver) == 3
        assert "GRPC://A:1/" in resolver
        assert "http://c:3" not in resolver
        assert "3 clients" in repr(resolver)

    on_a_loop(aio_resolver_type, connector, test)


def test_after_close_every_use_says_so(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector)
        client = await resolver.get_flight_client_for_url(URL)
        found = resolver.get_flight_client_for_url(URL)
        assert not resolver.closed
        resolver.close()
        resolver.close()
        await resolver.aclose()
        assert resolver.closed
        assert await found is client  # found before, and nobody closes a client
        for url in (URL, OTHER, "nonsense"):
            with pytest.raises(ResolverClosedError):
                await resolver.get_flight_client_for_url(url)
        with pytest.raises(ResolverClosedError):
            await resolver.prefetch([URL])
        with pytest.raises(ResolverClosedError):
            await resolver.__aenter__()
        for use in (lambda: resolver.invalidate(URL), resolver.clear):
            with pytest.raises(ResolverClosedError):
                use()
        assert resolver.stats().invalidated == 1
        assert resolver.urls() == []
        assert "closed" in repr(resolver)

    run(main())


def test_a_resolver_is_neither_pickled_nor_copied(aio_resolver_type, connector):
    resolver = aio_resolver_type(connector)
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="live connections"):
            take(resolver)


def test_errors_are_built_in_ones_too(aio_resolver_type, connector):
    connector.error = OSError("no")

    async def test(resolver):
        for expected in (ResolverError, ConnectionError):
            with pytest.raises(expected):
                await resolver.get_flight_client_for_url(URL)
        with pytest.raises(ValueError, match="scheme"):
            await resolver.get_flight_client_for_url("nonsense")

    on_a_loop(aio_resolver_type, connector, test)


def test_a_client_may_be_any_object(aio_resolver_type):
    class Text:
        async def connect(self, url):
            return url.upper()

    async def test(resolver):
        for _ in range(2):
            assert await resolver.get_flight_client_for_url(URL) == URL.upper()

    on_a_loop(aio_resolver_type, Text(), test)


def test_nothing_is_ever_closed(aio_resolver_type):
    class Client:
        def close(self):
            raise AssertionError("closed")

        aclose = __aexit__ = close

    class Connector:
        async def connect(self, url):
            return Client()

    async def test(resolver):
        client = await resolver.get_flight_client_for_url(URL)
        resolver.invalidate(URL, client)
        await resolver.get_flight_client_for_url(URL)
        resolver.clear()
        await resolver.get_flight_client_for_url(URL)

    on_a_loop(aio_resolver_type, Connector(), test)


def test_clients_end_when_the_block_ends(aio_resolver_type, connector):
    async def main():
        async with aio_resolver_type(connector) as resolver:
            held = await resolver.get_flight_client_for_url(URL)
            await resolver.get_flight_client_for_url(OTHER)
        assert [url for url, _ in connector.ended] == [OTHER]
        assert isinstance(held, AioClient)

    run(main())
