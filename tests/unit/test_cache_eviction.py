"""What leaves the cache by itself: idle clients, and the least recently used."""

from __future__ import annotations

import pytest

from tests.support.implementations import Client
from tests.support.urls import in_one_stripe, urls

URL = "http://10.0.0.7:50051"


def distinct(count: int) -> list[str]:
    source = urls()
    return [next(source) for _ in range(count)]


def store_in_order(cache, keys):
    """Store `keys` a second apart, so that their order of use is beyond doubt."""
    clients = {}
    for key in keys:
        clients[key] = cache.store(key)
        cache._advance_clock(1)
    return clients


# -- idle ------------------------------------------------------------------------------------


def test_an_idle_client_is_not_served(new_cache):
    cache = new_cache(idle_timeout=10)
    client = cache.store(URL)
    cache._advance_clock(9.5)
    assert cache.get(URL) is client
    cache._advance_clock(9.5)
    assert cache.get(URL) is client
    cache._advance_clock(10.5)
    assert cache.get(URL) is None


def test_a_lookup_replaces_an_idle_client(new_cache):
    cache = new_cache(idle_timeout=10)
    idle = cache.store(URL, aliases=["grpc://10.0.0.7:50051"])
    cache._advance_clock(11)
    fresh = cache.store(URL)
    assert cache.discarded == [idle]
    assert cache.counts["evicted_idle"] == 1
    assert cache.get(URL) is fresh
    assert cache.get("grpc://10.0.0.7:50051") is None


def test_the_reaper_takes_idle_clients_and_leaves_the_others(new_cache):
    cache = new_cache(idle_timeout=10)
    keys = distinct(50)
    clients = {key: cache.store(key) for key in keys}
    cache._advance_clock(8)
    for key in keys[::2]:
        assert cache.get(key) is clients[key]
    cache._advance_clock(8)
    assert cache.expire() == 25
    assert cache.expire() == 0
    assert sorted(cache._keys()) == sorted(keys[::2])
    assert {id(client) for client in cache.discarded} == {id(clients[k]) for k in keys[1::2]}
    assert cache.counts["evicted_idle"] == 25
    assert cache.counts["clients"] == 25


def test_the_reaper_takes_all_of_a_crowded_stripe(new_cache):
    cache = new_cache(idle_timeout=10)
    for key in in_one_stripe(60, low_bits=3):
        cache.store(key, aliases=[key + "/"])
    cache._advance_clock(11)
    assert cache.expire() == 60
    assert cache._keys() == []


def test_the_reaper_leaves_connects_under_way_alone(new_cache):
    cache = new_cache(idle_timeout=10)
    pending = cache.start(URL)
    cache._advance_clock(1000)
    assert cache.expire() == 0
    client = Client()
    assert cache._publish(URL, 0, pending, client)
    assert cache.get(URL) is client


