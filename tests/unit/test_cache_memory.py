"""Who owns what: reference counts, finalizers that come back, cycles through the cache."""

from __future__ import annotations

import gc
import random
import sys
import weakref

import pytest

from tests.support.implementations import Client, Pending, load
from tests.support.threads import Background
from tests.support.urls import in_one_stripe

URL = "http://10.0.0.7:50051"
OTHER = "http://10.0.0.8:50051"
SPELLINGS = [f"grpc://10.0.0.7:50051{'/' * slashes}" for slashes in range(1, 5)]


# -- reference counts ------------------------------------------------------------------------


def test_a_hit_gives_one_reference_and_keeps_none(new_cache):
    cache = new_cache()
    client = cache.store(URL, aliases=SPELLINGS)
    before = sys.getrefcount(client)
    for _ in range(1000):
        for url in (URL, SPELLINGS[0], SPELLINGS[3]):
            cache.get_flight_client_for_url(url)
    assert sys.getrefcount(client) == before


def test_every_way_out_gives_all_references_back(new_cache, cache_type):
    class Forgetful(cache_type):
        def _discard(self, clients):
            pass

    cache = new_cache(Forgetful, idle_timeout=10, max_clients=1)
    # Strings, pendings and a client that nothing else refers to.
    key, spelling = (text.encode().decode() for text in (URL, SPELLINGS[0]))
    other = OTHER.encode().decode()
    pending, client = Pending(), Client()

    def connect():
        cache._begin(key, 0, pending)
        cache._publish(key, 0, pending, client)
        cache._alias(spelling, key, 0, client)

    def drop():
        connect()
        cache._drop(key)

    def clear():
        connect()
        cache._clear()

    def expire():
        connect()
        cache._advance_clock(11)
        cache.expire()

    def replace_idle():
        connect()
        cache._advance_clock(11)
        cache._begin(key, 0, pending)
        cache._fail(key, 0, pending, 0.0)

    def evict():
        connect()
        cache._begin(other, 0, pending)
        cache._publish(other, 0, pending, client)
        cache._drop(other)

    def fail():
        cache._begin(key, 0, pending)
        cache._fail(key, 0, pending, 0.0)

    def remember_failure():
        cache._begin(key, 0, pending)
        cache._fail(key, 0, pending, 5.0)
        cache._begin(key, 0, Pending())
        cache._drop(key)

    def detach():
        cache._begin(key, 0, pending)
        cache._drop(key)
        cache._publish(key, 0, pending, client)

    def wait_and_hit():
        cache._begin(key, 0, pending)
        cache._begin(key, 0, Pending())
        cache._publish(key, 0, pending, client)
        cache._begin(key, 0, Pending())
        for spelling_again in (spelling, spelling, spelling):
            cache._alias(spelling_again, key, 0, client)
        cache._keys()
        cache._holds(key)
        cache._drop(key)

    things = (key, spelling, other, pending, client)
    ways = (drop, clear, expire, replace_idle, evict, fail, remember_failure, detach, wait_and_hit)
    for way in ways:
        way()
        before = [sys.getrefcount(thing) for thing in things]
        for _ in range(20):
            way()
        assert [sys.getrefcount(thing) for thing in things] == before, way.__name__
        cache._validate()


def test_dropping_the_cache_frees_its_clients_without_the_collector(new_cache, cache_type, no_gc):
    cache = cache_type(lanes=2)
    clients = [weakref.ref(cache.store(f"http://10.0.2.{n}:50051", lane=n % 2)) for n in range(99)]
    pending = weakref.ref(cache.start(URL))
    assert all(reference() is not None for reference in clients)
    assert pending() is not None
    del cache
    assert all(reference() is None for reference in clients)
    assert pending() is None


