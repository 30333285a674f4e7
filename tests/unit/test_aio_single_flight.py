"""Many tasks, one connect: who waits, who is cancelled, who comes too late."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from resolver import (
    ResolverClosedError,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)
from tests.support.aio import AioClient, AioConnector, run, started, until
from tests.support.threads import Background, wait_until

URL = "http://10.0.0.7:50051"


@pytest.fixture
def connector():
    return AioConnector()


def lookups(resolver, count):
    return started(lambda: resolver._miss(URL), count)


async def blocked(resolver, connector, count=1):
    """`count` tasks that wait for one connect, which stands at the gate."""
    connector.blocked = True
    tasks = await lookups(resolver, count)
    await until(lambda: connector.waiting == 1)
    return tasks


def validate(resolver):
    for home in resolver._live_homes():
        assert home.tasks == set()
        for cache in home.caches:
            cache._validate()


# -- sharing ---------------------------------------------------------------------------------


def test_a_thousand_tasks_connect_once(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector)
        tasks = await blocked(resolver, connector, 1000)
        assert resolver.stats().waits == 999
        connector.release()
        clients = await asyncio.gather(*tasks)
        assert len(set(clients)) == connector.calls == 1
        stats = resolver.stats()
        assert (stats.hits, stats.misses, stats.waits, stats.connects) == (0, 1, 999, 1)
        validate(resolver)

    run(main())


def test_a_thousand_tasks_share_the_error_but_not_the_exception(aio_resolver_type, connector):
    connector.error = cause = OSError("no")

    async def main():
        resolver = aio_resolver_type(connector)
        tasks = await blocked(resolver, connector, 1000)
        connector.release()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in errors} == {WorkerConnectError}
        assert len({id(error) for error in errors}) == 1000
        assert all(error.__cause__ is cause for error in errors)
        assert connector.calls == resolver.stats().connect_failures == 1
        validate(resolver)

    run(main())


def test_other_urls_are_not_delayed_by_a_connect_that_blocks(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector)
        (first,) = await blocked(resolver, connector)
        connector.blocked = False
        for number in range(8):
            await resolver.get_flight_client_for_url(f"http://h{number}:1")
        assert not first.done()
        assert URL not in resolver
        connector.release()
        assert await first is await resolver.get_flight_client_for_url(URL)

    run(main())


# -- cancelling ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 3, 7])
def test_cancelling_one_waiter_cancels_neither_the_connect_nor_the_others(
    aio_resolver_type, connector, which
):
    async def main():
        resolver = aio_resolver_type(connector)
        tasks = await blocked(resolver, connector, 8)
        cancelled = tasks.pop(which)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        connector.release()
        assert len(set(await asyncio.gather(*tasks))) == 1
        assert (connector.calls, connector.cancelled) == (1, 0)
        validate(resolver)

    run(main())


def test_a_connect_that_nobody_waits_for_any_more_is_finished_and_kept(
    aio_resolver_type, connector
):
    async def main():
        resolver = aio_resolver_type(connector)
        tasks = await blocked(resolver, connector, 8)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        del tasks, results
        gc.collect()  # the loop itself holds tasks weakly
        connector.release()
        await until(lambda: URL in resolver)
        assert await resolver.get_flight_client_for_url(URL)
        assert (connector.calls, connector.cancelled) == (1, 0)
        validate(resolver)

    run(main())


def test_a_connect_that_was_detached_and_that_nobody_waits_for_goes_on(aio_resolver_type):
    """Nothing but the resolver holds its task: a loop holds what waits only weakly."""
    gates = []

    class Connector:
        async def connect(self, url):
            gate = asyncio.get_running_loop().create_future()
            gates.append(weakref.ref(gate))
            await gate
            return AioClient(url, [])

    async def main():
        resolver = aio_resolver_type(Connector())
        (task,) = await lookups(resolver, 1)
        await until(lambda: gates)
        assert resolver.invalidate(URL)
        task.cancel()
        await asyncio.wait([task])
        del task  # and with it the traceback of its cancellation, which leads to the connect
        gc.collect()
        gates[0]().set_result(None)
        await until(lambda: resolver.stats().connects == 1)
        assert URL not in resolver

    run(main())


def test_a_failure_that_nobody_waits_for_is_not_reported(aio_resolver_type, connector):
    connector.error = OSError("no")
    complaints = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, what: complaints.append(what)
        )
        resolver = aio_resolver_type(connector)
        (task,) = await blocked(resolver, connector)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task
        connector.release()
        await until(lambda: resolver.stats().connect_failures == 1)
        await asyncio.sleep(0)
        gc.collect()
        await asyncio.sleep(0)

    run(main())
    assert complaints == []


def test_a_deadline_of_the_caller_ends_its_wait_alone(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector)
        (other,) = await blocked(resolver, connector)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await resolver.get_flight_client_for_url(URL)
        connector.release()
        assert await other is await resolver.get_flight_client_for_url(URL)

    run(main())


def test_a_connect_that_is_cancelled_itself_fails_its_waiters_and_not_the_next(
    aio_resolver_type, connector
):
    async def main():
        resolver = aio_resolver_type(connector, failure_ttl=1000.0)
        tasks = await blocked(resolver, connector, 3)
        (connecting,) = resolver._home().tasks
        connecting.cancel()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in errors} == {WorkerConnectError}
        assert "cancelled or interrupted" in str(errors[0])
        assert resolver.stats().connect_failures == 0
        connector.blocked = False
        assert await resolver.get_flight_client_for_url(URL)
        validate(resolver)

    run(main())


def test_a_connect_that_is_cancelled_before_it_began_leaves_the_url_usable(
    aio_resolver_type, connector
):
    async def main():
        resolver = aio_resolver_type(connector)
        (task,) = await lookups(resolver, 1)
        (connecting,) = resolver._home().tasks
        connecting.cancel()  # its first step is still to come
        with pytest.raises(WorkerConnectError, match="cancelled or interrupted"):
            await task
        assert connector.calls == 0
        assert await resolver.get_flight_client_for_url(URL)
        validate(resolver)

    run(main())


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_connect_ends_the_loop_and_not_the_resolver(
    aio_resolver_type, connector, interrupt
):
    resolver = aio_resolver_type(connector)
    connector.error, connector.failures = interrupt(), 1
    with pytest.raises(interrupt):
        asyncio.run(resolver.get_flight_client_for_url(URL))
    assert run(resolver.get_flight_client_for_url(URL))


# -- deadlines -------------------------------------------------------------------------------


def test_a_connector_that_overstays_its_deadline_is_cancelled(aio_resolver_type, connector):
    connector.connect_timeout = 0.05

    async def main():
        resolver = aio_resolver_type(connector)
        tasks = await blocked(resolver, connector, 4)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in errors} == {WorkerConnectTimeoutError}
        assert "0.05 s" in str(errors[0])
        assert errors[0].url == URL
        await until(lambda: connector.cancelled == 1)
        assert resolver.stats().connect_failures == 1
        connector.blocked = False
        assert await resolver.get_flight_client_for_url(URL)
        validate(resolver)

    run(main())


def test_a_connector_that_will_not_be_cancelled_holds_up_nobody_for_good(aio_resolver_type):
    class Stubborn:
        connect_timeout = 0.05
        over = None
        calls = 0

        async def connect(self, url):
            self.calls += 1
            if self.calls > 1:
                return "client"
            while True:
                try:
                    await self.over.wait()
                except asyncio.CancelledError:
                    continue
                return "late"

    async def main():
        connector = Stubborn()
        connector.over = asyncio.Event()
        resolver = aio_resolver_type(connector)
        with pytest.raises(WorkerConnectTimeoutError):
            await resolver.get_flight_client_for_url(URL)
        assert await resolver.get_flight_client_for_url(URL) == "client"
        connector.over.set()
        await until(lambda: resolver.stats().connects == 2)
        assert await resolver.get_flight_client_for_url(URL) == "client"

    run(main())


def test_without_a_deadline_waiters_wait_for_the_connect(aio_resolver_type):
    connector = AioConnector(connect_timeout=None)

    async def main():
        resolver = aio_resolver_type(connector)
        tasks = await blocked(resolver, connector, 2)
        connector.release()
        first, second = await asyncio.gather(*tasks)
        assert first is second

    run(main())


# -- re-entry --------------------------------------------------------------------------------


def test_a_connector_that_asks_for_the_url_it_connects_fails_instead_of_hanging(
    aio_resolver_type,
):
    class Recursive:
        async def connect(self, url):
            return await resolver.get_flight_client_for_url(url)

    resolver = aio_resolver_type(Recursive())
    with pytest.raises(WorkerConnectError, match="its own resolver"):
        run(resolver.get_flight_client_for_url(URL))


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="came with 3.12")
@pytest.mark.parametrize("recursive", [False, True])
def test_tasks_may_start_eagerly(aio_resolver_type, recursive):
    class Immediate:
        async def connect(self, url):
            return await resolver.get_flight_client_for_url(url) if recursive else "client"

    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        if recursive:
            with pytest.raises(WorkerConnectError, match="its own resolver"):
                await resolver.get_flight_client_for_url(URL)
        else:
            assert await resolver.get_flight_client_for_url(URL) == "client"
        await asyncio.sleep(0)
        validate(resolver)

    resolver = aio_resolver_type(Immediate())
    run(main())


def test_a_connector_may_ask_for_another_url(aio_resolver_type, connector):
    class ThroughGateway:
        async def connect(self, url):
            if url != "http://gateway:1":
                await resolver.get_flight_client_for_url("http://gateway:1")
            return await connector.connect(url)

    async def main():
        await resolver.get_flight_client_for_url(URL)
        assert resolver.urls() == [URL, "http://gateway:1"]

    resolver = aio_resolver_type(ThroughGateway())
    run(main())


# -- invalidating ----------------------------------------------------------------------------


def test_late_failure_keeps_the_replacement(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector)
        dead = await resolver.get_flight_client_for_url(URL)
        assert resolver.invalidate("grpc://10.0.0.7:50051", dead)
        replacement = await resolver.get_flight_client_for_url(URL)
        for _ in range(8):
            assert not resolver.invalidate(URL, dead)
        assert resolver.invalidate(URL, None) is False
        assert await resolver.get_flight_client_for_url(URL) is replacement
        assert resolver.invalidate(URL) is True
        assert resolver.invalidate(URL) is False
        assert resolver.stats().invalidated == 2

    run(main())


def test_invalidate_detaches_a_connect_under_way(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector)
        first, second = await blocked(resolver, connector, 2)
        assert resolver.invalidate(URL)
        (after,) = await lookups(resolver, 1)
        await until(lambda: connector.waiting == 2)
        gc.collect()  # nothing but the resolver holds the first connect now
        connector.release()
        assert await first is await second
        assert await after is not await first
        assert await resolver.get_flight_client_for_url(URL) is await after
        validate(resolver)

    run(main())


# -- closing ---------------------------------------------------------------------------------


def test_close_fails_who_waits_and_lets_the_connect_finish(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector)
        tasks = await blocked(resolver, connector, 3)
        resolver.close()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in errors} == {ResolverClosedError}
        assert connector.cancelled == 0
        closing = asyncio.create_task(resolver.aclose())
        await asyncio.sleep(0)
        assert not closing.done()  # it waits for the connect
        connector.release()
        await closing
        assert connector.ended == [(URL, threading.get_ident())]
        assert resolver.stats().connects == 1
        assert resolver.stats().clients == 0
        validate(resolver)

    run(main())


def test_close_from_another_thread_wakes_who_waits(aio_resolver_type, connector):
    resolver = aio_resolver_type(connector)

    async def main():
        (task,) = await blocked(resolver, connector)
        with pytest.raises(ResolverClosedError):
            await task
        connector.release()
        await resolver.aclose()

    waiting = Background(lambda: run(main()))
    wait_until(lambda: connector.waiting == 1)
    resolver.close()
    waiting.result()


def test_a_connector_may_close_its_resolver(aio_resolver_type):
    class Closing:
        async def connect(self, url):
            await resolver.aclose()  # waits for all connects but this one
            return "client"

    resolver = aio_resolver_type(Closing())
    with pytest.raises(ResolverClosedError):
        run(resolver.get_flight_client_for_url(URL))


def test_prefetch_reports_a_close_that_comes_between(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector)
        connector.blocked = True
        prefetch = asyncio.create_task(resolver.prefetch([URL, "http://b:1"], parallelism=1))
        await until(lambda: connector.waiting == 1)
        resolver.close()
        connector.release()
        failures = await prefetch
        assert {type(error) for error in failures.values()} == {ResolverClosedError}
        assert len(failures) == 2
        assert connector.calls == 1
        await resolver.aclose()

    run(main())


# -- letting go ------------------------------------------------------------------------------


def test_a_dropped_client_stays_alive_for_its_holder(aio_resolver_type, connector):
    async def main():
        resolver = aio_resolver_type(connector, max_clients=1)
        held = await resolver.get_flight_client_for_url(URL)
        await resolver.get_flight_client_for_url("http://b:1")
        assert resolver.urls() == ["http://b:1"]
        assert resolver.stats().evicted_capacity == 1
        await asyncio.sleep(0)
        assert connector.ended == []
        assert isinstance(held, AioClient)
        del held
        assert connector.ended == [(URL, threading.get_ident())]

    run(main())


def test_a_resolver_that_nobody_closed_lets_its_clients_go_on_their_loop(
    aio_resolver_type, connector, no_gc
):
    async def main():
        resolver = aio_resolver_type(connector)
        await resolver.get_flight_client_for_url(URL)
        reference = weakref.ref(resolver)
        ending = threading.Thread(target=lambda last: last.clear(), args=([resolver],))
        del resolver
        ending.start()
        # The reaper may hold it for a moment; wherever it ends, its clients end here.
        await until(lambda: connector.ended)
        ending.join()
        assert reference() is None
        assert connector.ended == [(URL, threading.get_ident())]

    run(main())
