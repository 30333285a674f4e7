"""Waiting, invalidating, prefetching, closing: the resolver between its callers."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
from pyarrow import flight

import resolver as package
from resolver import (
    DefaultChannelResolver,
    InvalidWorkerUrlError,
    ResolverClosedError,
    WorkerConnectError,
    WorkerConnectTimeoutError,
    _resolver,
    default_channel_resolver,
)
from resolver._single_flight import PendingConnect
from resolver.testing import FakeConnector
from tests.support.threads import FREE_THREADED, Background, elsewhere, run_concurrently, wait_until
from tests.support.urls import in_one_stripe

URL = "http://10.0.0.7:50051"
OTHER = "http://10.0.0.8:50051"


@pytest.fixture
def connector():
    return FakeConnector(connect_timeout=20.0)


@pytest.fixture
def resolver(connector):
    with DefaultChannelResolver(connector) as resolver:
        yield resolver
        resolver._validate()


def lookups(resolver, url=URL, count=1):
    """`count` look-ups on threads, once all of them wait for the connect under way."""
    before = resolver.stats().waits + resolver.stats().misses
    started = [Background(lambda: resolver.get_flight_client_for_url(url)) for _ in range(count)]
    wait_until(lambda: resolver.stats().waits + resolver.stats().misses == before + count)
    return started


not_free_threaded = pytest.mark.skipif(
    FREE_THREADED, reason="counts are biased towards the thread that connected, which ends it"
)


def disposer():
    """The identifier of the disposer's thread."""
    (found,) = [each for each in threading.enumerate() if each.name == "resolver-disposer"]
    return found.ident


# -- waiting ---------------------------------------------------------------------------------


def test_waiters_share_the_client(resolver, connector):
    with connector.block(URL) as gate:
        started = lookups(resolver, count=8)
        gate.wait_entered()
    assert len({id(each.result()) for each in started}) == 1
    stats = resolver.stats()
    assert (stats.misses, stats.waits, stats.connects) == (1, 7, 1)


def test_waiters_share_the_error_but_not_the_exception(resolver, connector):
    cause = OSError("no")
    connector.fail(cause, times=1)
    with connector.block(URL) as gate:
        started = lookups(resolver, count=8)
        gate.wait_entered()
    errors = []
    for each in started:
        with pytest.raises(WorkerConnectError, match=r"10\.0\.0\.7") as caught:
            each.result()
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 8
    assert {(type(error), error.url, str(error)) for error in errors} == {
        (WorkerConnectError, URL, str(errors[0]))
    }
    assert all(error.__cause__ is cause for error in errors)
    assert connector.calls(URL) == 1
    assert resolver.stats().connect_failures == 1


def test_a_waiter_waits_no_longer_than_the_connect_deadline():
    connector = FakeConnector(connect_timeout=20.0)
    resolver = DefaultChannelResolver(connector)
    with connector.block(URL) as gate:
        (first,) = lookups(resolver)
        gate.wait_entered()
        connector.connect_timeout = 0.05
        with pytest.raises(WorkerConnectTimeoutError, match=r"10\.0\.0\.7.*0\.05 s") as caught:
            resolver.get_flight_client_for_url(URL)
        assert caught.value.url == URL
        assert not first.ended
    # The one that overstayed was given up: its caller gets its client, others connect anew.
    assert first.result() is not resolver.get_flight_client_for_url(URL)
    resolver._validate()


def test_without_a_deadline_a_waiter_waits_for_the_connect():
    class Patient:
        def __init__(self):
            self.entered, self.may_go = threading.Event(), threading.Event()

        def connect(self, url):
            self.entered.set()
            assert self.may_go.wait(20)
            return "client"

    connector = Patient()
    resolver = DefaultChannelResolver(connector)
    first, second = lookups(resolver, count=2)
    assert connector.entered.wait(20)
    connector.may_go.set()
    assert first.result() == second.result() == "client"


def test_other_urls_are_not_delayed_by_a_connect_that_blocks(resolver, connector):
    blocked, *others = in_one_stripe(6, low_bits=3)
    with connector.block(blocked) as gate:
        (first,) = lookups(resolver, blocked)
        gate.wait_entered()
        for url in [*others, OTHER]:
            client = resolver.get_flight_client_for_url(url)  # would wait for ever
            assert resolver.get_flight_client_for_url(url) is client
        assert resolver.urls() == sorted([*others, OTHER])
        assert blocked not in resolver
        assert not first.ended
    assert first.result() is resolver.get_flight_client_for_url(blocked)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_waiter_takes_over_when_the_connecting_thread_is_interrupted(
    resolver, connector, interrupt
):
    connector.fail(interrupt(), times=1)
    with connector.block(URL) as gate:
        (first,) = lookups(resolver)
        gate.wait_entered()
        waiters = lookups(resolver, count=4)
    with pytest.raises(interrupt):
        first.result()
    assert len({id(waiter.result()) for waiter in waiters}) == 1
    assert connector.calls(URL) == 2
    assert resolver.stats().connect_failures == 0


