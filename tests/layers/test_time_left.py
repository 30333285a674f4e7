"""A layer that waits, and a call that is made once more, leave the caller its deadline."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc
import pytest

from resolver.layers import _aio, _blocking, _call


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (_aio, _blocking, _call):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Slow:
    """Waits two seconds for its token, and one more for another."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seen: list[float | None] = []

    def begin(self, call):
        self.seen.append(call.timeout)
        self._clock.now += 2.0

    async def begin_async(self, call):
        self.begin(call)

    def refused(self, call):
        self._clock.now += 1.0
        return True

    async def refused_async(self, call):
        return self.refused(call)


def details(timeout):
    return _blocking._Details("/a/B", timeout, None, None, None, None)


class Refused:
    """A call that took four seconds to be refused."""

    def done(self):
        return True

    def code(self):
        return grpc.StatusCode.UNAUTHENTICATED


class RefusedLater(Refused):
    async def code(self):
        return grpc.StatusCode.UNAUTHENTICATED

    async def read(self):
        raise grpc.RpcError


@pytest.mark.parametrize(
    ("timeout", "given", "sent"),
    [(20.0, [20.0, 13.0], [18.0, 11.0]), (6.0, [6.0, 0.0], [4.0, 0.0]), (None, [None] * 2, None)],
)
def test_of_a_call_that_is_made_once_more_the_timeout_goes_on(clock, timeout, given, sent):
    layer, timeouts = Slow(clock), []

    def continuation(changed, request):
        timeouts.append(changed.timeout)
        clock.now += 4.0
        return Refused()

    _blocking._Retrying(layer).intercept_unary_unary(continuation, details(timeout), None)
    assert layer.seen == given
    assert timeouts == (sent or [None, None])


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_so_it_does_in_asyncio(clock, kind):
    layer, timeouts = Slow(clock), []

    async def continuation(changed, request):
        timeouts.append(changed.timeout)
        clock.now += 4.0
        return RefusedLater()

    async def call():
        if kind == "unary":
            interceptor = _aio._RetryingUnaryUnary(layer)
            await interceptor.intercept_unary_unary(continuation, details(20.0), None)
        else:
            interceptor = _aio._RetryingUnaryStream(layer)
            await interceptor.intercept_unary_stream(continuation, details(20.0), None)

    asyncio.run(call())
    assert layer.seen == [20.0, 13.0]
    assert timeouts == [18.0, 11.0]


def test_a_layer_that_waits_for_a_slot_waits_within_the_timeout(clock):
    sent = []

    def continuation(changed, request):
        sent.append(changed.timeout)
        return SimpleNamespace()

    _blocking._Interceptor(Slow(clock)).intercept_unary_unary(continuation, details(5.0), None)
    assert sent == [3.0]
