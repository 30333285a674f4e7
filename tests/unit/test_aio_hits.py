"""The awaitable of a hit, and the way to it from the running loop."""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
import gc
import inspect
import os
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.aio import hits_module, run
from tests.support.implementations import Client, Pending, load
from tests.support.threads import FREE_THREADED, run_concurrently

URL = "http://10.0.0.7:50051"


@pytest.fixture
def hits(implementation):
    return hits_module(implementation)


@pytest.fixture
def cache_of(implementation):
    class Cache(load(implementation).ClientCache):
        def _miss(self, url):
            return None

    def make(*pairs):
        cache = Cache()
        for url, client in pairs:
            pending = Pending()
            cache._begin(url, 0, pending)
            cache._publish(url, 0, pending, client)
        return cache

    return make


@pytest.fixture
def router(hits):
    @hits.fast_hits
    class Router(hits.LoopRouter):
        def _miss(self, url):
            return "missed", url

    return Router()


def route(loop, *caches):
    return weakref.ref(loop), tuple(weakref.ref(cache) for cache in caches)


def found_of(router, cache):
    """A hit that was not awaited yet."""

    async def look_up():
        router._routes = (route(asyncio.get_running_loop(), cache),)
        return router.get_flight_client_for_url(URL)

    return run(look_up())


def test_a_hit_is_awaited_to_the_client_without_a_coroutine(router, cache_of):
    client = Client()
    cache = cache_of((URL, client))
    found = found_of(router, cache)
    assert not inspect.iscoroutine(found)
    assert run(await_it(found)) is client


async def await_it(found):
    return await found


def test_a_hit_never_reaches_the_event_loop(router, cache_of):
    client = Client()
    cache = cache_of((URL, client))
    found = found_of(router, cache)
    coroutine = await_it(found)
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)  # one step, and nothing was yielded to any loop
    assert end.value.value is client


def test_a_traced_await_gives_the_same(router, cache_of):
    """CPython takes another way into an awaitable while a debugger or coverage traces it."""
    client = Client()
    cache = cache_of((URL, client))

    def trace(*_arguments):
        return trace

    async def look_up():
        router._routes = (route(asyncio.get_running_loop(), cache),)
        sys.settrace(trace)
        return await router.get_flight_client_for_url(URL)

    before = sys.gettrace()
    try:
        assert run(look_up()) is client
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("client", [(1, 2), (), StopIteration(3), ValueError("a value")])
def test_what_looks_like_a_result_or_an_error_is_a_client_all_the_same(router, cache_of, client):
    cache = cache_of((URL, client))
    assert run(await_it(found_of(router, cache))) is client
    with pytest.raises(StopIteration) as end:
        found_of(router, cache).send(None)
    assert end.value.value is client
    with pytest.raises(StopIteration) as end:
        next(found_of(router, cache))
    assert end.value.value is client


def test_a_stop_iteration_that_somebody_keeps_stays_what_it_was(router, cache_of):
    """The compiled hit uses those again that nobody has seen."""
    client = Client()
    cache = cache_of((URL, client))
    kept = []
    for _ in range(3):
        found = found_of(router, cache)
        with pytest.raises(StopIteration) as end:
            next(found)
        kept.append(end.value)
        with pytest.raises(StopIteration) as end:
            next(found_of(router, cache))
        kept.append(end.value)
        del found, end
    other = cache_of((URL, Client()))
    for _ in range(200):
        assert run(await_it(found_of(router, other))) is not client
    assert [stop.value for stop in kept] == [client] * 6
    assert len(set(map(id, kept))) == 6


@pytest.mark.parametrize("holds_the_hit", [True, False])
def test_an_end_that_leads_back_to_its_frame_is_collected(router, cache_of, holds_the_hit):
    cache = cache_of((URL, Client()))

    def keep():
        found = found_of(router, cache)
        try:
            next(found if holds_the_hit else found_of(router, cache))
        except StopIteration as stop:
            kept = stop  # whose traceback leads to this frame
        return weakref.ref(kept.value)

    client = keep()
    cache._clear()
    gc.collect()
    assert client() is None


def test_awaiting_while_an_error_is_handled_leaves_the_error_alone(router, cache_of):
    client = Client()
    cache = cache_of((URL, client))

    async def look_up():
        router._routes = (route(asyncio.get_running_loop(), cache),)
        try:
            raise KeyError("k")
        except KeyError:
            awaited.append(await router.get_flight_client_for_url(URL))
            raise

    awaited = []
    with pytest.raises(KeyError, match="k") as told:
        run(look_up())
    assert told.value.__context__ is None
    assert awaited == [client]


