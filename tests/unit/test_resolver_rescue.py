"""Nothing that is interrupted, overstays or dies makes a URL or a daemon useless for good."""

from __future__ import annotations

import threading
import time

import pytest

from resolver import DefaultChannelResolver, WorkerConnectTimeoutError, _background
from resolver._background import Disposer
from resolver._single_flight import PendingConnect
from resolver.testing import FakeConnector
from tests.support.threads import Background, elsewhere, wait_until

URL = "http://10.0.0.7:50051"


def test_a_url_whose_connect_ended_in_two_interrupts_is_usable_again():
    """What the first of the two left behind: a connect that nobody is making."""
    resolver = DefaultChannelResolver(FakeConnector(connect_timeout=0.05))
    resolver._begin(URL, 0, PendingConnect())
    with pytest.raises(WorkerConnectTimeoutError):
        resolver.get_flight_client_for_url(URL)
    assert resolver.get_flight_client_for_url(URL) is resolver.get_flight_client_for_url(URL)
    resolver._validate()


def test_a_connector_that_overstays_its_deadline_holds_up_each_url_only_once():
    connector = FakeConnector(connect_timeout=20.0)
    resolver = DefaultChannelResolver(connector)
    with connector.block(URL) as gate:
        hanging = Background(lambda: resolver.get_flight_client_for_url(URL))
        gate.wait_entered()
        connector.connect_timeout = 0.05
        with pytest.raises(WorkerConnectTimeoutError):
            resolver.get_flight_client_for_url(URL)
        connector.connect_timeout = 20.0
        second = Background(lambda: resolver.get_flight_client_for_url(URL))
        gate.wait_entered(2)
    assert hanging.result() is not second.result()
    assert resolver.get_flight_client_for_url(URL) is second.result()
    resolver._validate()


def test_who_takes_over_a_connect_keeps_to_the_deadline_it_came_with():
    class Interrupted(FakeConnector):
        """Interrupted late in its first connect, then hanging."""

        def connect(self, url):
            entered.set()
            if self.calls(url) == 0:
                late.wait(20)
                self.fail(KeyboardInterrupt(), times=1)
                return super().connect(url)
            over.wait(20)
            return super().connect(url)

    entered, late, over = threading.Event(), threading.Event(), threading.Event()
    connector = Interrupted(connect_timeout=1.0)
    resolver = DefaultChannelResolver(connector)
    first = Background(lambda: resolver.get_flight_client_for_url(URL))
    entered.wait(20)
    came = time.monotonic()
    second = Background(lambda: resolver.get_flight_client_for_url(URL))
    wait_until(lambda: time.monotonic() > came + 0.7)
    late.set()
    with pytest.raises(WorkerConnectTimeoutError):
        second.result()
    waited = time.monotonic() - came
    over.set()
    with pytest.raises(KeyboardInterrupt):
        first.result()
    assert waited < 1.0 + 0.5, "the deadline that every caller is promised, and its tolerance"


def test_who_takes_over_a_connect_gets_its_client():
    class Interrupted(FakeConnector):
        def connect(self, url):
            entered.set()
            go.wait(20)
            return super().connect(url)

    entered, go = threading.Event(), threading.Event()
    connector = Interrupted(connect_timeout=20.0)
    connector.fail(KeyboardInterrupt(), times=1)
    resolver = DefaultChannelResolver(connector)
    first = Background(lambda: resolver.get_flight_client_for_url(URL))
    entered.wait(20)
    second = Background(lambda: resolver.get_flight_client_for_url(URL))
    wait_until(lambda: resolver.stats().waits == 1)
    go.set()
    with pytest.raises(KeyboardInterrupt):
        first.result()
    assert second.result() is resolver.get_flight_client_for_url(URL)
    resolver._validate()


def test_a_daemon_that_was_interrupted_while_it_started_starts_later(monkeypatch):
    started = []

    class Thread(threading.Thread):
        def start(self):
            started.append(self)
            if len(started) == 1:
                raise KeyboardInterrupt
            super().start()

    ended = threading.Event()
    disposer = OwnDisposer()
    monkeypatch.setattr(_background.threading, "Thread", Thread)
    with pytest.raises(KeyboardInterrupt):
        disposer.discard([])
    monkeypatch.undo()
    disposer.discard([elsewhere(lambda: Ending(ended))])
    wait_until(ended.is_set)


def test_a_daemon_goes_on_after_an_error(caplog):
    class FailingOnce(OwnDisposer):
        errors = [MemoryError()]

        def _work(self):
            if self.errors:
                raise self.errors.pop()
            super()._work()

    ended = threading.Event()
    FailingOnce().discard([Ending(ended)])
    wait_until(ended.is_set)
    assert OwnDisposer.name in caplog.text


class OwnDisposer(Disposer):
    name = "disposer-of-the-rescue-tests"


class Ending:
    def __init__(self, ended):
        self.ended = ended

    def __del__(self):
        self.ended.set()


def test_invalidating_nobodys_client_evicts_nobodys_replacement():
    resolver = DefaultChannelResolver(FakeConnector())
    client = resolver.get_flight_client_for_url(URL)
    assert resolver.invalidate(URL, None) is False
    assert resolver.invalidate(URL, client=None) is False
    assert resolver.get_flight_client_for_url(URL) is client
    assert resolver.invalidate(URL) is True


@pytest.mark.parametrize("urls", [URL, URL.encode()])
def test_prefetch_of_one_url_is_not_of_its_letters(urls):
    with pytest.raises(TypeError, match="several URLs"):
        DefaultChannelResolver(FakeConnector()).prefetch(urls)


@pytest.mark.parametrize("timeout", ["5", float("nan"), 0, -1.0, True, float("inf")])
def test_a_connector_with_a_senseless_deadline_is_refused(timeout):
    connector = FakeConnector()
    connector.connect_timeout = timeout
    with pytest.raises((TypeError, ValueError), match="connect_timeout"):
        DefaultChannelResolver(connector)


def test_a_connectors_class_is_no_connector():
    with pytest.raises(TypeError, match="not the class"):
        DefaultChannelResolver(FakeConnector)


@pytest.mark.parametrize("option", ["idle_timeout", "failure_ttl"])
@pytest.mark.parametrize("seconds", [10**400, -(10**400), 1.1e9, float("inf")])
def test_a_senseless_number_of_seconds_is_refused(option, seconds):
    with pytest.raises(ValueError, match=option):
        DefaultChannelResolver(FakeConnector(), **{option: seconds})
    DefaultChannelResolver(FakeConnector(), **{option: 1e9}).get_flight_client_for_url(URL)


def test_one_url_has_to_fit():
    with pytest.raises(ValueError, match="max_clients"):
        DefaultChannelResolver(FakeConnector(), max_clients=2, connections_per_url=4)
