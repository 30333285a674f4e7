"""Single flight in the cache: begin, publish, fail, and what happens in between."""

from __future__ import annotations

import threading

import pytest

from tests.support.implementations import Client, Pending
from tests.support.threads import run_concurrently

URL = "http://10.0.0.7:50051"
OTHER = "http://10.0.0.8:50051"


def test_the_first_connects_and_the_rest_share_its_pending(new_cache):
    cache = new_cache()
    first, second, third = Pending(), Pending(), Pending()
    assert cache._begin(URL, 0, first) == (None, first)
    assert cache._begin(URL, 0, second) == (None, first)
    assert cache._begin(URL, 0, third) == (None, first)
    client = Client()
    assert cache._publish(URL, 0, first, client)
    assert cache._begin(URL, 0, second) == (client, None)
    assert cache.counts == {
        "hits": 1,
        "misses": 1,
        "waits": 2,
        "connects": 1,
        "connect_failures": 0,
        "evicted_idle": 0,
        "evicted_capacity": 0,
        "invalidated": 0,
        "clients": 1,
    }


def test_a_connect_under_way_is_no_hit(new_cache):
    cache = new_cache()
    cache.start(URL)
    assert cache.get(URL) is None
    assert cache.missed == [URL]


def test_a_failure_is_forgotten_at_once_by_default(new_cache):
    cache = new_cache()
    pending = cache.start(URL)
    cache._fail(URL, 0, pending, 0.0)
    again = Pending()
    assert cache._begin(URL, 0, again) == (None, again)
    assert cache.counts["connect_failures"] == 1


def test_an_interrupted_connect_counts_as_no_failure(new_cache):
    cache = new_cache()
    cache._fail(URL, 0, cache.start(URL), 0.0, False)
    assert cache.counts["connect_failures"] == 0
    cache.start(URL)


def test_a_failure_is_remembered_for_its_ttl(new_cache):
    cache = new_cache()
    pending = cache.start(URL)
    cache._fail(URL, 0, pending, 10.0)
    cache._advance_clock(9)
    assert cache._begin(URL, 0, Pending()) == (None, pending)
    assert cache.get(URL) is None
    assert cache.counts["clients"] == 0
    cache._advance_clock(2)
    again = Pending()
    assert cache._begin(URL, 0, again) == (None, again)


def test_the_reaper_forgets_failures_that_are_over(new_cache):
    cache = new_cache()
    cache._fail(URL, 0, cache.start(URL), 10.0)
    cache._advance_clock(9)
    assert cache.expire() == 0
    assert cache._clear() != []
    cache._fail(URL, 0, cache.start(URL), 10.0)
    cache._advance_clock(11)
    assert cache.expire() == 0
    assert cache._clear() == []


def test_dropping_a_remembered_failure_is_no_dropped_client(new_cache):
    cache = new_cache()
    cache._fail(URL, 0, cache.start(URL), 10.0)
    assert not cache._drop(URL, Client())
    assert cache._clear() != []
    cache._fail(URL, 0, cache.start(URL), 10.0)
    assert not cache._drop(URL)
    again = Pending()
    assert cache._begin(URL, 0, again) == (None, again)
    assert cache.counts["invalidated"] == 0


def test_a_detached_connect_is_not_stored(new_cache):
    cache = new_cache()
    pending = cache.start(URL)
    assert cache._drop(URL)
    assert not cache._publish(URL, 0, pending, Client())
    assert cache.get(URL) is None
    assert cache.counts["connects"] == 1
    assert cache.counts["clients"] == 0
    assert cache.counts["invalidated"] == 0


def test_a_detached_connect_does_not_disturb_the_next_one(new_cache):
    cache = new_cache()
    detached = cache.start(URL)
    cache._drop(URL)
    current = cache.start(URL)
    assert not cache._publish(URL, 0, detached, Client())
    cache._fail(URL, 0, detached, 10.0)
    assert cache._begin(URL, 0, Pending()) == (None, current)
    client = Client()
    assert cache._publish(URL, 0, current, client)
    assert not cache._publish(URL, 0, detached, Client())
    cache._fail(URL, 0, detached, 0.0)
    assert cache.get(URL) is client


def test_dropping_by_client_leaves_a_connect_under_way_alone(new_cache):
    cache = new_cache()
    old = cache.store(URL)
    cache._drop(URL)
    pending = cache.start(URL)
    assert not cache._drop(URL, old)
    assert cache._publish(URL, 0, pending, Client())


def test_a_late_failure_keeps_the_replacement(new_cache):
    cache = new_cache()
    dead = cache.store(URL)
    assert cache._drop(URL, dead)
    replacement = cache.store(URL)
    for _ in range(8):  # every other caller of the dead client reports late
        assert not cache._drop(URL, dead)
    assert cache.get(URL) is replacement
    assert cache.counts["invalidated"] == 1


