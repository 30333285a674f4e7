"""Coroutines run by blocking code: results, errors, and ends."""

from __future__ import annotations

import asyncio
import threading

import pytest

from resolver.distributed import _loops
from resolver.distributed._loops import run_all
from tests.support.distributed import eventually


def nothing():
    pass


async def value(number):
    await asyncio.sleep(0)
    return number


def test_results_come_in_order_from_loops_of_their_own():
    loops = set()

    async def loop(number):
        loops.add(asyncio.get_running_loop())
        while len(loops) < 3:  # noqa: ASYNC110  # no event belongs to three loops
            await asyncio.sleep(0.001)
        return number

    assert run_all([loop(number) for number in range(3)], check=nothing) == [0, 1, 2]
    assert run_all([], check=nothing) == []


def test_loops_are_kept():
    run_all([value(1)], check=nothing)
    before = threading.active_count()
    for _ in range(5):
        assert run_all([value(2)], check=nothing) == [2]
    assert threading.active_count() == before


def test_more_coroutines_than_loops_share_them(monkeypatch):
    monkeypatch.setattr(_loops, "_idle", [])
    monkeypatch.setattr(_loops, "_MOST", 2)
    loops, begun = set(), []

    async def all_at_once(number):
        loops.add(asyncio.get_running_loop())
        begun.append(number)
        while len(begun) < 5:  # noqa: ASYNC110  # no event belongs to two loops
            await asyncio.sleep(0.001)
        return number

    results = run_all([all_at_once(number) for number in range(5)], check=nothing)
    assert results == [0, 1, 2, 3, 4]
    assert set(_loops._idle) == loops
    assert len(loops) == 2


def test_without_a_loop_nothing_is_left_behind(monkeypatch):
    monkeypatch.setattr(_loops, "_idle", [])
    taken = [_loops._taken()]
    monkeypatch.setattr(_loops, "_taken", taken.pop)
    coroutines = [value(number) for number in range(3)]
    with pytest.raises(IndexError):
        run_all(coroutines, check=nothing)
    assert len(_loops._idle) == 1
    assert all(coroutine.cr_frame is None for coroutine in coroutines)


def test_an_error_cancels_the_others_and_waits_for_them():
    ended = []

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def failing():
        await asyncio.sleep(0.01)
        raise BaseException("a panic is one")

    with pytest.raises(BaseException, match="a panic is one"):
        run_all([forever(), failing(), forever()], check=nothing)
    assert ended == [True, True]


def test_what_check_raises_cancels_all():
    def check():
        raise KeyError("over")

    async def forever():
        await asyncio.Event().wait()

    with pytest.raises(KeyError, match="over"):
        run_all([forever()], check=check)


def test_one_that_is_cancelled_before_it_began_ends_too(monkeypatch):
    """Its loop is busy with what came before; nobody may wait for it, or lose the loop."""
    monkeypatch.setattr(_loops, "_idle", [])
    done = _loops.queue.SimpleQueue()
    busy, go = threading.Event(), threading.Event()
    run_all([value(0)], check=nothing)
    (loop,) = _loops._idle
    loop.call_soon_threadsafe(lambda: (busy.set(), go.wait(10)))
    assert busy.wait(10)
    call = _loops._Call(7, value(0), done, _loops._Lane(1))
    call.cancel()
    go.set()
    assert done.get(timeout=10) == 7
    assert isinstance(call.error, asyncio.CancelledError)
    assert _loops._idle == [loop]


def test_loops_that_are_not_kept_are_closed(monkeypatch):
    monkeypatch.setattr(_loops, "_idle", [])
    monkeypatch.setattr(_loops, "_KEPT", 1)
    loops = []

    async def loop(number):
        loops.append(asyncio.get_running_loop())
        while len(loops) < 3:  # noqa: ASYNC110  # no event belongs to three loops
            await asyncio.sleep(0.001)
        return number

    run_all([loop(number) for number in range(3)], check=nothing)
    eventually(lambda: sum(loop.is_closed() for loop in loops) == 2)