def test_any_number_may_be_found_before_one_is_awaited(router, cache_of):
    clients = [Client() for _ in range(300)]
    caches = [cache_of((URL, client)) for client in clients]
    found = [found_of(router, cache) for cache in caches]
    for _ in range(2):
        awaited = [run(await_it(each)) for each in found]
        assert awaited == clients
        found = [found_of(router, cache) for cache in caches]


def test_a_client_whose_end_looks_something_up_ends_well(router, cache_of, no_gc):
    """The last reference to a client may be the one that its await leaves behind."""
    ended = []

    class Last:
        def __del__(self):
            ended.append(run(await_it(found_of(router, other))))

    rest = Client()
    other = cache_of((URL, rest))
    for _ in range(100):
        cache = cache_of((URL, Last()))
        found = found_of(router, cache)
        cache._clear()
        run(await_it(found))
        del found
    assert ended == [rest] * 100


def test_a_hit_is_good_for_one_await(router, cache_of):
    cache = cache_of((URL, Client()))
    found = found_of(router, cache)
    run(await_it(found))
    for again in (lambda: run(await_it(found)), lambda: found.send(None), lambda: next(found)):
        with pytest.raises(RuntimeError, match="awaited already"):
            again()


def test_a_hit_holds_its_client_only_until_it_was_awaited(router, cache_of, no_gc):
    cache = cache_of((URL, Client()))
    found, closed, thrown, left = (found_of(router, cache) for _ in range(4))
    client = weakref.ref(run(await_it(found)))
    closed.close()
    with pytest.raises(KeyError):
        thrown.throw(KeyError("k"))
    del left
    cache._clear()
    assert client() is None


@pytest.mark.skipif(not FREE_THREADED, reason="with the GIL, a step is never two threads' at once")
def test_two_threads_that_step_one_hit_take_one_reference(router, cache_of):
    client, steps = Client(), 5_000
    cache = cache_of((URL, client))

    async def look_up():
        router._routes = (route(asyncio.get_running_loop(), cache),)
        return [router.get_flight_client_for_url(URL) for _ in range(steps)]

    before = sys.getrefcount(client)
    found = run(look_up())
    reached = [0, 0]

    def step(me):
        for at, each in enumerate(found):
            reached[me] = at
            while reached[1 - me] < at:  # so that both are at the same one
                os.sched_yield()  # on a busy machine the other may wait for this core
            with contextlib.suppress(StopIteration, RuntimeError):
                next(each)

    run_concurrently([lambda: step(0), lambda: step(1)])
    assert sys.getrefcount(client) == before


def test_throwing_into_a_hit_raises_there(router, cache_of):
    cache = cache_of((URL, Client()))
    with pytest.raises(KeyError, match="k"):
        found_of(router, cache).throw(KeyError("k"))
    with pytest.raises(KeyError):
        found_of(router, cache).throw(KeyError)
    with pytest.raises(KeyError, match="v"):
        found_of(router, cache).throw(KeyError, KeyError("v"), None)


def test_asyncio_takes_a_hit_wherever_it_takes_a_coroutine(router, cache_of):
    client = Client()
    cache = cache_of((URL, client))

    async def look_up():
        router._routes = (route(asyncio.get_running_loop(), cache),)
        ask = lambda: router.get_flight_client_for_url(URL)  # noqa: E731
        assert isinstance(ask(), collections.abc.Coroutine)
        assert await asyncio.create_task(ask()) is client
        assert await asyncio.ensure_future(ask()) is client
        assert await asyncio.wait_for(ask(), 10) is client
        assert await asyncio.shield(ask()) is client
        assert await asyncio.gather(ask(), ask()) == [client, client]
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask())
        assert task.result() is client

    run(look_up())


def test_a_loop_without_a_route_misses(router, cache_of):
    cache = cache_of((URL, Client()))
    found_of(router, cache)

    async def look_up():
        return router.get_flight_client_for_url(URL)

    assert run(look_up()) == ("missed", URL)


def test_without_a_running_loop_everything_misses(router, cache_of):
    cache = cache_of((URL, Client()))
    loop = asyncio.new_event_loop()
    router._routes = (route(loop, cache),)
    assert router.get_flight_client_for_url(URL) == ("missed", URL)
    loop.close()


@pytest.mark.parametrize(
    "url", [None, 1, b"http://10.0.0.7:50051", type("S", (str,), {})(URL), "x"]
)
def test_what_is_not_held_misses(router, cache_of, url):
    cache = cache_of((URL, Client()))

    async def look_up():
        router._routes = (route(asyncio.get_running_loop(), cache),)
        return router.get_flight_client_for_url(url)

    assert run(look_up()) == ("missed", url)


def test_no_loop_is_not_taken_for_one_that_is_gone(router, cache_of):
    cache = cache_of((URL, Client()))
    found_of(router, cache)
    gc.collect()
    assert router._routes[0][0]() is None
    assert router.get_flight_client_for_url(URL) == ("missed", URL)