@pytest.mark.parametrize("step", ["_begin", "_watch", "_publish", "_fail"])
def test_an_interrupt_between_any_two_steps_leaves_nobody_waiting(connector, step):
    """A signal handler runs between two bytecodes, so also right after a step was done."""

    class Interrupted(DefaultChannelResolver):
        armed = True

    def interrupt_after(self, *arguments):
        result = getattr(DefaultChannelResolver, step)(self, *arguments)
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return result

    setattr(Interrupted, step, interrupt_after)
    if step == "_fail":
        connector.fail(OSError("no"), times=1)
    resolver = Interrupted(connector)
    with pytest.raises(KeyboardInterrupt):
        resolver.get_flight_client_for_url(URL)
    # A connect that nobody carries out would make this wait for 20 s, and fail.
    client = Background(lambda: resolver.get_flight_client_for_url(URL)).result(deadline=10)
    assert resolver.get_flight_client_for_url(URL) is client
    resolver._validate()


# -- invalidate ------------------------------------------------------------------------------


def test_invalidate_drops_the_client_and_the_next_lookup_connects(resolver, connector):
    old = resolver.get_flight_client_for_url(URL)
    assert resolver.invalidate("grpc://10.0.0.7:50051")
    assert URL not in resolver
    assert not resolver.invalidate(URL)
    assert resolver.get_flight_client_for_url(URL) is not old
    assert resolver.stats().invalidated == 1
    assert connector.calls(URL) == 2


def test_late_failure_keeps_the_replacement(resolver):
    dead = resolver.get_flight_client_for_url(URL)
    assert resolver.invalidate(URL, dead)
    replacement = resolver.get_flight_client_for_url(URL)
    for _ in range(8):
        assert not resolver.invalidate(URL, dead)
    assert resolver.get_flight_client_for_url(URL) is replacement


def test_invalidate_drops_one_connection_of_several(connector):
    with DefaultChannelResolver(connector, connections_per_url=3) as resolver:
        assert resolver.prefetch([URL]) == {}
        mine = resolver.get_flight_client_for_url(URL)
        assert resolver.invalidate(URL, mine)
        assert resolver.stats().clients == 2
        assert URL in resolver
        assert resolver.get_flight_client_for_url(URL) is not mine
        assert resolver.invalidate(URL)
        assert resolver.stats().clients == 0
        assert resolver.stats().invalidated == 4


def test_invalidate_detaches_a_connect_under_way(resolver, connector):
    with connector.block(URL) as gate:
        first, second = lookups(resolver, count=2)
        gate.wait_entered()
        assert resolver.invalidate(URL)
        (after,) = lookups(resolver)
        gate.wait_entered(2)
    assert first.result() is second.result()
    assert after.result() is not first.result()
    assert resolver.get_flight_client_for_url(URL) is after.result()


@not_free_threaded
def test_a_detached_client_ends_in_the_background_too(resolver, connector):
    def ask():
        resolver.get_flight_client_for_url(URL)  # and lets go of it at once

    with connector.block(URL) as gate:
        lookup = Background(ask)
        gate.wait_entered()
        assert resolver.invalidate(URL)
    lookup.result()
    connector.wait_disposed(1)
    assert connector.disposal_threads == {disposer()}


def test_a_dropped_client_stays_alive_for_its_holder_and_ends_in_the_background(
    resolver, connector
):
    client = elsewhere(lambda: resolver.get_flight_client_for_url(URL))
    resolver.invalidate(URL)
    elsewhere(lambda: resolver.get_flight_client_for_url(OTHER))
    resolver.invalidate(OTHER)
    connector.wait_disposed(1)  # the other one; the disposer has been looking
    assert connector.live == 1
    del client
    connector.wait_disposed(2)
    assert threading.get_ident() not in connector.disposal_threads


