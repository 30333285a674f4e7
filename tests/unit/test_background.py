"""The disposer and the reaper: who lets go, on which thread, and what cannot stop them."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest

from resolver import DefaultChannelResolver, _background
from resolver._background import Disposer, Reaper
from resolver.testing import FakeConnector
from tests.support.threads import elsewhere, run_concurrently, wait_until

URL = "http://10.0.0.7:50051"


class Client:
    """Notes the thread on which it ends; may raise there, and be in a cycle."""

    def __init__(self, ended, error=None):
        self.ended = ended
        self.error = error

    def __del__(self):
        self.ended.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error


def clients(count, *arguments):
    """Some clients whose end will be on the thread that lets go of them last."""
    return elsewhere(lambda: [Client(*arguments) for _ in range(count)])


class OwnDisposer(Disposer):
    """One that a test starts for itself."""

    name = "disposer-of-a-test"


class OwnReaper(Reaper):
    """One that a test starts for itself."""

    name = "reaper-of-a-test"


def threads_named(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


# -- disposer --------------------------------------------------------------------------------


def test_a_dropped_client_ends_on_the_disposer_thread():
    ended = []
    _background.discard(clients(2, ended))
    wait_until(lambda: len(ended) == 2)
    assert set(ended) == {"resolver-disposer"}


def test_a_held_client_does_not_end_before_its_last_holder_lets_go():
    ended, bystanders = [], []
    (held,) = clients(1, ended)
    holders = [held, {"again": held}]
    _background.discard([held])
    _background.discard(clients(1, bystanders))
    wait_until(lambda: bystanders)  # the disposer has looked at both since
    assert ended == []
    del held
    holders.pop()
    _background.discard(clients(1, bystanders))
    wait_until(lambda: len(bystanders) == 2)
    assert ended == []
    holders.clear()
    wait_until(lambda: ended)
    assert ended == ["resolver-disposer"]


def test_the_disposer_lets_go_though_clients_never_stop_arriving():
    class Endless:
        """A queue that is never empty, until one client has ended."""

        def put(self, client):
            pass

        def get(self, timeout=None):
            if ended:
                threading.Event().wait()  # the thread is a daemon and has done its part
            pause.wait(0.001)
            return Client(ended)

    ended, pause = [], threading.Event()
    disposer = OwnDisposer()
    disposer._arrivals = Endless()
    disposer.discard([None])
    wait_until(lambda: ended)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(1), KeyboardInterrupt()])
def test_what_a_finalizer_raises_does_not_stop_the_disposer(error):
    ended = []
    _background.discard(clients(1, ended, error))
    wait_until(lambda: ended)
    _background.discard(clients(1, ended))
    wait_until(lambda: len(ended) == 2)
    assert set(ended) == {"resolver-disposer"}


def test_a_finalizer_may_discard_another_client():
    class Chained(Client):
        def __del__(self):
            super().__del__()
            _background.discard([Client(self.ended)])

    ended = []
    _background.discard([Chained(ended)])
    wait_until(lambda: len(ended) == 2)


def test_a_client_in_a_cycle_is_let_go_in_the_end(monkeypatch):
    monkeypatch.setattr(_background, "_PATIENCE", 0.0)
    ended = []
    client = Client(ended)
    client.me = client
    reference = weakref.ref(client)
    _background.discard([client])
    del client

    def collected():
        gc.collect()
        return reference() is None

    wait_until(collected)


def test_a_held_client_in_no_cycle_is_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(_background, "_PATIENCE", 0.0)
    client, ended = bytearray(b"no container"), []
    assert not gc.is_tracked(client)
    before = sys.getrefcount(client)
    disposer = OwnDisposer()
    disposer.discard([client])
    for count in range(1, 3):
        disposer.discard([Client(ended)])
        wait_until(lambda count=count: len(ended) == count)
    assert sys.getrefcount(client) > before


def test_all_clients_of_a_burst_end():
    ended = []
    _background.discard([Client(ended) for _ in range(2000)])
    wait_until(lambda: len(ended) == 2000)


def test_many_threads_start_one_disposer():
    disposer, ended = OwnDisposer(), []
    before = len(threads_named(OwnDisposer.name))
    run_concurrently([lambda: disposer.discard([Client(ended)])] * 16)
    wait_until(lambda: len(ended) == 16)
    assert set(ended) == {OwnDisposer.name}
    assert len(threads_named(OwnDisposer.name)) - before == 1


def test_a_thread_that_cannot_start_is_tried_again(monkeypatch):
    disposer, ended = OwnDisposer(), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _refuse)
        disposer.discard([Client(ended)])
    assert ended == []
    disposer.discard([Client(ended)])
    wait_until(lambda: len(ended) == 2)


def _refuse(_thread):
    raise RuntimeError("can't start new thread")


def test_no_thread_is_started_in_an_interpreter_that_shuts_down(monkeypatch):
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    monkeypatch.setattr(threading.Thread, "start", pytest.fail)
    OwnDisposer().discard([object()])


def test_threads_of_the_package_are_daemons():
    _background.discard([object()])
    with DefaultChannelResolver(FakeConnector()) as resolver:
        resolver.get_flight_client_for_url(URL)
        for name in ("resolver-disposer", "resolver-reaper"):
            assert [thread.daemon for thread in threads_named(name)] == [True]


# -- reaper ----------------------------------------------------------------------------------


def test_idle_clients_go_though_nobody_calls():
    connector = FakeConnector()
    with DefaultChannelResolver(connector, idle_timeout=0.05) as resolver:
        elsewhere(lambda: resolver.get_flight_client_for_url(URL))
        connector.wait_disposed(1)
        assert resolver.stats().evicted_idle == 1
        assert resolver.stats().clients == 0
        disposers = {thread.ident for thread in threads_named("resolver-disposer")}
        assert connector.disposal_threads == disposers


def test_remembered_failures_go_though_nobody_calls():
    class Counting(DefaultChannelResolver):
        rounds = 0

        def _expire(self, stripe_index):
            self.rounds += stripe_index == self._stripe_count - 1
            return super()._expire(stripe_index)

    connector = FakeConnector()
    connector.fail(OSError("no"))
    for seconds_later, remembered in ((0, 1), (200, 0)):
        resolver = Counting(connector, idle_timeout=0.1, failure_ttl=100.0)
        with pytest.raises(ConnectionError):
            resolver.get_flight_client_for_url(URL)
        resolver._advance_clock(seconds_later)
        before = resolver.rounds
        wait_until(lambda r=resolver, n=before: r.rounds >= n + 2)
        assert len(resolver._clear()) == remembered


def test_the_reaper_holds_resolvers_weakly(no_gc):
    connector = FakeConnector()
    resolver = DefaultChannelResolver(connector, idle_timeout=1000.0)
    resolver.get_flight_client_for_url(URL)
    reference = weakref.ref(resolver)
    del resolver
    wait_until(lambda: reference() is None)
    connector.wait_disposed(1)


def test_one_reaper_serves_all_resolvers():
    resolvers = [DefaultChannelResolver(FakeConnector(), idle_timeout=0.05) for _ in range(20)]
    run_concurrently([lambda r=r: r.get_flight_client_for_url(URL) for r in resolvers])
    wait_until(lambda: all(resolver.stats().evicted_idle == 1 for resolver in resolvers))
    assert len(threads_named("resolver-reaper")) == 1


def test_a_resolver_that_never_connected_is_not_watched(monkeypatch):
    monkeypatch.setattr(_background, "watch", pytest.fail)
    resolver = DefaultChannelResolver(FakeConnector())
    assert URL not in resolver
    resolver.close()


def test_without_a_timeout_nobody_is_watched(monkeypatch):
    monkeypatch.setattr(_background, "watch", pytest.fail)
    with DefaultChannelResolver(FakeConnector(), idle_timeout=None) as resolver:
        resolver.get_flight_client_for_url(URL)


def test_a_resolver_that_fails_to_expire_does_not_stop_the_reaper(caplog):
    class Broken:
        _stripe_count = 1
        rounds = 0

        def _expire(self, stripe_index):
            self.rounds += 1
            raise OSError("broken")

    class Sound:
        _stripe_count = 3

        def __init__(self):
            self.seen = []

        def _expire(self, stripe_index):
            self.seen.append(stripe_index)
            return 0

    reaper, broken, sound = OwnReaper(), Broken(), Sound()
    reaper.watch(broken, 0.01)
    reaper.watch(sound, 0.01)
    wait_until(lambda: broken.rounds >= 2 and len(sound.seen) >= 6)
    assert sound.seen[:3] == [0, 1, 2]
    assert "expiring idle clients failed" in caplog.text
