"""The tasks of a worker: a few at a time, waited for in pieces, cancelled, forgotten."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from resolver.distributed._task_pool import TaskCancelledError, TaskPool, TaskPoolFullError
from resolver.distributed._wire import OutputKey
from tests.support.distributed import eventually
from tests.support.threads import run_concurrently

QUERY = "0" * 32


def key(task=0, query=QUERY, attempt=0):
    return OutputKey(query, 1, task, attempt)


def until_cancelled(is_cancelled):
    eventually(is_cancelled)
    raise InterruptedError


@pytest.fixture
def pool():
    pool = TaskPool(2)
    yield pool
    pool.close()
    eventually(lambda: pool.running == 0)


def test_a_result_is_there_for_everyone_who_asks(pool):
    pool.start(key(), lambda _: b"report")
    assert run_concurrently([lambda: pool.wait(key(), 10)] * 4) == [b"report"] * 4
    assert pool.wait(key(), 0) == b"report"


def test_waiting_ends_before_the_task_does(pool):
    go = threading.Event()
    pool.start(key(), lambda _: go.wait(10))
    assert pool.wait(key(), 0) is None
    assert pool.wait(key(), 0.05) is None
    go.set()
    assert pool.wait(key(), 10) is True


def test_an_error_is_raised_for_everyone_who_asks_without_its_frames(pool):
    def fail(_):
        raise ZeroDivisionError("in the plan") from OSError()

    pool.start(key(), fail)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="in the plan") as told:
            pool.wait(key(), 10)
        assert "fail" not in [entry.name for entry in told.traceback]
        assert told.value.__cause__ is None


def test_what_is_no_exception_is_an_error_too(pool):
    class Panic(BaseException):
        pass

    def panic(_):
        raise Panic

    pool.start(key(), panic)
    with pytest.raises(Panic):
        pool.wait(key(), 10)
    pool.start(key(1), lambda _: b"next")
    assert pool.wait(key(1), 10) == b"next"


def test_a_key_is_started_once(pool):
    pool.start(key(), lambda _: b"")
    with pytest.raises(FileExistsError):
        pool.start(key(), lambda _: b"")
    pool.wait(key(), 10)
    with pytest.raises(FileExistsError):
        pool.start(key(), lambda _: b"")
    pool.start(key(attempt=1), lambda _: b"again")
    assert pool.wait(key(attempt=1), 10) == b"again"


def test_an_unknown_key_is_not_found(pool):
    with pytest.raises(KeyError):
        pool.wait(key(), 10)


def test_no_more_tasks_run_than_there_are_slots_and_the_rest_keep_their_order(pool):
    go, order, most = threading.Event(), [], []

    def task(number):
        def run(_):
            most.append(pool.running)
            order.append(number)
            go.wait(10)

        return run

    for number in range(6):
        pool.start(key(number), task(number))
    eventually(lambda: len(order) == 2)
    assert (pool.running, pool.queued) == (2, 4)
    go.set()
    for number in range(6):
        assert pool.wait(key(number), 10) is None
        eventually(lambda number=number: number in order)
    assert max(most) == 2
    assert sorted(order[:2]) == [0, 1]
    assert sorted(order) == list(range(6))
    assert [max(order[:n]) for n in (4, 6)] == [3, 5]


def test_only_so_many_tasks_wait():
    """One more is refused and leaves nothing; it may come again once another has gone."""
    pool = TaskPool(1, max_queued=2)
    other = "f" * 32
    try:
        pool.start(key(0), until_cancelled)
        eventually(lambda: pool.queued == 0)
        for number in (1, 2):
            pool.start(key(number), lambda _: b"report")
        with pytest.raises(TaskPoolFullError, match="2 tasks wait"):
            pool.start(key(0, other), lambda _: b"other")
        with pytest.raises(KeyError):
            pool.wait(key(0, other), 0)
        with pytest.raises(FileExistsError):
            pool.start(key(2), lambda _: b"replayed")
        pool.release(QUERY)
        eventually(lambda: pool.running == 0)
        pool.start(key(0, other), lambda _: b"other")
        assert pool.wait(key(0, other), 10) == b"other"
    finally:
        pool.close()


def test_a_caller_that_goes_away_cancels_the_task(pool):
    ended = threading.Event()

    def run(is_cancelled):
        try:
            until_cancelled(is_cancelled)
        finally:
            ended.set()

    pool.start(key(), run)
    with pytest.raises(TaskCancelledError):
        pool.wait(key(), 10, lambda: True)
    assert ended.wait(10)
    with pytest.raises(InterruptedError):
        pool.wait(key(), 10)


def test_a_caller_that_goes_away_cancels_a_queued_task_at_once(pool):
    go = threading.Event()
    for number in range(2):
        pool.start(key(number), lambda _: go.wait(10))
    pool.start(key(2), lambda _: pytest.fail("it ran"))
    with pytest.raises(TaskCancelledError):
        pool.wait(key(2), 10, lambda: True)
    assert pool.queued == 0
    with pytest.raises(TaskCancelledError):
        pool.wait(key(2), 10)
    go.set()


def test_release_cancels_running_and_queued_tasks_of_that_query_only(pool):
    go = threading.Event()
    pool.start(key(0), until_cancelled)
    pool.start(key(0, "1" * 32), lambda _: go.wait(10))
    pool.start(key(1), lambda _: pytest.fail("it ran"))
    pool.start(key(1, "1" * 32), lambda _: b"other")
    outcomes, waiting = {}, []

    def wait(number):
        waited = False

        def is_cancelled():
            nonlocal waited
            if not waited:
                waiting.append(number)
                waited = True
            return False

        try:
            pool.wait(key(number), 10, is_cancelled)
        except (InterruptedError, TaskCancelledError) as error:
            outcomes[number] = type(error)

    waiters = [threading.Thread(target=wait, args=[number]) for number in range(2)]
    for waiter in waiters:
        waiter.start()
    eventually(lambda: len(waiting) == 2)
    pool.release(QUERY)
    pool.release(QUERY)
    for waiter in waiters:
        waiter.join(10)
    assert outcomes == {0: InterruptedError, 1: TaskCancelledError}
    with pytest.raises(KeyError):
        pool.wait(key(0), 0)
    assert pool.wait(key(1, "1" * 32), 10) == b"other"
    go.set()
    assert pool.wait(key(0, "1" * 32), 10) is True


def test_nothing_of_a_released_query_is_kept(pool):
    class Thing:
        pass

    things = [Thing() for _ in range(3)]
    pool.start(key(0), lambda _, kept=things[0]: kept)
    pool.wait(key(0), 10)
    pool.start(key(1), lambda is_cancelled, _kept=things[1]: until_cancelled(is_cancelled))
    pool.start(key(2), lambda is_cancelled, _kept=things[2]: until_cancelled(is_cancelled))
    references = [weakref.ref(thing) for thing in things]
    things.clear()
    pool.release(QUERY)
    eventually(lambda: (gc.collect(), not any(reference() for reference in references))[1])


def test_a_closed_pool_starts_nothing(pool):
    pool.start(key(), until_cancelled)
    pool.close()
    pool.close()
    with pytest.raises(TaskCancelledError):
        pool.start(key(1), lambda _: b"")


def test_a_thread_that_cannot_start_leaves_its_slot_free(pool, monkeypatch):
    def refuse(_self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="new thread"):
        patched.setattr(threading.Thread, "start", refuse)
        pool.start(key(), lambda _: b"")
    assert (pool.running, pool.queued) == (0, 0)
    pool.start(key(), lambda _: b"now")
    assert pool.wait(key(), 10) == b"now"


@pytest.mark.parametrize("slots", [0, -1])
def test_a_pool_without_slots_is_refused(slots):
    with pytest.raises(ValueError, match="at least 1"):
        TaskPool(slots)


def test_an_interpreter_exits_while_a_task_runs():
    script = (
        "import threading\n"
        "from resolver.distributed._task_pool import TaskPool\n"
        "from resolver.distributed._wire import OutputKey\n"
        "begun = threading.Event()\n"
        "def run(_):\n"
        "    begun.set()\n"
        "    threading.Event().wait()\n"
        "TaskPool(1).start(OutputKey('0' * 32, 1, 0, 0), run)\n"
        "assert begun.wait(10)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