def test_identity_decides_and_not_equality(new_cache):
    class Equal(Client):
        def __eq__(self, other):
            raise AssertionError("a client was compared")

        __hash__ = None

    cache = new_cache()
    client = cache.store(URL, Equal())
    assert not cache._drop(URL, Equal())
    assert cache._drop(URL, client)


def test_dropping_what_is_not_there_changes_nothing(new_cache):
    cache = new_cache()
    cache.store(URL)
    assert not cache._drop(OTHER)
    assert not cache._drop(OTHER, Client())
    assert cache.counts["clients"] == 1


def test_clear_drops_everything_and_returns_connects_under_way(new_cache):
    cache = new_cache()
    clients = [cache.store(f"http://10.0.1.{n}:50051") for n in range(100)]
    pending = cache.start(URL)
    failed = cache.start(OTHER)
    cache._fail(OTHER, 0, failed, 10.0)
    returned = cache._clear()
    assert len(returned) == 2
    assert all(any(each is other for other in returned) for each in (pending, failed))
    assert {id(client) for client in cache.discarded} == {id(client) for client in clients}
    assert cache.counts["invalidated"] == 100
    assert cache.counts["clients"] == 0
    assert cache._keys() == []
    assert not cache._publish(URL, 0, pending, Client())
    assert cache._clear() == []


def test_nothing_is_stored_after_shut(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    under_way = cache.start(OTHER)
    assert cache._shut() == [under_way]
    assert cache.discarded == [client]
    assert not cache._publish(OTHER, 0, under_way, Client())
    late = Pending()  # a caller that had passed the check of `closed` before
    assert cache._begin(URL, 0, late) == (None, late)
    assert not cache._publish(URL, 0, late, Client())
    later = Pending()
    assert cache._begin(URL, 0, later) == (None, later)
    cache._fail(URL, 0, later, 10.0)
    assert cache._shut() == []
    assert cache._clear() == []


# -- lanes -----------------------------------------------------------------------------------


def test_lanes_hold_a_client_each(new_cache):
    cache = new_cache(lanes=3)
    clients = [cache.store(URL, lane=lane) for lane in range(3)]
    mine = cache._lane()
    assert cache.get(URL) is clients[mine]
    assert cache._keys() == [URL]
    assert cache.counts["clients"] == 3
    assert cache._drop(URL, clients[(mine + 1) % 3])
    assert cache.get(URL) is clients[mine]
    assert cache._holds(URL)
    assert cache._drop(URL)
    assert cache.counts["invalidated"] == 3
    assert not cache._holds(URL)
    assert len(cache.discarded) == 3


def test_a_thread_keeps_its_lane_and_threads_fill_lanes_evenly(new_cache):
    cache = new_cache(lanes=4)
    ready = threading.Barrier(8)

    def lanes_seen():
        ready.wait(10)  # all eight exist at once
        return {cache._lane() for _ in range(10)}

    seen = run_concurrently([lanes_seen] * 8)
    assert all(len(each) == 1 for each in seen)
    lanes = sorted(lane for each in seen for lane in each)
    assert lanes == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_spelling_belongs_to_a_lane(new_cache):
    cache = new_cache(lanes=2)
    mine = cache._lane()
    ours = cache.store(URL, lane=mine)
    theirs = cache.store(URL, lane=1 - mine)
    cache._alias("grpc://10.0.0.7:50051", URL, 1 - mine, theirs)
    assert cache.get("grpc://10.0.0.7:50051") is None
    cache._alias("grpc://10.0.0.7:50051", URL, mine, ours)
    assert cache.get("grpc://10.0.0.7:50051") is ours
    cache._drop(URL, theirs)
    assert cache.get("grpc://10.0.0.7:50051") is ours


def test_lanes_expire_and_clear_together(new_cache):
    cache = new_cache(lanes=3, idle_timeout=10)
    for lane in range(3):
        cache.store(URL, lane=lane)
    cache._advance_clock(11)
    assert cache.expire() == 3
    for lane in range(3):
        cache.store(URL, lane=lane)
    cache._clear()
    assert cache.counts["clients"] == 0


# -- construction ----------------------------------------------------------------------------


def test_a_cache_in_use_is_not_initialised_again(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    with pytest.raises(RuntimeError, match="in use"):
        cache.__init__(lanes=2)
    assert cache.get(URL) is client


def test_a_cache_not_in_use_may_be_initialised_again(new_cache):
    cache = new_cache(lanes=2)
    cache.__init__(lanes=3)
    clients = [cache.store(URL, lane=lane) for lane in range(3)]
    assert cache.get(URL) is clients[cache._lane()]


def test_options_are_keyword_only(cache_type):
    with pytest.raises(TypeError):
        cache_type(10)
