"""How long a failure is remembered, without a resolver."""

from __future__ import annotations

import itertools

import pytest

from resolver._failures import JITTER, FailureMemory

URL = "http://10.0.0.7:50051"
OTHER = "http://10.0.0.8:50051"


def memory(first=1.0, longest=8.0, *, capacity=100, jitter=0.0):
    made = FailureMemory(first, longest, capacity=capacity, choose=lambda: jitter)
    made.advance_clock(1_000.0 - made.now())
    return made


def fail(made, key=URL, began=None):
    return made.failed(key, OSError("no"), made.now() if began is None else began)


def seconds(made, failure):
    """For how long it is remembered; whole milliseconds, as the clock runs."""
    return round(failure.until - made.now(), 2)


def test_each_failure_in_a_row_doubles_the_time_up_to_the_cap():
    made = memory()
    seen = []
    for _ in range(6):
        failure = fail(made)
        seen.append(seconds(made, failure))
        made.advance_clock(failure.until - made.now() + 0.01)
    assert seen == [1, 2, 4, 8, 8, 8]


def test_a_cap_equal_to_the_first_time_means_no_growth():
    made = memory(first=3.0, longest=3.0)
    for _ in range(3):
        failure = fail(made)
        assert seconds(made, failure) == 3
        made.advance_clock(3.01)


def test_a_worker_that_is_down_for_ever_overflows_nothing():
    made = memory(first=1.0, longest=1e9)
    for _ in range(2_000):
        failure = fail(made)
        made.advance_clock(failure.until - made.now() + 1.0)
    assert failure.in_a_row == 2_000
    assert failure.until - made.now() <= 1e9


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_jitter_only_shortens_and_by_a_fifth_at_most(jitter):
    made = memory(first=10.0, longest=10.0, jitter=jitter)
    assert seconds(made, fail(made)) == pytest.approx(10.0 * (1 - JITTER * jitter), abs=0.02)


def test_by_default_the_times_of_many_urls_differ():
    made = FailureMemory(10.0, 10.0, capacity=100)
    times = {round(fail(made, f"http://h:{port}").until - made.now(), 3) for port in range(1, 51)}
    assert len(times) > 25
    assert all(10.0 * (1 - JITTER) - 0.1 <= each <= 10.0 for each in times)


def test_lanes_that_fail_together_count_once():
    made = memory()
    first = fail(made)
    assert fail(made) is first
    assert made.current(URL).in_a_row == 1


def test_it_answers_only_until_it_is_time_to_try_again():
    made = memory()
    failure = fail(made)
    assert made.current(URL) is failure
    assert made.current(OTHER) is None
    made.advance_clock(1.01)
    assert made.current(URL) is None


def test_success_starts_over():
    made = memory()
    fail(made)
    made.advance_clock(1.01)
    fail(made)
    made.reached(URL)
    assert made.current(URL) is None
    assert seconds(made, fail(made)) == 1


def test_a_long_silence_starts_over():
    made = memory()
    fail(made)
    made.advance_clock(1 + 8 + 0.1)
    assert fail(made).in_a_row == 1


def test_what_began_before_it_was_forgotten_is_old_news():
    made = memory()
    began = made.now()
    made.advance_clock(1)
    assert not made.forget(URL)
    made.advance_clock(1)
    assert fail(made, began=began) is None
    assert made.current(URL) is None
    assert fail(made) is not None
    assert made.forget(URL)


def test_capacity_bounds_it_and_the_longest_waits_stay():
    made = memory(capacity=16)
    for number in range(200):
        fail(made, f"http://h:{number + 1}")
        made.advance_clock(0.001)
        assert len(made) <= 16
    assert made.current("http://h:200") is not None


def test_pruning_drops_only_what_has_no_say():
    made = memory()
    fail(made)
    made.advance_clock(5)
    fail(made, OTHER)
    made.advance_clock(5)
    made.prune()
    assert len(made) == 1
    made.forget(URL)
    made.advance_clock(8.1)
    made.prune()
    assert len(made) == 0


def test_clear_forgets_everything():
    made = memory()
    for port in itertools.islice(itertools.count(1), 5):
        fail(made, f"http://h:{port}")
    made.clear()
    assert len(made) == 0
