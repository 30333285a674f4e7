"""What a resolver does with a worker that cannot be reached, on both implementations."""

from __future__ import annotations

import pickle
import threading

import pytest

from resolver import WorkerConnectError, WorkerConnectTimeoutError
from resolver._failures import JITTER
from resolver.testing import FakeConnector
from tests.support.fixtures import resolver_type
from tests.support.threads import Background, run_concurrently, wait_until

__all__ = ["resolver_type"]

URL = "http://10.0.0.7:50051"
OTHER = "http://10.0.0.8:50051"


@pytest.fixture
def connector():
    made = FakeConnector()
    made.fail(OSError("no"))
    return made


@pytest.fixture
def new_resolver(resolver_type, connector):
    """Makes resolvers over `connector`; validates each after the test."""
    made = []

    def make(**options):
        made.append(resolver_type(connector, **options))
        return made[-1]

    yield make
    for resolver in made:
        resolver._validate()
        resolver.close()


def failure(resolver, url=URL):
    """The error of a lookup, which must fail."""
    with pytest.raises(WorkerConnectError) as caught:
        resolver.get_flight_client_for_url(url)
    return caught.value


def test_the_time_doubles_with_each_failure_in_a_row(new_resolver, connector):
    resolver = new_resolver(failure_ttl=1.0, max_failure_ttl=4.0)
    for attempt, longest in enumerate([1, 2, 4, 4], start=1):
        left = failure(resolver).retry_after
        assert (1 - JITTER) * longest - 0.1 < left <= longest
        assert connector.calls() == attempt
        assert 0 < failure(resolver).retry_after <= left
        assert connector.calls() == attempt, "a remembered failure was not answered from memory"
        resolver._advance_clock(left + 0.1)


def test_the_first_success_starts_over(new_resolver, connector):
    resolver = new_resolver(failure_ttl=1.0)
    for _ in range(3):
        resolver._advance_clock(failure(resolver).retry_after + 0.1)
    connector.fail(None)
    resolver.invalidate(OTHER)  # somebody else's
    client = resolver.get_flight_client_for_url(URL)
    resolver.invalidate(URL, client)
    connector.fail(OSError("again"))
    assert failure(resolver).retry_after <= 1.0


def test_each_url_has_a_time_of_its_own(new_resolver):
    resolver = new_resolver(failure_ttl=1.0)
    for _ in range(3):
        resolver._advance_clock(failure(resolver).retry_after + 0.1)
    assert failure(resolver, OTHER).retry_after <= 1.0
    assert failure(resolver).retry_after > 5.0


def test_without_failure_ttl_nothing_is_remembered_and_the_error_says_so(new_resolver, connector):
    resolver = new_resolver()
    assert failure(resolver).retry_after is None
    assert failure(resolver).retry_after is None
    assert connector.calls() == 2
    assert not resolver.forgive(URL)


def test_by_default_the_longest_time_is_32_times_the_first(new_resolver):
    assert new_resolver(failure_ttl=2.0).max_failure_ttl == 64.0
    assert new_resolver(failure_ttl=2.0, max_failure_ttl=2.0).max_failure_ttl == 2.0


@pytest.mark.parametrize(
    ("value", "error"), [(0.5, ValueError), ("2", TypeError), (1e10, ValueError)]
)
def test_a_longest_time_that_makes_no_sense_is_refused_by_name(new_resolver, value, error):
    with pytest.raises(error, match="max_failure_ttl"):
        new_resolver(failure_ttl=1.0, max_failure_ttl=value)


def test_retry_after_is_what_is_left_when_the_error_is_raised(new_resolver):
    resolver = new_resolver(failure_ttl=10.0, max_failure_ttl=10.0)
    first = failure(resolver)
    resolver._advance_clock(5)
    second = failure(resolver)
    assert second is not first
    assert second.retry_after == pytest.approx(first.retry_after - 5, abs=0.5)


def test_retry_after_survives_pickling(new_resolver):
    error = failure(new_resolver(failure_ttl=10.0))
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.retry_after, copy.url, str(copy)) == (error.retry_after, URL, str(error))


def test_waiters_of_one_failed_connect_all_learn_when_to_come_back(new_resolver, connector):
    resolver = new_resolver(failure_ttl=10.0)
    gate = connector.block(URL)
    waiting = [Background(lambda: failure(resolver)) for _ in range(4)]
    wait_until(lambda: resolver.stats().waits == 3)
    gate.release()
    assert all(0 < each.result().retry_after <= 10 for each in waiting)
    assert connector.calls() == 1


def test_an_error_of_another_kind_is_remembered_too(new_resolver, connector):
    connector.fail(WorkerConnectTimeoutError("too slow", url=URL))
    resolver = new_resolver(failure_ttl=10.0)
    for _ in range(3):
        assert isinstance(failure(resolver), WorkerConnectTimeoutError)
    assert connector.calls() == 1


