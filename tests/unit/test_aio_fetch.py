"""The bounded buffer beneath `resolver.aio.read`, without a server."""

from __future__ import annotations

import asyncio

import pytest

from resolver.aio._fetch import Fetch
from tests.support.aio import run, until


async def drain(fetch):
    found = []
    while (batch := await fetch.take()) is not None:
        found.append(batch)
    return found


@pytest.fixture(params=["as always", "eagerly"])
def begin(request):
    """Sets how the tasks of the running loop begin."""
    if request.param == "as always":
        return lambda: None
    if not hasattr(asyncio, "eager_task_factory"):
        pytest.skip("came with 3.12")
    return lambda: asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("prefetch", [1, 2, 7])
@pytest.mark.parametrize("concurrency", [1, 2, 16])
def test_every_batch_comes_once_and_few_wait(begin, ordered, prefetch, concurrency):
    async def job(index, fetch):
        for number in range(5):
            await fetch.put(index, (index, number))

    async def main():
        begin()
        fetch = Fetch(job, 40, ordered=ordered, concurrency=concurrency, prefetch=prefetch)
        found = await drain(fetch)
        wanted = [(index, number) for index in range(40) for number in range(5)]
        assert (found if ordered else sorted(found)) == wanted
        assert 1 <= fetch.peak <= prefetch + 1

    run(main())


@pytest.mark.parametrize("failing", [0, 2])
def test_the_first_error_counts_and_nothing_begins_after_it(begin, failing):
    running = set()

    async def job(index, fetch):
        if index == failing:
            raise KeyError("first")
        running.add(index)
        try:
            await asyncio.Event().wait()
        finally:
            running.discard(index)

    async def main():
        begin()
        fetch = Fetch(job, 50, ordered=True, concurrency=4, prefetch=4)
        for _ in range(2):  # and it stays the answer: no short result afterwards
            with pytest.raises(KeyError, match="first"):
                await fetch.take()
        await until(lambda: not running)

    run(main())


def test_stopping_races_with_reading(begin):
    async def job(index, fetch):
        for number in range(20):
            await fetch.put(index, number)

    async def main():
        begin()
        for delay in range(30):
            fetch = Fetch(job, 10, ordered=True, concurrency=3, prefetch=2)
            reading = asyncio.create_task(drain(fetch))
            for _ in range(delay):
                await asyncio.sleep(0)
            await asyncio.gather(fetch.stop(), fetch.stop())
            await reading

    run(main())


def test_stopped_before_the_start_starts_nothing(begin):
    async def main():
        begin()
        fetch = Fetch(None, 3, ordered=True, concurrency=3, prefetch=2)
        await fetch.stop()
        assert await fetch.take() is None
        assert await fetch.schema() is None

    run(main())
