"""The bounded buffer beneath `resolver.read`, driven from many threads without a server."""

from __future__ import annotations

import threading

import pytest

from resolver._fetch import THREAD_NAME, Fetch
from tests.support.threads import run_concurrently, wait_until


class Stream:
    def __init__(self):
        self.cancelled = threading.Event()

    def cancel(self):
        self.cancelled.set()


def fetching():
    return [each for each in threading.enumerate() if each.name == THREAD_NAME]


def drain(fetch):
    found = []
    while (batch := fetch.take()) is not None:
        found.append(batch)
    return found


def numbers(each):
    def job(index, fetch):
        for number in range(each):
            fetch.put(index, (index, number))

    return job


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("prefetch", [1, 2, 7])
@pytest.mark.parametrize("concurrency", [1, 2, 16])
def test_every_batch_comes_once_and_few_wait(ordered, prefetch, concurrency):
    fetch = Fetch(numbers(5), 40, ordered=ordered, concurrency=concurrency, prefetch=prefetch)
    found = drain(fetch)
    wanted = [(index, number) for index in range(40) for number in range(5)]
    assert (found if ordered else sorted(found)) == wanted
    assert 1 <= fetch.peak <= prefetch + 1
    wait_until(lambda: not fetching())


def test_a_full_buffer_of_later_endpoints_does_not_stop_the_first():
    full = threading.Event()

    def job(index, fetch):
        if index == 0:
            assert full.wait(30)
        for number in range(3):
            fetch.put(index, (index, number))
            if index == 1 and number == 1:
                full.set()

    fetch = Fetch(job, 3, ordered=True, concurrency=2, prefetch=2)
    assert drain(fetch) == [(index, number) for index in range(3) for number in range(3)]


def test_stop_reaches_streams_that_wait_and_those_that_open_too_late():
    streams = [Stream(), Stream()]
    may_open = threading.Event()
    opened = threading.Event()
    begun = threading.Event()

    def job(index, fetch):
        if index == 1:
            begun.set()
            assert may_open.wait(30)
        with fetch.opened(streams[index]):
            opened.set()
            streams[index].cancelled.wait(30)

    fetch = Fetch(job, 2, ordered=False, concurrency=2, prefetch=1)

    def stop():
        assert opened.wait(30)
        assert begun.wait(30)
        fetch.stop()
        may_open.set()

    run_concurrently([lambda: drain(fetch), stop])
    assert streams[0].cancelled.wait(30)
    assert streams[1].cancelled.wait(30)
    wait_until(lambda: not fetching())


def test_the_first_error_counts_and_ends_the_others():
    begun = threading.Barrier(4)

    def job(index, fetch):
        begun.wait(30)
        if index == 2:
            raise KeyError("first")
        stream = Stream()
        with fetch.opened(stream):
            stream.cancelled.wait(30)
            raise OSError("cancelled")

    fetch = Fetch(job, 50, ordered=True, concurrency=4, prefetch=4)
    for _ in range(2):  # and it stays the answer: no short result afterwards
        with pytest.raises(KeyError, match="first"):
            fetch.take()
    wait_until(lambda: not fetching())


def test_stopping_races_with_reading():
    for _ in range(100):
        fetch = Fetch(numbers(20), 10, ordered=True, concurrency=3, prefetch=2)
        run_concurrently([lambda f=fetch: drain(f), fetch.stop, fetch.stop])
    wait_until(lambda: not fetching())


def test_stopped_before_the_start_starts_nothing():
    fetch = Fetch(numbers(1), 3, ordered=True, concurrency=3, prefetch=2)
    fetch.stop()
    assert fetch.take() is None
    assert fetch.schema() is None
    assert not fetching()


def test_a_thread_that_cannot_start_ends_the_others_and_stays_the_answer(monkeypatch):
    start, started = threading.Thread.start, []

    def only_one(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    fetch = Fetch(numbers(1_000), 3, ordered=True, concurrency=3, prefetch=2)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="can't start"):
        patched.setattr(threading.Thread, "start", only_one)
        fetch.take()
    with pytest.raises(RuntimeError, match="can't start"):
        fetch.take()
    wait_until(lambda: not fetching())