# -- forgiving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 3])
def test_forgiving_makes_the_next_lookup_try_again(new_resolver, connector, lanes):
    resolver = new_resolver(failure_ttl=1000.0, connections_per_url=lanes)
    failure(resolver)
    assert resolver.forgive("grpc://10.0.0.7:50051/")
    assert not resolver.forgive(URL)
    assert failure(resolver).retry_after <= 1000.0
    assert connector.calls() == 2
    connector.fail(None)
    assert resolver.forgive(URL)
    resolver.get_flight_client_for_url(URL)


def test_forgiving_a_worker_that_works_costs_it_nothing(new_resolver, connector):
    connector.fail(None)
    resolver = new_resolver(failure_ttl=10.0)
    client = resolver.get_flight_client_for_url(URL)
    assert not resolver.forgive(URL)
    assert resolver.get_flight_client_for_url(URL) is client
    assert resolver.stats().invalidated == 0


def test_forgiving_does_not_detach_a_connect_under_way(new_resolver, connector):
    connector.fail(None)
    resolver = new_resolver(failure_ttl=10.0)
    with connector.block(URL) as gate:
        first = Background(lambda: resolver.get_flight_client_for_url(URL))
        gate.wait_entered()
        resolver.forgive(URL)
    assert resolver.get_flight_client_for_url(URL) is first.result()
    assert connector.calls() == 1


@pytest.mark.parametrize("forget", ["forgive", "invalidate"])
def test_a_connect_that_fails_after_its_url_was_forgiven_is_not_remembered(
    new_resolver, connector, forget
):
    resolver = new_resolver(failure_ttl=1000.0)
    with connector.block(URL) as gate:
        late = Background(lambda: failure(resolver))
        gate.wait_entered()
        getattr(resolver, forget)(URL)
    assert late.result().retry_after is None
    connector.fail(None)
    resolver.get_flight_client_for_url(URL)


def test_invalidating_a_client_that_failed_forgives_nothing(new_resolver, connector):
    resolver = new_resolver(failure_ttl=1000.0)
    failure(resolver)
    assert not resolver.invalidate(URL, object())
    failure(resolver)
    assert connector.calls() == 1


@pytest.mark.parametrize("lanes", [1, 2])
def test_clear_forgets_failures_too(new_resolver, connector, lanes):
    resolver = new_resolver(failure_ttl=1000.0, connections_per_url=lanes)
    failure(resolver)
    resolver.clear()
    connector.fail(None)
    resolver.get_flight_client_for_url(URL)


# -- several connections per URL ---------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 4])
def test_one_lanes_failure_answers_for_the_others(new_resolver, connector, lanes):
    resolver = new_resolver(failure_ttl=1000.0, connections_per_url=lanes)
    failure(resolver)
    errors = run_concurrently([lambda: failure(resolver)] * 8)
    assert all(0 < error.retry_after <= 1000 for error in errors)
    assert connector.calls() == 1
    stats = resolver.stats()
    assert (stats.misses, stats.waits, stats.connect_failures) == (1, 8, 1)


def test_one_lanes_success_ends_the_failure_of_all(resolver_type):
    class SlowThenRefusing:
        def __init__(self):
            self.calls = 0
            self.may_answer = threading.Event()
            self.entered = threading.Event()

        def connect(self, url):
            self.calls += 1
            if self.calls == 2:
                raise OSError("no")
            if self.calls == 1:
                self.entered.set()
                assert self.may_answer.wait(10)
            return object()

    connector = SlowThenRefusing()
    resolver = resolver_type(connector, failure_ttl=1000.0, connections_per_url=4)
    slow = Background(lambda: resolver._resolve(URL, 0))
    assert connector.entered.wait(10)
    failure_on(resolver, 1)
    failure_on(resolver, 1)
    assert connector.calls == 2
    connector.may_answer.set()
    slow.result()
    assert resolver._resolve(URL, 1) is not slow.result()
    assert connector.calls == 3


def test_lanes_that_fail_at_once_make_one_step(new_resolver, connector):
    resolver = new_resolver(failure_ttl=1.0, connections_per_url=4)
    with connector.block(URL) as gate:
        lanes = [Background(lambda lane=lane: failure_on(resolver, lane)) for lane in range(4)]
        gate.wait_entered(4)
    for each in lanes:
        assert each.result().retry_after <= 1.0
    assert connector.calls() == 4


def failure_on(resolver, lane):
    with pytest.raises(WorkerConnectError) as caught:
        resolver._resolve(URL, lane)
    return caught.value


# -- what it keeps -----------------------------------------------------------------------------


def test_a_failure_that_was_evicted_from_the_map_still_answers(new_resolver, connector):
    resolver = new_resolver(failure_ttl=1000.0, max_clients=2)
    failure(resolver)
    connector.fail(None)
    for port in range(1, 3):
        resolver.get_flight_client_for_url(f"http://h:{port}")
    failure(resolver)
    assert connector.calls(URL) == 1


def test_the_reaper_drops_failures_that_have_no_say(new_resolver):
    resolver = new_resolver(failure_ttl=1.0, max_failure_ttl=2.0)
    failure(resolver)
    resolver._advance_clock(10)
    for stripe in range(resolver._stripe_count):
        resolver._expire(stripe)
    assert len(resolver._failures) == 0
