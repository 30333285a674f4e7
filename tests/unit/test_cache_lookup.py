"""What a lookup finds: identity, other spellings, odd strings, colliding hashes."""

from __future__ import annotations

import pytest

from tests.support.implementations import Client
from tests.support.urls import in_one_stripe, stripe_of

URL = "http://10.0.0.7:50051"
OTHER = "http://10.0.0.8:50051"
SPELLINGS = [f"grpc://10.0.0.7:50051{'/' * slashes}" for slashes in range(1, 8)]


def test_a_hit_is_the_same_object_every_time(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    assert all(cache.get_flight_client_for_url(URL) is client for _ in range(100))
    assert cache.missed == []
    assert cache.counts["hits"] == 100


def test_an_equal_string_that_is_another_object_hits(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    copy = "".join(list(URL))
    assert copy is not URL
    assert cache.get_flight_client_for_url(copy) is client


def test_a_string_never_hashed_before_hits(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    # A decoded string has no hash yet; the cache must not take the missing one for one.
    for _ in range(50):
        assert cache.get_flight_client_for_url(URL.encode().decode()) is client


@pytest.mark.parametrize(
    "text", ["", "x", "\0", "ü" * 10, "ą" * 10, "\U0001f600" * 10, "x" * 10_000]
)
def test_any_text_is_a_key_by_value(new_cache, text):
    cache = new_cache()
    client = cache.store(text)
    assert cache.get_flight_client_for_url("".join(list(text))) is client
    assert cache.get(text + "x") is None


def test_strings_of_equal_bytes_and_different_width_differ(new_cache):
    cache = new_cache()
    narrow, wide = "\x01\x01\x01\x01", "ā" * 2  # the same bytes in memory
    cache.store(narrow)
    assert cache.get(wide) is None
    assert cache.get("ā" * 4) is None


def test_an_unknown_url_goes_to_miss_and_its_result_comes_back(new_cache, cache_type):
    class Answering(cache_type):
        def _miss(self, url):
            self.missed.append(url)
            return "client"

    cache = new_cache(Answering)
    assert cache.get_flight_client_for_url(URL) == "client"
    assert cache.get_flight_client_for_url(None) == "client"
    assert cache.missed == [URL, None]
    assert cache.counts["hits"] == 0


def test_what_miss_raises_reaches_the_caller(new_cache):
    cache = new_cache()
    with pytest.raises(LookupError, match=r"10\.0\.0\.7"):
        cache.get_flight_client_for_url(URL)


def test_the_base_class_alone_knows_no_url(implementation):
    from tests.support.implementations import load

    with pytest.raises(KeyError):
        load(implementation).ClientCache().get_flight_client_for_url(URL)


@pytest.mark.parametrize("thing", [None, 7, b"http://10.0.0.7:50051", object(), [], ("http",)])
def test_what_is_no_str_goes_to_miss_untouched(new_cache, thing):
    cache = new_cache()
    cache.store(URL)
    assert cache.get(thing) is None
    assert cache.missed[0] is thing


class SpyingStr(str):
    __slots__ = ()
    calls: list[str] = []

    def __hash__(self):
        self.calls.append("hash")
        return str.__hash__(self)

    def __eq__(self, other):
        self.calls.append("eq")
        return str.__eq__(self, other)


def test_a_str_subclass_never_runs_its_own_code_in_the_cache(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    SpyingStr.calls.clear()
    spy = SpyingStr(URL)
    assert cache.get(spy) is None
    assert cache.missed[0] is spy
    for call in (
        lambda: cache._begin(spy, 0, object()),
        lambda: cache._publish(spy, 0, object(), client),
        lambda: cache._fail(spy, 0, object(), 0.0),
        lambda: cache._alias(spy, URL, 0, client),
        lambda: cache._alias("x", spy, 0, client),
        lambda: cache._drop(spy),
        lambda: cache._holds(spy),
    ):
        with pytest.raises(TypeError):
            call()
    assert SpyingStr.calls == []
    assert cache.get_flight_client_for_url(URL) is client


# -- other spellings -------------------------------------------------------------------------


def test_another_spelling_hits_without_a_miss(new_cache):
    cache = new_cache()
    client = cache.store(URL, aliases=SPELLINGS[:1])
    for _ in range(10):
        assert cache.get_flight_client_for_url(SPELLINGS[0]) is client
    assert cache.missed == []
    assert cache.counts["hits"] == 10
    assert cache.counts["clients"] == 1


def test_four_spellings_are_remembered_and_no_more(new_cache):
    cache = new_cache()
    client = cache.store(URL, aliases=SPELLINGS)
    assert [cache.get(spelling) for spelling in SPELLINGS] == [client] * 4 + [None] * 3
    assert cache.get_flight_client_for_url(URL) is client


def test_a_spelling_given_twice_takes_one_place(new_cache):
    cache = new_cache()
    client = cache.store(URL, aliases=SPELLINGS[:1] * 10 + SPELLINGS[1:4])
    assert [cache.get(spelling) for spelling in SPELLINGS[:4]] == [client] * 4


def test_a_spelling_counts_as_no_entry_of_its_own(new_cache):
    cache = new_cache(max_clients=1)
    client = cache.store(URL, aliases=SPELLINGS)
    assert cache._keys() == [URL]
    assert cache.counts["evicted_capacity"] == 0
    assert cache.get(SPELLINGS[0]) is client


@pytest.mark.parametrize("how", ["drop", "clear", "expire", "evict", "shut"])
def test_every_spelling_goes_with_its_entry(new_cache, how):
    cache = new_cache(max_clients=1, idle_timeout=10)
    client = cache.store(URL, aliases=SPELLINGS[:4])
    if how == "drop":
        assert cache._drop(URL, client)
    elif how == "clear":
        cache._clear()
    elif how == "expire":
        cache._advance_clock(11)
        assert cache.expire() == 1
    elif how == "evict":
        cache.store(OTHER)
    else:
        cache._shut()
    assert [cache.get(url) for url in (URL, *SPELLINGS[:4])] == [None] * 5
    assert cache.discarded == [client]
    cache._validate()


def test_a_spelling_never_serves_the_client_before_the_last(new_cache):
    cache = new_cache()
    old = cache.store(URL, aliases=SPELLINGS[:2])
    cache._drop(URL, old)
    new = cache.store(URL)
    assert cache.get(SPELLINGS[0]) is None
    cache._alias(SPELLINGS[0], URL, 0, new)
    assert cache.get(SPELLINGS[0]) is new


def test_a_spelling_of_a_client_already_replaced_is_not_remembered(new_cache):
    cache = new_cache()
    old = cache.store(URL)
    cache._drop(URL)
    new = cache.store(URL)
    cache._alias(SPELLINGS[0], URL, 0, old)
    assert cache.get(SPELLINGS[0]) is None
    assert cache.get(URL) is new


def test_a_spelling_of_what_is_not_cached_is_not_remembered(new_cache):
    cache = new_cache()
    cache._alias(SPELLINGS[0], URL, 0, Client())
    pending = cache.start(URL)
    cache._alias(SPELLINGS[0], URL, 0, Client())
    assert cache.get(SPELLINGS[0]) is None
    cache._fail(URL, 0, pending, 5.0)
    cache._alias(SPELLINGS[0], URL, 0, Client())
    assert cache.get(SPELLINGS[0]) is None


def test_a_hit_through_a_spelling_keeps_the_client_from_idling_out(new_cache):
    cache = new_cache(idle_timeout=10)
    client = cache.store(URL, aliases=SPELLINGS[:1])
    for _ in range(5):
        cache._advance_clock(8)
        assert cache.get(SPELLINGS[0]) is client
    assert cache._holds(URL)
    assert cache._begin(URL, 0, object()) == (client, None)
    assert cache.get(URL) is client


# -- collisions ------------------------------------------------------------------------------


def test_urls_that_share_a_stripe_and_a_probe_run_stay_apart(new_cache):
    keys = in_one_stripe(40, low_bits=3)
    assert len({stripe_of(key) for key in keys}) == 1
    cache = new_cache()
    clients = {key: cache.store(key) for key in keys}
    assert all(cache.get(key) is client for key, client in clients.items())
    # Out of the middle first: what probed past the hole must still be found.
    for key in keys[1::3] + keys[::3] + keys[2::3]:
        assert cache._drop(key, clients.pop(key))
        cache._validate()
        assert cache.get(key) is None
        assert all(cache.get(left) is client for left, client in clients.items())


def test_a_probe_run_that_wraps_around_the_table_survives_removals(new_cache):
    # In a table of eight slots, these probe from the last one and wrap to the first.
    keys = [key for key in in_one_stripe(400) if hash(key) % 8 == 7][:5]
    cache = new_cache()
    for first in keys:
        clients = {key: cache.store(key) for key in keys}
        cache._drop(first)
        del clients[first]
        assert all(cache.get(key) is client for key, client in clients.items())
        cache._clear()


def test_tables_grow_and_keep_everything(new_cache):
    keys = in_one_stripe(300)
    cache = new_cache()
    clients = {key: cache.store(key, aliases=[key + "/"]) for key in keys}
    cache._validate()
    assert all(cache.get(key) is client for key, client in clients.items())
    assert all(cache.get(key + "/") is client for key, client in clients.items())
    assert sorted(cache._keys()) == sorted(keys)


# -- snapshots -------------------------------------------------------------------------------


def test_keys_and_holds_see_live_clients_only_and_count_nothing(new_cache):
    cache = new_cache(idle_timeout=10)
    cache.store(URL, aliases=SPELLINGS[:1])
    connecting = cache.start(OTHER)
    before = cache.counts
    assert cache._keys() == [URL]
    assert cache._holds(URL)
    assert not cache._holds(OTHER)
    assert not cache._holds("http://nobody:1")
    cache._advance_clock(11)
    assert not cache._holds(URL)
    assert cache.counts == before
    cache._fail(OTHER, 0, connecting, 5.0)
    assert not cache._holds(OTHER)


def test_looking_does_not_keep_a_client_from_idling_out(new_cache):
    cache = new_cache(idle_timeout=10)
    cache.store(URL)
    cache._advance_clock(6)
    assert cache._holds(URL)
    assert cache._keys() == [URL]
    cache._advance_clock(6)
    assert cache.get(URL) is None