def test_without_a_timeout_nothing_idles_out(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    cache._advance_clock(1e8)
    assert cache.expire() == 0
    assert cache.get(URL) is client


def test_time_beyond_all_measure_does_not_overflow(new_cache):
    cache = new_cache(idle_timeout=1e300)
    client = cache.store(URL)
    cache._advance_clock(1e300)
    assert cache.get(URL) is client or cache.get(URL) is None
    pending = cache.start("http://10.0.0.8:50051")
    cache._fail("http://10.0.0.8:50051", 0, pending, 1e300)
    assert cache._begin("http://10.0.0.8:50051", 0, object()) == (None, pending)


# -- capacity --------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(new_cache):
    cache = new_cache(max_clients=3)
    a, b, c, d, e = distinct(5)
    clients = store_in_order(cache, [a, b, c])
    assert cache.get(a) is clients[a]
    cache._advance_clock(1)
    store_in_order(cache, [d])
    assert sorted(cache._keys()) == sorted([a, c, d])
    store_in_order(cache, [e])
    assert sorted(cache._keys()) == sorted([a, d, e])
    assert cache.discarded == [clients[b], clients[c]]
    assert cache.counts["evicted_capacity"] == 2


def test_a_hit_through_another_spelling_counts_as_use(new_cache):
    cache = new_cache(max_clients=2)
    a, b, c = distinct(3)
    cache.store(a, aliases=[a + "/"])
    cache._advance_clock(1)
    cache.store(b)
    cache._advance_clock(1)
    assert cache.get(a + "/") is not None
    cache._advance_clock(1)
    cache.store(c)
    assert sorted(cache._keys()) == sorted([a, c])


def test_order_is_exact_up_to_512_clients(new_cache):
    cache = new_cache(max_clients=511)
    keys = distinct(520)
    clients = store_in_order(cache, keys)
    assert cache.discarded == [clients[key] for key in keys[:9]]


def test_beyond_that_an_old_one_goes(new_cache):
    cache = new_cache(max_clients=2000)
    keys = distinct(2000)
    clients = store_in_order(cache, keys)
    extra = (f"http://worker-{n}:50051" for n in range(100))
    store_in_order(cache, extra)
    assert len(cache.discarded) == 100
    age = {id(clients[key]): position for position, key in enumerate(keys)}
    # The oldest of 512 out of 2,000 is among the oldest tenth unless that sample holds
    # none of it: a chance of 0.74 ** 200 on each eviction.
    assert max(age[id(client)] for client in cache.discarded) < 200 + 100


@pytest.mark.parametrize("limit", [1, 2, 7, 64])
def test_max_clients_is_never_exceeded(new_cache, limit):
    cache = new_cache(max_clients=limit)
    for position, key in enumerate(distinct(150)):
        client = cache.store(key)
        assert cache.get(key) is client, "the newest was evicted"
        assert cache.counts["clients"] == min(position + 1, limit)
        cache._validate()


def test_max_clients_counts_all_lanes(new_cache):
    cache = new_cache(max_clients=4, lanes=3)
    for key in distinct(20):
        for lane in range(3):
            cache.store(key, lane=lane)
            assert cache.counts["clients"] <= 4
    assert cache.counts["evicted_capacity"] == 56


def test_a_remembered_failure_goes_before_any_client(new_cache):
    cache = new_cache(max_clients=3)
    a, b, c, d = distinct(4)
    clients = store_in_order(cache, [a, b])
    cache._fail(c, 0, cache.start(c), 1000.0)
    cache._advance_clock(1)
    cache.store(d)
    assert sorted(cache._keys()) == sorted([a, b, d])
    assert cache.discarded == []
    assert cache.counts["evicted_capacity"] == 0
    assert cache.get(a) is clients[a]


def test_a_failure_is_remembered_even_where_clients_fill_the_cache(new_cache):
    cache = new_cache(max_clients=2)
    a, b, c = distinct(3)
    clients = store_in_order(cache, [a, b])
    pending = cache.start(c)
    cache._fail(c, 0, pending, 1000.0)
    assert cache._begin(c, 0, object()) == (None, pending)
    assert cache.discarded == [clients[a]]


def test_failures_alone_are_bounded_too(new_cache):
    cache = new_cache(max_clients=5)
    for key in distinct(50):
        cache._fail(key, 0, cache.start(key), 1000.0)
        cache._validate()
    assert len(cache._clear()) == 5


def test_a_connect_under_way_is_never_evicted(new_cache):
    cache = new_cache(max_clients=1)
    a, b, c = distinct(3)
    pendings = {key: cache.start(key) for key in (a, b)}
    cache.store(c)
    clients = {key: Client() for key in (a, b)}
    for key in (a, b):
        assert cache._publish(key, 0, pendings[key], clients[key])
        assert cache.get(key) is clients[key]
        assert cache.counts["clients"] == 1


def test_eviction_is_counted_apart_from_invalidation(new_cache):
    cache = new_cache(max_clients=1)
    a, b = distinct(2)
    cache.store(a)
    cache.store(b)
    cache._drop(b)
    assert cache.counts["evicted_capacity"] == 1
    assert cache.counts["invalidated"] == 1
    assert cache.counts["evicted_idle"] == 0
