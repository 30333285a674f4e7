"""Entries belong to their event loop, weakly."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from resolver import _background
from tests.support.aio import AioConnector, run, until
from tests.support.threads import Background, run_concurrently, wait_until, wait_until_collected

URL = "http://10.0.0.7:50051"


@pytest.fixture
def connector():
    return AioConnector()


@pytest.fixture
def resolver(aio_resolver_type, connector):
    return aio_resolver_type(connector, idle_timeout=None)


async def twice(resolver, url=URL):
    client = await resolver.get_flight_client_for_url(url)
    assert await resolver.get_flight_client_for_url(url) is client
    return client


def test_two_loops_in_two_threads_have_clients_of_their_own(resolver, connector):
    both = threading.Barrier(2)

    def on_a_loop():
        async def main():
            client = await twice(resolver)
            assert client.loop is asyncio.get_running_loop()
            await asyncio.to_thread(both.wait, 20)  # the other has its client too
            assert await twice(resolver) is client
            assert len(resolver) == 1
            await asyncio.to_thread(both.wait, 20)

        run(main())

    run_concurrently([on_a_loop] * 2)
    assert connector.calls == 2
    assert resolver.stats().connects == 2


def test_many_loops_at_once(aio_resolver_type, connector):
    resolver = aio_resolver_type(connector, connections_per_url=2)
    urls = [f"http://h{number}:1" for number in range(20)]

    def on_a_loop():
        async def main():
            for _ in range(3):
                clients = await asyncio.gather(*[twice(resolver, url) for url in urls])
                loop = asyncio.get_running_loop()
                assert all(client.loop is loop for client in clients)
                for client in clients[::4]:
                    resolver.invalidate(client.url, client)

        run(main())

    run_concurrently([on_a_loop] * 6)
    assert resolver.stats().clients == 0
    assert resolver._homes == {}


def test_loops_of_one_thread_one_after_another(resolver, connector):
    for number in range(20):
        client = run(twice(resolver))  # its loop is closed when this returns
        assert connector.calls == number + 1
        assert len(resolver) == 0
        del client
    wait_until_collected(lambda: len(connector.ended) == 20)
    stats = resolver.stats()
    assert (stats.hits, stats.misses, stats.invalidated, stats.clients) == (20, 20, 20, 0)
    # Nothing is left of any of them, however many there were.
    assert (resolver._homes, resolver._routes, len(resolver._retired)) == ({}, (), 0)


def test_two_open_loops_in_turns_in_one_thread(resolver, connector):
    loops = [asyncio.new_event_loop() for _ in range(2)]
    clients = [loop.run_until_complete(twice(resolver)) for loop in loops]
    assert clients[0] is not clients[1]
    for _ in range(3):
        for loop, client in zip(loops, clients, strict=True):
            assert loop.run_until_complete(twice(resolver)) is client
    loops[0].close()
    assert resolver.stats().clients == 1
    assert loops[1].run_until_complete(twice(resolver)) is clients[1]
    loops[1].close()
    assert resolver.stats().clients == 0


def test_a_closed_loop_is_forgotten_once_by_however_many_threads(resolver, connector):
    for count in range(1, 31):
        run(twice(resolver))
        seen = run_concurrently([resolver.stats, resolver.urls, lambda: resolver._expire(0)] * 2)
        assert seen[1] == []
        stats = resolver.stats()
        assert (stats.hits, stats.connects, stats.invalidated) == (count, count, count)


def test_a_closed_loops_clients_go_when_another_loop_connects(resolver, connector, no_gc):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(twice(resolver))
    loop.close()
    run(twice(resolver, "http://other:1"))
    assert [url for url, _ in connector.ended] == [URL]


def test_a_closed_loops_clients_go_even_if_nobody_ever_asks_again(
    resolver, connector, monkeypatch, no_gc
):
    watched = []
    monkeypatch.setattr(_background, "watch", lambda *arguments: watched.append(arguments))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(twice(resolver))
    ((expiring, seconds),) = watched  # also without idle_timeout and failure_ttl
    assert expiring is resolver
    assert seconds <= 60
    assert resolver._stripe_count == 1
    loop.close()
    resolver._expire(0)  # what the reaper does
    assert [url for url, _ in connector.ended] == [URL]


def test_an_unclosed_loop_is_not_kept_alive_by_its_clients(resolver, connector):
    class Loop(asyncio.SelectorEventLoop):
        def __del__(self):
            self.close()  # and no warning that somebody should have

    loop = Loop()
    client = loop.run_until_complete(twice(resolver))
    assert client.loop is loop  # through it, whoever holds the client holds the loop
    reference = weakref.ref(loop)
    del loop, client
    wait_until_collected(lambda: reference() is None and len(connector.ended) == 1)
    assert len(resolver) == 0
    assert resolver.stats().invalidated == 1
    run(twice(resolver))
    assert resolver.stats().invalidated == 2
    assert (resolver._homes, resolver._routes) == ({}, ())


def test_a_resolver_that_ends_leaves_nothing_on_the_loop(resolver, aio_resolver_type, connector):
    async def main():
        before = set(vars(asyncio.get_running_loop()))
        another = aio_resolver_type(connector)
        await twice(another)
        assert set(vars(asyncio.get_running_loop())) > before
        reference = weakref.ref(another)
        del another
        await until(lambda: reference() is None)
        await until(lambda: set(vars(asyncio.get_running_loop())) == before)
        await until(lambda: len(connector.ended) == 1)

    run(main())


def test_a_loop_that_takes_no_attribute_will_do(resolver, connector):
    class Closed(asyncio.SelectorEventLoop):
        def __setattr__(self, name, value):
            if name.startswith("_resolver"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    loop = Closed()
    loop.run_until_complete(twice(resolver))
    gc.collect()
    assert len(resolver) == 1
    assert loop.run_until_complete(twice(resolver)).loop is loop
    assert connector.calls == 1
    loop.close()
    assert len(resolver) == 0
    assert resolver._unattached == []


def test_invalidate_reaches_every_loop_and_a_client_only_its_own(resolver, connector):
    loops = [asyncio.new_event_loop() for _ in range(2)]
    first, second = [loop.run_until_complete(twice(resolver)) for loop in loops]
    assert resolver.invalidate(URL, first)
    assert resolver.stats().clients == 1
    assert loops[1].run_until_complete(twice(resolver)) is second
    loops[0].run_until_complete(twice(resolver))
    assert resolver.invalidate(URL)
    assert resolver.stats().clients == 0
    loops[0].run_until_complete(twice(resolver))
    resolver.clear()
    assert resolver.urls() == []
    for loop in loops:
        loop.close()


@pytest.mark.parametrize("drop", ["invalidate", "clear", "close", "expire"])
def test_a_client_that_another_thread_drops_ends_on_its_own_loop(
    aio_resolver_type, connector, drop, no_gc
):
    resolver = aio_resolver_type(connector, idle_timeout=1000.0)

    async def main():
        await twice(resolver)
        (home,) = resolver._live_homes()
        home.caches[0]._advance_clock(2000.0 if drop == "expire" else 0.0)
        del home
        actions = {
            "invalidate": lambda: resolver.invalidate(URL),
            "clear": resolver.clear,
            "close": resolver.close,
            "expire": lambda: resolver._expire(0),
        }
        await asyncio.to_thread(actions[drop])
        await until(lambda: connector.ended)
        assert connector.ended == [(URL, threading.get_ident())]

    run(main())


def test_close_reaches_every_loop(resolver, connector):
    waiting = threading.Barrier(3)

    def on_a_loop():
        async def main():
            await twice(resolver)
            await asyncio.to_thread(waiting.wait, 20)
            await until(lambda: connector.ended.count((URL, threading.get_ident())) == 1)

        run(main())

    threads = [Background(on_a_loop) for _ in range(2)]
    waiting.wait(20)
    resolver.close()
    for thread in threads:
        thread.result()
    assert resolver.stats().invalidated == 2


def test_a_loop_closed_during_a_connect_leaves_the_url_usable(resolver, connector):
    connector.blocked = True

    async def main():
        task = asyncio.create_task(resolver._miss(URL))
        await until(lambda: connector.waiting == 1)
        task.cancel()

    asyncio.run(main())  # cancels what is left, the connect too
    connector.blocked = False
    assert run(twice(resolver)).url == URL


def test_the_reaper_expires_idle_clients_of_a_loop_that_only_waits(aio_resolver_type, connector):
    resolver = aio_resolver_type(connector, idle_timeout=0.1)

    async def main():
        await resolver.get_flight_client_for_url(URL)
        await until(lambda: connector.ended)
        assert connector.ended == [(URL, threading.get_ident())]
        assert resolver.stats().evicted_idle == 1

    run(main())
    wait_until(lambda: len(resolver) == 0)