def test_each_of_several_loops_finds_its_own(router, cache_of):
    clients = [Client() for _ in range(3)]
    caches = [cache_of((URL, client)) for client in clients]
    loops = [asyncio.new_event_loop() for _ in clients]
    router._routes = tuple(map(route, loops, caches))
    for _ in range(2):
        for loop, client in zip(loops, clients, strict=True):
            assert loop.run_until_complete(lookup(router)) is client
    for loop in loops:
        loop.close()


def test_loops_of_two_threads_at_once_each_find_their_own(router, cache_of):
    """The thread that the interpreter began with is found by a shorter way than others."""
    clients = [Client() for _ in range(2)]
    caches = [cache_of((URL, client)) for client in clients]
    loops = [asyncio.new_event_loop() for _ in clients]
    router._routes = tuple(map(route, loops, caches))

    both = threading.Barrier(2, timeout=30)

    async def look_up():
        both.wait()  # so that both loops run until the end
        found = {await lookup(router) for _ in range(1_000)}
        both.wait()
        return found

    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(loops[1].run_until_complete, look_up())
        assert loops[0].run_until_complete(look_up()) == {clients[0]}
        assert theirs.result(30) == {clients[1]}
    for loop in loops:
        loop.close()


async def lookup(router):
    return await router.get_flight_client_for_url(URL)


def test_another_asynchronous_generator_hook_hides_no_loop(router, cache_of):
    """The hooks are only a hint at the running loop: whoever replaces them gets the same."""
    client, others = Client(), Client()
    cache, others_cache = cache_of((URL, client)), cache_of((URL, others))
    other = asyncio.new_event_loop()

    async def look_up(hook):
        router._routes = route(other, others_cache), route(asyncio.get_running_loop(), cache)
        before = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=hook)
        try:
            return await router.get_flight_client_for_url(URL)
        finally:
            sys.set_asyncgen_hooks(*before)

    hooks = [None, lambda _agen: None, [].append, threading.Lock().acquire, Client().__init__]
    for hook in hooks:
        assert run(look_up(hook)) is client
    other.close()


def test_a_dead_loops_address_is_no_way_to_its_clients(router, cache_of):
    cache = cache_of((URL, Client()))
    found_of(router, cache)  # on a loop that is gone now

    async def look_up():
        return router.get_flight_client_for_url(URL)

    gc.collect()
    for _ in range(20):  # one of these loops lies where that one did, as a rule
        assert run(look_up()) == ("missed", URL)


def test_a_cache_that_is_gone_misses(router, cache_of):
    async def look_up():
        router._routes = (route(asyncio.get_running_loop(), cache_of((URL, Client()))),)
        gc.collect()
        return router.get_flight_client_for_url(URL)

    assert run(look_up()) == ("missed", URL)


@pytest.mark.parametrize(
    "routes",
    [
        ((None, ()),),
        ((weakref.ref(Client), ()),),
        ((weakref.ref(Client), (None,)),),
        ([weakref.ref(Client), (weakref.ref(Client),)],),
        ((weakref.ref(Client), (weakref.ref(Client),)),),
    ],
)
def test_a_senseless_route_is_refused(router, routes):
    with pytest.raises(TypeError):
        router._routes = routes
    assert router._routes == ()


def test_a_task_keeps_its_lane_and_tasks_are_spread(router):
    async def look_up():
        lanes = [router._lane(4)]
        await asyncio.sleep(0)
        lanes += [router._lane(4) for _ in range(10)]
        assert len(set(lanes)) == 1
        return lanes[0]

    async def all_at_once():
        return await asyncio.gather(*[look_up() for _ in range(256)])

    assert set(run(all_at_once())) == {0, 1, 2, 3}
    assert router._lane(1) == 0


def test_the_method_is_the_subclass_s_own_and_documented(router):
    assert "Await this" in inspect.getdoc(router.get_flight_client_for_url)
    assert "get_flight_client_for_url" in vars(type(router)) or type(router).__mro__[
        1
    ].__module__.endswith("_py")


def test_a_hit_leaves_every_count_as_it_was(router, cache_of):
    client, url = Client(), "".join(URL)
    cache = cache_of((url, client))

    async def main():
        loop = asyncio.get_running_loop()
        router._routes = (route(loop, cache),)
        counted = [client, url, cache, loop, router, router._routes]

        async def use():
            for _ in range(1000):
                await router.get_flight_client_for_url(url)
                router.get_flight_client_for_url(url)  # left alone
                router.get_flight_client_for_url("missed")
                spent = router.get_flight_client_for_url(url)
                await spent
                with pytest.raises(RuntimeError):
                    await spent

        await use()
        gc.collect()
        before = [sys.getrefcount(each) for each in counted]
        await use()
        gc.collect()
        assert [sys.getrefcount(each) for each in counted] == before

    run(main())
