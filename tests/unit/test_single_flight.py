"""One outcome, any number of waiters, whatever interrupts whom."""

from __future__ import annotations

import threading

import pytest

from resolver import WorkerConnectError
from resolver._single_flight import PendingConnect
from tests.support.threads import Background, run_concurrently, wait_until


def waiting(pending: PendingConnect, count: int = 1, seconds: float | None = 20.0):
    """Threads that wait for `pending`, once they really do."""
    waiters = [Background(lambda: pending.wait(seconds)) for _ in range(count)]
    wait_until(lambda: len(pending._waiters) == count)
    return waiters


def test_nobody_connects_before_somebody_says_so():
    assert PendingConnect().connecting_thread is None


def test_waiters_wake_with_the_client():
    pending, client = PendingConnect(), object()
    waiters = waiting(pending, 8)
    assert not pending.ended
    pending.succeed(client)
    assert all(waiter.result() for waiter in waiters)
    assert pending.ended
    assert pending.client is client
    pending.raise_error()


def test_who_comes_late_does_not_wait():
    pending = PendingConnect()
    pending.succeed("client")
    assert pending.wait(None)
    assert pending.wait(0)


@pytest.mark.parametrize("seconds", [-1, 0, 0.01])
def test_waiting_ends_after_its_time(seconds):
    assert not PendingConnect().wait(seconds)


@pytest.mark.parametrize("seconds", [None, float("inf"), 1e300, threading.TIMEOUT_MAX + 1])
def test_any_time_may_be_waited(seconds):
    pending = PendingConnect()
    (waiter,) = waiting(pending, seconds=seconds)
    pending.succeed("client")
    assert waiter.result()


def test_a_waiter_that_gave_up_disturbs_nobody():
    pending = PendingConnect()
    assert not pending.wait(0)
    (waiter,) = waiting_more(pending)
    pending.succeed("client")
    assert waiter.result()


def waiting_more(pending):
    before = len(pending._waiters)
    waiter = Background(lambda: pending.wait(20))
    wait_until(lambda: len(pending._waiters) > before)
    return [waiter]


def test_the_first_outcome_stays():
    pending = PendingConnect()
    pending.abandon()
    pending.succeed("late")
    pending.fail(WorkerConnectError("later"))
    assert pending.client is None
    pending.raise_error()


def test_each_caller_raises_an_exception_of_its_own():
    pending, cause = PendingConnect(), OSError("refused")
    error = WorkerConnectError("no", url="http://h:1")
    error.__cause__ = cause
    error.add_note("a note")
    pending.fail(error)
    raised = []
    for _ in range(3):
        with pytest.raises(WorkerConnectError, match="no") as caught:
            pending.raise_error()
        raised.append(caught.value)
    assert len({id(each) for each in [error, *raised]}) == 4
    for each in raised:
        assert type(each) is WorkerConnectError
        assert each.args == error.args
        assert each.url == "http://h:1"
        assert each.__cause__ is cause
        assert each.__notes__ == ["a note"]


def depth(error: BaseException) -> int:
    count, entry = 0, error.__traceback__
    while entry is not None:
        count, entry = count + 1, entry.tb_next
    return count


def test_raising_again_and_again_grows_no_traceback():
    pending = PendingConnect()
    pending.fail(WorkerConnectError("no"))
    depths = []
    for _ in range(10):
        with pytest.raises(WorkerConnectError) as caught:
            pending.raise_error()
        depths.append(depth(caught.value))
    assert len(set(depths)) == 1


def test_the_shared_error_keeps_no_frame_alive():
    pending = PendingConnect()
    with pytest.raises(WorkerConnectError) as caught:
        raise WorkerConnectError("no")
    pending.fail(caught.value)
    assert caught.value.__traceback__ is not None, "the connecting thread's own was cut"
    assert pending._outcomes[0][1].__traceback__ is None


class OddError(WorkerConnectError):
    def __init__(self, *, host: str, code: int) -> None:
        super().__init__(f"{host} said {code}", url=host)
        self.code = code


def test_an_error_with_a_constructor_of_its_own_is_copied():
    pending = PendingConnect()
    pending.fail(OddError(host="http://h:1", code=7))
    with pytest.raises(OddError, match="said 7") as caught:
        pending.raise_error()
    assert caught.value.code == 7
    assert caught.value.url == "http://h:1"


def test_waiters_wake_even_if_who_wakes_them_is_interrupted():
    class Interrupting(list):
        def pop(self, *args):
            super().pop(*args)  # this waiter's latch is lost
            raise KeyboardInterrupt

    pending = PendingConnect()
    pending._waiters = Interrupting()
    waiters = waiting(pending, 3)
    with pytest.raises(KeyboardInterrupt):
        pending.succeed("client")
    assert all(waiter.result() for waiter in waiters)


def test_outcomes_and_waiters_meet_in_any_order():
    def meet(pending):
        works = [lambda: pending.wait(20)] * 3 + [lambda: pending.succeed("client")]
        return run_concurrently(works)[:3]

    for _ in range(200):
        assert meet(PendingConnect()) == [True] * 3