def test_what_is_displaced_is_handed_over_once_and_alone(new_cache):
    cache = new_cache()
    client = cache.store(URL, aliases=SPELLINGS)
    alone = [Client()]
    expected = sys.getrefcount(alone[0])
    cache._drop(URL)
    reference = weakref.ref(client)
    del client
    held = cache.discarded
    assert len(held) == 1
    count = sys.getrefcount(held[0])
    assert count == expected
    del held
    cache.discarded.clear()
    assert reference() is None


def test_what_discard_raises_reaches_the_caller_and_breaks_nothing(new_cache, cache_type):
    class Failing(cache_type):
        def _discard(self, clients):
            raise OSError("no thread")

    cache = new_cache(Failing)
    cache.store(URL, aliases=SPELLINGS)
    with pytest.raises(OSError, match="no thread"):
        cache._drop(URL)
    cache._validate()
    assert cache.get(URL) is None
    cache.store(URL)


def test_leak_keeps_a_thing_for_ever(implementation):
    thing = Client()
    before = sys.getrefcount(thing)
    load(implementation).leak(thing)
    assert sys.getrefcount(thing) == before + 1


# -- finalizers ------------------------------------------------------------------------------


class Returning:
    """A client whose end uses the cache in every way there is."""

    def __init__(self, cache, ended):
        self._cache = weakref.ref(cache)
        self._ended = ended

    def __del__(self):
        cache = self._cache()
        if cache is None:
            self._ended.append("after the cache")
            return
        cache.get(URL)
        cache.get(SPELLINGS[0])
        cache._begin(URL, 0, pending := Pending())
        cache._publish(URL, 0, pending, object())
        cache._alias(SPELLINGS[0], URL, 0, object())
        cache._holds(URL)
        cache._keys()
        cache._counters()
        cache._drop(OTHER)
        cache.expire()
        cache._drop(URL)
        cache._clear()
        self._ended.append("inside")


def displace_by_drop(cache):
    cache._drop(URL)


def displace_by_clear(cache):
    cache._clear()


def displace_by_shut(cache):
    cache._shut()


def displace_by_expiry(cache):
    cache._advance_clock(11)
    cache.expire()


def displace_by_lookup_of_an_idle_client(cache):
    cache._advance_clock(11)
    cache._fail(URL, 0, cache.start(URL), 0.0)


def displace_by_capacity(cache):
    cache._begin(OTHER, 0, pending := Pending())
    cache._publish(OTHER, 0, pending, object())


def displace_by_remembered_failure(cache):
    cache._begin(OTHER, 0, pending := Pending())
    cache._fail(OTHER, 0, pending, 1000.0)
    cache._begin("http://10.0.0.9:50051", 0, pending := Pending())
    cache._publish("http://10.0.0.9:50051", 0, pending, object())


@pytest.mark.parametrize(
    "displace",
    [
        displace_by_drop,
        displace_by_clear,
        displace_by_shut,
        displace_by_expiry,
        displace_by_lookup_of_an_idle_client,
        displace_by_capacity,
        displace_by_remembered_failure,
    ],
)
def test_a_finalizer_may_use_the_cache_that_displaced_it(new_cache, cache_type, displace):
    class Forgetful(cache_type):
        def _discard(self, clients):
            clients.clear()  # the last references: finalizers run here

    cache = new_cache(Forgetful, max_clients=1, idle_timeout=10)
    ended = []
    cache.store(URL, Returning(cache, ended), aliases=SPELLINGS)
    # On a thread, with a deadline: a finalizer under the lock would wait for ever.
    Background(lambda: displace(cache)).result(deadline=20)
    assert ended == ["inside"]


def test_a_finalizer_of_a_pending_connect_may_use_the_cache(new_cache, cache_type):
    cache = new_cache()
    ended = []

    def connect_and_forget():
        cache._begin(URL, 0, Returning(cache, ended))
        cache._drop(URL)
        pending = Returning(cache, ended)
        cache._begin(URL, 0, pending)
        reference = weakref.ref(pending)
        cache._publish(URL, 0, pending, object())
        del pending
        assert reference() is None
        cache._begin(OTHER, 0, pending := Returning(cache, ended))
        cache._fail(OTHER, 0, pending, 0.0)
        del pending

    Background(connect_and_forget).result(deadline=20)
    assert ended == ["inside"] * 3