def test_nothing_is_ever_closed(resolver):
    class Client:
        def close(self):
            raise AssertionError("closed")

        def __exit__(self, *exception):
            raise AssertionError("closed")

    resolver.connector = type("C", (), {"connect": lambda self, url: Client()})()
    client = resolver.get_flight_client_for_url(URL)
    resolver.invalidate(URL, client)
    resolver.get_flight_client_for_url(URL)
    resolver.clear()
    resolver.get_flight_client_for_url(URL)
    resolver.close()


def test_clear_forgets_every_client(resolver, connector):
    clients = [resolver.get_flight_client_for_url(url) for url in (URL, OTHER)]
    resolver.clear()
    assert len(resolver) == 0
    assert resolver.stats().invalidated == 2
    assert resolver.get_flight_client_for_url(URL) not in clients


# -- prefetch --------------------------------------------------------------------------------


def test_prefetch_connects_in_parallel(resolver, connector):
    urls = [f"http://10.0.1.{n}:50051" for n in range(8)]
    with connector.block() as gate:
        prefetch = Background(lambda: resolver.prefetch(urls))
        gate.wait_entered(8)  # all at once, or this would time out
    assert prefetch.result() == {}
    assert resolver.urls() == urls


def test_prefetch_runs_no_more_than_its_parallelism(connector):
    class Counting(FakeConnector):
        now = most = 0
        lock = threading.Lock()

        def connect(self, url):
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            client = super().connect(url)
            with self.lock:
                self.now -= 1
            return client

    connector = Counting()
    connector.delay(0.005)
    with DefaultChannelResolver(connector) as resolver:
        assert resolver.prefetch([f"http://h{n}:1" for n in range(20)], parallelism=3) == {}
        assert connector.most <= 3
        assert len(resolver) == 20


def test_prefetch_reports_each_failure_and_raises_none(resolver, connector):
    connector.fail(OSError("no"), URL)
    connector.fail(TimeoutError("slow"), "http://slow:1")
    given = [URL, "grpc://10.0.0.7:50051", OTHER, "http://slow:1", "nonsense", None, OTHER + "/"]
    failures = resolver.prefetch(given)
    assert set(failures) == {
        URL,
        "grpc://10.0.0.7:50051",
        "http://slow:1",
        "nonsense",
        repr(None),
    }
    assert type(failures[URL]) is WorkerConnectError
    assert type(failures["http://slow:1"]) is WorkerConnectTimeoutError
    assert type(failures["nonsense"]) is InvalidWorkerUrlError
    assert all(failure.__traceback__ is None for failure in failures.values())
    assert resolver.urls() == [OTHER]
    assert connector.calls(URL) == 1


def test_prefetch_names_objects_by_their_canonical_url(resolver, connector):
    connector.fail(OSError("no"))
    location = flight.Location("grpc+tcp://10.0.0.7:50051")
    assert set(resolver.prefetch([location])) == {URL}


def test_prefetch_masks_secrets_of_what_is_no_str(resolver):
    class Odd:
        def __str__(self):
            return "http://user:pa55word@10.0.0.7:50051"

        __repr__ = __str__

    (name,) = resolver.prefetch([Odd()])
    assert "pa55word" not in name


def test_prefetch_of_what_is_cached_connects_nothing(resolver, connector):
    client = resolver.get_flight_client_for_url(URL)
    assert resolver.prefetch([URL] * 5) == {}
    assert resolver.prefetch([]) == {}
    assert connector.calls() == 1
    assert resolver.get_flight_client_for_url(URL) is client


def test_prefetch_fills_every_connection(connector):
    with DefaultChannelResolver(connector, connections_per_url=4) as resolver:
        assert resolver.prefetch([URL, OTHER]) == {}
        assert connector.calls(URL) == connector.calls(OTHER) == 4
        assert resolver.stats().clients == 8


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (10_001, ValueError), (1.5, TypeError)]
)
def test_prefetch_checks_its_parallelism(resolver, value, error):
    with pytest.raises(error, match="parallelism"):
        resolver.prefetch([URL], parallelism=value)


def test_prefetch_takes_any_iterable_once(resolver):
    assert resolver.prefetch(url for url in (URL, OTHER)) == {}
    assert len(resolver) == 2


def test_prefetch_reports_a_close_that_comes_between(connector):
    resolver = DefaultChannelResolver(connector)
    with connector.block() as gate:
        prefetch = Background(lambda: resolver.prefetch([URL, OTHER]))
        gate.wait_entered(2)
        resolver.close()
    failures = prefetch.result()
    assert {url: type(error) for url, error in failures.items()} == {
        URL: ResolverClosedError,
        OTHER: ResolverClosedError,
    }