def test_a_finalizer_sees_no_cache_while_that_one_is_freed(cache_type, no_gc):
    cache = cache_type()
    ended = []
    cache.store(URL, Returning(cache, ended), aliases=SPELLINGS)
    del cache
    assert ended == ["after the cache"]


# -- cycles ----------------------------------------------------------------------------------


def test_the_collector_frees_a_client_that_leads_back_to_its_cache(cache_type):
    cache = cache_type(lanes=2)
    for lane in range(2):
        client = cache.store(URL, lane=lane)
        client.cache = cache
    references = weakref.ref(cache), weakref.ref(client)
    cache._alias(SPELLINGS[0], URL, 1, client)
    del cache, client
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("failed", [False, True])
def test_the_collector_frees_a_connect_that_leads_back_to_its_cache(cache_type, failed):
    cache = cache_type()
    pending = cache.start(URL)
    pending.cache = cache
    if failed:
        cache._fail(URL, 0, pending, 1000.0)
    references = weakref.ref(cache), weakref.ref(pending)
    del cache, pending
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_the_collector_keeps_what_a_cache_in_use_holds(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    client.cache = cache
    del client
    pending = cache.start(OTHER)
    pending.cache = cache
    for _ in range(3):
        gc.collect()
    assert cache.get_flight_client_for_url(URL).cache is cache


def test_the_collector_is_shown_each_client_exactly_once():
    # A client shown twice would be freed too early, one not shown never.
    cache = load("compiled").ClientCache(lanes=2)
    client = Client()
    for lane in range(2):
        pending = Pending()
        cache._begin(URL, lane, pending)
        cache._publish(URL, lane, pending, client)
        for spelling in SPELLINGS:
            cache._alias(spelling, URL, lane, client)
    waiting = Pending()
    cache._begin(OTHER, 0, waiting)
    shown = gc.get_referents(cache)
    assert sum(each is client for each in shown) == 2
    assert sum(each is waiting for each in shown) == 1


def test_collections_at_every_allocation_find_a_sound_cache(new_cache, cache_type):
    """Clients in cycles of their own end in the middle of anything, and use the cache then."""
    operations = random.Random(7)
    keys = [*in_one_stripe(5, low_bits=3), URL, OTHER]
    depth = 0

    class Cyclic:
        def __init__(self, cache):
            self.me = self
            self.cache = weakref.ref(cache)

        def __del__(self):
            cache = self.cache()
            if cache is not None:
                act(cache)

    def act(cache):
        nonlocal depth
        if depth >= 2:
            return
        depth += 1
        try:
            key = operations.choice(keys)
            match operations.randrange(8):
                case 0 | 1 | 2:
                    pending, client = Pending(), Cyclic(cache)
                    if cache._begin(key, 0, pending) == (None, pending):
                        cache._publish(key, 0, pending, client)
                        cache._alias(key + "/", key, 0, client)
                case 3:
                    pending = Pending()
                    if cache._begin(key, 0, pending) == (None, pending):
                        cache._fail(key, 0, pending, operations.choice([0.0, 5.0]))
                case 4:
                    cache._drop(key, operations.choice([None, cache.get(key)]))
                case 5:
                    cache._advance_clock(3)
                    cache.expire()
                case 6:
                    cache._keys()
                    cache._holds(key)
                case 7:
                    cache.get(key)
                    cache.get(key + "/")
        finally:
            depth -= 1

    class Forgetful(cache_type):
        def _discard(self, clients):
            pass

    cache = new_cache(Forgetful, max_clients=3, idle_timeout=10)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(1500):
            act(cache)
            cache.missed.clear()
    finally:
        gc.set_threshold(*threshold)
    cache._clear()
    assert cache.counts["clients"] == 0