# -- close -----------------------------------------------------------------------------------


def test_after_close_every_use_says_so(connector):
    resolver = DefaultChannelResolver(connector)
    client = resolver.get_flight_client_for_url(URL)
    assert not resolver.closed
    resolver.close()
    resolver.close()
    assert resolver.closed
    for use in (
        lambda: resolver.get_flight_client_for_url(URL),
        lambda: resolver.get_flight_client_for_url(OTHER),
        lambda: resolver.get_flight_client_for_url("nonsense"),
        lambda: resolver.invalidate(URL),
        lambda: resolver.invalidate(URL, client),
        lambda: resolver.prefetch([URL]),
        resolver.clear,
        resolver.__enter__,
    ):
        with pytest.raises(ResolverClosedError):
            use()
    assert resolver.stats().invalidated == 1
    assert resolver.urls() == []
    assert len(resolver) == 0
    assert URL not in resolver
    assert connector.calls() == 1


def test_with_closes(connector):
    with DefaultChannelResolver(connector) as resolver:
        resolver.get_flight_client_for_url(URL)
    assert resolver.closed
    with pytest.raises(ZeroDivisionError), DefaultChannelResolver(connector) as resolver:
        raise ZeroDivisionError
    assert resolver.closed


@not_free_threaded
def test_a_connect_under_way_while_closing_is_disposed_of(connector):
    resolver = DefaultChannelResolver(connector)
    with connector.block(URL) as gate:
        started = lookups(resolver, count=4)
        gate.wait_entered()
        resolver.close()
        # Waiters learn it at once; the one that connects, when its connect ends.
        wait_until(lambda: sum(each.ended for each in started) == 3)
    for each in started:
        with pytest.raises(ResolverClosedError):
            each.result()
    connector.wait_disposed(1)
    assert connector.created == 1
    assert connector.disposal_threads == {disposer()}
    assert resolver.stats().clients == 0
    resolver._validate()


def test_clients_end_in_the_background_after_close(connector):
    with DefaultChannelResolver(connector) as resolver:
        resolver.prefetch([URL, OTHER])
        held = resolver.get_flight_client_for_url(URL)
    connector.wait_disposed(1)
    assert connector.live == 1
    del held
    connector.wait_disposed(2)
    assert threading.get_ident() not in connector.disposal_threads


def test_an_interrupted_connect_on_a_closed_resolver_is_not_taken_over(connector):
    resolver = DefaultChannelResolver(connector)
    connector.fail(KeyboardInterrupt(), times=1)
    pending_failed = PendingConnect.fail
    with connector.block(URL) as gate:
        (first,) = lookups(resolver)
        gate.wait_entered()
        (waiter,) = lookups(resolver)
        resolver._closed_by_caller = True  # as if close() had come to its first line
    with pytest.raises(KeyboardInterrupt):
        first.result()
    with pytest.raises(ResolverClosedError):
        waiter.result()
    assert PendingConnect.fail is pending_failed
    assert connector.calls(URL) == 1


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_resolver_is_not_copied_or_pickled(resolver, duplicate):
    with pytest.raises(TypeError, match="cannot be pickled"):
        duplicate(resolver)


# -- the process-wide one --------------------------------------------------------------------


@pytest.fixture
def no_default(monkeypatch):
    monkeypatch.setattr(_resolver, "_default", None)


def test_the_default_resolver_is_one_for_all_threads(no_default):
    made = run_concurrently([default_channel_resolver] * 8)
    assert len({id(resolver) for resolver in made}) == 1
    assert type(made[0]) is DefaultChannelResolver
    assert package.default_channel_resolver() is made[0]


def test_the_default_resolver_is_made_anew_after_close(no_default):
    first = default_channel_resolver()
    first.close()
    second = default_channel_resolver()
    assert second is not first
    assert not second.closed
    assert default_channel_resolver() is second


def test_a_finalizer_may_ask_for_the_default_resolver_while_it_is_made(no_default, monkeypatch):
    """The collector may run while the resolver is built, and a finalizer with it."""
    inner = []

    class Finalized(DefaultChannelResolver):
        def __init__(self):
            if not inner:
                inner.append(None)
                inner.append(default_channel_resolver())
            super().__init__()

    monkeypatch.setattr(_resolver, "DefaultChannelResolver", Finalized)
    made = Background(default_channel_resolver).result(deadline=10)
    assert made is inner[1]
    assert default_channel_resolver() is made
