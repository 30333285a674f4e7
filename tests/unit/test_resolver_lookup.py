"""The default resolver with a fake connector: hits, misses, errors, what a URL may be."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import weakref

import pytest
import yarl
from pyarrow import flight

from resolver import (
    ChannelResolver,
    DefaultChannelResolver,
    FlightConnector,
    InvalidWorkerUrlError,
    ResolverClosedError,
    ResolverError,
    WorkerConnectError,
    WorkerConnectTimeoutError,
    _backend,
)
from resolver.testing import FakeConnector
from tests.support.threads import Background, run_concurrently, wait_until
from tests.support.urls import in_one_stripe

URL = "http://10.0.0.7:50051"
OTHER = "http://10.0.0.8:50051"

compiled = pytest.mark.skipif(
    _backend.IMPLEMENTATION != "compiled", reason="is about the compiled hit path"
)


@pytest.fixture
def connector():
    return FakeConnector()


@pytest.fixture
def resolver(connector):
    with DefaultChannelResolver(connector) as resolver:
        yield resolver
        resolver._validate()


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("idle_timeout", 0, ValueError),
        ("idle_timeout", -1.0, ValueError),
        ("idle_timeout", float("nan"), ValueError),
        ("idle_timeout", float("inf"), ValueError),
        ("idle_timeout", "300", TypeError),
        ("idle_timeout", True, TypeError),
        ("failure_ttl", -0.1, ValueError),
        ("failure_ttl", float("inf"), ValueError),
        ("failure_ttl", None, TypeError),
        ("max_clients", 0, ValueError),
        ("max_clients", 2**62 + 1, ValueError),
        ("max_clients", 1.0, TypeError),
        ("max_clients", None, TypeError),
        ("connections_per_url", 0, ValueError),
        ("connections_per_url", 1025, ValueError),
        ("connections_per_url", True, TypeError),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(option, value, error):
    with pytest.raises(error, match=option):
        DefaultChannelResolver(FakeConnector(), **{option: value})


def test_options_can_be_read_back():
    connector = FakeConnector()
    resolver = DefaultChannelResolver(
        connector, idle_timeout=None, max_clients=2**62, connections_per_url=1024, failure_ttl=0
    )
    assert resolver.connector is connector
    assert resolver.idle_timeout is None
    assert resolver.max_clients == 2**62
    assert resolver.connections_per_url == 1024
    assert resolver.failure_ttl == 0


def test_defaults_are_those_documented():
    resolver = DefaultChannelResolver()
    assert resolver.connector == FlightConnector()
    assert resolver.idle_timeout == 300.0
    assert resolver.max_clients == 65_536
    assert resolver.connections_per_url == 1
    assert resolver.failure_ttl == 0.0


@pytest.mark.parametrize("thing", [object(), 7, "http://h:1", type("X", (), {"connect": 1})()])
def test_what_cannot_connect_is_no_connector(thing):
    with pytest.raises(TypeError, match="no Connector"):
        DefaultChannelResolver(thing)


def test_it_is_a_channel_resolver(resolver):
    assert isinstance(resolver, ChannelResolver)
    assert not isinstance(object(), ChannelResolver)


# -- hits and misses -------------------------------------------------------------------------


def test_one_url_is_one_connect_and_one_client(resolver, connector):
    client = resolver.get_flight_client_for_url(URL)
    assert all(resolver.get_flight_client_for_url(URL) is client for _ in range(50))
    assert connector.calls(URL) == 1
    assert resolver.get_flight_client_for_url(OTHER) is not client
    stats = resolver.stats()
    assert (stats.hits, stats.misses, stats.connects, stats.clients) == (50, 2, 2, 2)


def test_the_connector_is_given_the_canonical_url(resolver, connector):
    client = resolver.get_flight_client_for_url("GRPC+TCP://Worker.Example:50051/")
    assert client.url == "http://worker.example:50051"


def test_other_spellings_share_the_client_and_are_parsed_once(connector):
    parsed = []

    class Watching(DefaultChannelResolver):
        def _miss(self, url):
            parsed.append(url)
            return super()._miss(url)

    resolver = Watching(connector)
    spellings = [URL, "grpc://10.0.0.7:50051", "GRPC+TCP://10.0.0.7:50051/", URL + "/"]
    clients = {id(resolver.get_flight_client_for_url(url)) for url in spellings * 5}
    assert len(clients) == 1
    assert parsed == spellings
    assert connector.calls() == 1
    assert len(resolver) == 1


def test_more_spellings_than_are_remembered_still_share_the_client(resolver, connector):
    hosts = ["worker.example", "Worker.example", "wOrker.example", "WORKER.example"] * 3
    spellings = [f"{scheme}://{h}:1" for h in hosts for scheme in ("http", "grpc", "grpc+tcp")]
    assert len({id(resolver.get_flight_client_for_url(url)) for url in spellings}) == 1
    assert connector.calls() == 1


@pytest.mark.parametrize(
    "url",
    [
        yarl.URL("http://10.0.0.7:50051"),
        flight.Location("grpc+tcp://10.0.0.7:50051"),
        flight.Location.for_grpc_tcp("10.0.0.7", 50051),
        type("Text", (str,), {})("grpc://10.0.0.7:50051"),
    ],
    ids=lambda url: type(url).__name__,
)
def test_a_url_may_be_an_object(resolver, connector, url):
    client = resolver.get_flight_client_for_url(url)
    assert client.url == URL
    assert resolver.get_flight_client_for_url(url) is client
    assert resolver.get_flight_client_for_url(URL) is client
    assert url in resolver
    assert resolver.invalidate(url, client)
    assert connector.calls() == 1


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "worker",
        "http://",
        "http://user:pa55word@10.0.0.7:50051",
        "http://10.0.0.7:99999",
        "ftp://10.0.0.7:50051",
        "http://10.0.0.7:50051/path",
        b"http://10.0.0.7:50051",
        None,
        7,
        object(),
    ],
)
def test_bad_input_raises_at_once_and_leaves_nothing(resolver, connector, bad):
    for _ in range(2):
        with pytest.raises(InvalidWorkerUrlError) as caught:
            resolver.get_flight_client_for_url(bad)
    assert "pa55word" not in str(caught.value)
    with pytest.raises(InvalidWorkerUrlError):
        resolver.invalidate(bad)
    assert bad not in resolver
    assert connector.calls() == 0
    assert resolver.stats().misses == 0
    assert len(resolver) == 0


def test_a_subclass_may_override_and_call_super(connector):
    class Rerouting(DefaultChannelResolver):
        def get_flight_client_for_url(self, url):
            return super().get_flight_client_for_url(url.replace("blue", "green"))

    with Rerouting(connector) as resolver:
        client = resolver.get_flight_client_for_url("http://blue:1")
        assert client.url == "http://green:1"
        assert resolver.get_flight_client_for_url("http://green:1") is client
        assert resolver.stats().hits == 1


def test_a_wrapper_is_a_channel_resolver_too(resolver):
    class Wrapper:
        def get_flight_client_for_url(self, url):
            return resolver.get_flight_client_for_url(url)

    assert isinstance(Wrapper(), ChannelResolver)
    assert Wrapper().get_flight_client_for_url(URL) is resolver.get_flight_client_for_url(URL)


# -- the hit path ----------------------------------------------------------------------------


@compiled
def test_the_hit_is_a_method_descriptor_of_the_class_itself():
    method = DefaultChannelResolver.__dict__["get_flight_client_for_url"]
    assert type(method) is type(str.upper)
    assert method.__objclass__ is DefaultChannelResolver
    assert inspect.getdoc(method).startswith("The client for a worker URL")


@compiled
@pytest.mark.parametrize("spelling", [URL, "grpc://10.0.0.7:50051"])
def test_a_hit_runs_no_python_code(resolver, spelling):
    resolver.get_flight_client_for_url(spelling)

    def events_of_a_hit():
        events = []

        def profile(frame, event, argument):
            events.append((event, getattr(argument, "__name__", frame.f_code.co_name)))

        sys.setprofile(profile)
        try:
            resolver.get_flight_client_for_url(spelling)
        finally:
            sys.setprofile(None)
        return events

    # More than once: an object of an earlier test may end on this thread meanwhile.
    assert [
        ("c_call", "get_flight_client_for_url"),
        ("c_return", "get_flight_client_for_url"),
        ("c_call", "setprofile"),
    ] in [events_of_a_hit() for _ in range(10)]


# -- failures --------------------------------------------------------------------------------


def test_a_failure_is_wrapped_names_the_url_and_chains_its_cause(resolver, connector):
    cause = OSError("connection refused")
    connector.fail(cause)
    with pytest.raises(WorkerConnectError, match=r"http://10\.0\.0\.7:50051.*refused") as caught:
        resolver.get_flight_client_for_url("grpc://10.0.0.7:50051")
    assert not isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.__cause__ is cause
    assert caught.value.url == URL
    assert resolver.stats().connect_failures == 1
    assert URL not in resolver


def test_a_timeout_becomes_the_timeout_error(resolver, connector):
    connector.fail(TimeoutError("too slow"))
    with pytest.raises(WorkerConnectTimeoutError, match="too slow"):
        resolver.get_flight_client_for_url(URL)


def test_a_resolver_error_passes_as_it_is(resolver, connector):
    error = WorkerConnectError("no route", url=URL)
    connector.fail(error)
    with pytest.raises(WorkerConnectError) as caught:
        resolver.get_flight_client_for_url(URL)
    assert caught.value is error


def test_a_failure_is_not_cached(resolver, connector):
    connector.fail(OSError("no"), times=1)
    with pytest.raises(WorkerConnectError):
        resolver.get_flight_client_for_url(URL)
    resolver.get_flight_client_for_url(URL)
    assert connector.calls() == 2


def test_a_connector_that_returns_none_failed(connector):
    class Nothing:
        def connect(self, url):
            return None

    resolver = DefaultChannelResolver(Nothing())
    with pytest.raises(WorkerConnectError, match=r"returned None"):
        resolver.get_flight_client_for_url(URL)
    assert len(resolver) == 0


def test_a_remembered_failure_is_answered_without_a_connect(connector):
    connector.fail(OSError("no"))
    with DefaultChannelResolver(connector, failure_ttl=10.0) as resolver:
        raised = []
        for _ in range(4):
            with pytest.raises(WorkerConnectError, match="no") as caught:
                resolver.get_flight_client_for_url("grpc://10.0.0.7:50051")
            raised.append(caught.value)
        assert connector.calls() == 1
        assert len({id(each) for each in raised}) == 4
        assert len({id(each.__cause__) for each in raised}) == 1
        assert resolver.stats().waits == 3
        connector.fail(None)
        resolver._advance_clock(11)
        resolver.get_flight_client_for_url(URL)
        assert connector.calls() == 2
        resolver._validate()


def test_invalidate_forgets_a_remembered_failure(connector):
    connector.fail(OSError("no"), times=1)
    with DefaultChannelResolver(connector, failure_ttl=1000.0) as resolver:
        with pytest.raises(WorkerConnectError):
            resolver.get_flight_client_for_url(URL)
        assert not resolver.invalidate(URL)
        resolver.get_flight_client_for_url(URL)


@pytest.mark.parametrize("error", [OSError, WorkerConnectError])
def test_a_failed_connect_leaves_no_reference_cycle(no_gc, error):
    class Refused(error):
        pass

    class Refusing:
        def connect(self, url):
            raise Refused("no")

    def fail():
        resolver = DefaultChannelResolver(Refusing())
        try:
            resolver.get_flight_client_for_url(URL)
        except WorkerConnectError as error:
            return [weakref.ref(each) for each in (error, error.__cause__, resolver) if each]
        raise AssertionError("did not fail")

    for reference in fail():
        # The thread of the reaper may hold the resolver for a moment.
        wait_until(lambda reference=reference: reference() is None)


def test_a_remembered_failure_keeps_no_frame_of_its_callers(no_gc):
    class Local:
        pass

    class Refusing:
        def connect(self, url):
            try:
                raise OSError("no route")
            except OSError:
                raise TimeoutError("gave up")  # noqa: B904 -- the context is what this is about

    def call():
        local = Local()
        with pytest.raises(WorkerConnectTimeoutError):
            resolver.get_flight_client_for_url(URL)
        return weakref.ref(local)

    resolver = DefaultChannelResolver(Refusing(), failure_ttl=1000.0)
    reference = call()
    gc.collect()
    assert reference() is None
    assert len(resolver._clear()) == 1


# -- re-entry --------------------------------------------------------------------------------


def test_a_connector_that_asks_for_the_url_it_connects_fails_instead_of_hanging():
    class Recursive:
        def connect(self, url):
            return resolver.get_flight_client_for_url(url)

    resolver = DefaultChannelResolver(Recursive())
    lookup = Background(lambda: resolver.get_flight_client_for_url(URL))
    with pytest.raises(WorkerConnectError, match="its own resolver"):
        lookup.result(deadline=20)
    resolver._validate()


def test_a_connector_may_ask_for_another_url(connector):
    class ThroughGateway:
        def connect(self, url):
            if url != OTHER:
                resolver.get_flight_client_for_url(OTHER)
            return connector.connect(url)

    resolver = DefaultChannelResolver(ThroughGateway())
    resolver.get_flight_client_for_url(URL)
    assert resolver.urls() == [URL, OTHER]


def test_a_finalizer_may_use_the_resolver():
    seen = []

    def come_back(client):
        seen.append(resolver.get_flight_client_for_url(OTHER))
        resolver.invalidate(URL)

    connector = FakeConnector(on_dispose=come_back)
    resolver = DefaultChannelResolver(connector)
    resolver.get_flight_client_for_url(URL)
    resolver.invalidate(URL)
    wait_until(lambda: seen)
    assert resolver.get_flight_client_for_url(OTHER) is seen[0]


# -- what it says about itself ---------------------------------------------------------------


def test_snapshots(resolver):
    assert len(resolver) == 0
    assert resolver
    for url in ("http://b:2", "http://a:1", "grpc+unix:///tmp/x"):
        resolver.get_flight_client_for_url(url)
    assert resolver.urls() == ["grpc+unix:///tmp/x", "http://a:1", "http://b:2"]
    assert len(resolver) == 3
    assert "GRPC://A:1/" in resolver
    assert "http://c:3" not in resolver


def test_len_counts_urls_and_stats_count_clients(connector):
    with DefaultChannelResolver(connector, connections_per_url=2) as resolver:
        resolver.prefetch([URL])
        assert len(resolver) == 1
        assert resolver.stats().clients == 2


def test_stats_are_frozen_and_repr_shows_them(resolver):
    stats = resolver.stats()
    with pytest.raises(AttributeError):
        stats.hits = 1
    assert repr(stats) == (
        "ResolverStats(hits=0, misses=0, waits=0, connects=0, connect_failures=0, "
        "evicted_idle=0, evicted_capacity=0, invalidated=0, clients=0)"
    )


def test_repr_shows_the_connector_and_no_secret():
    connector = FlightConnector(headers={"authorization": "Bearer s3cret"})
    resolver = DefaultChannelResolver(connector)
    assert "FlightConnector(" in repr(resolver)
    assert "0 clients" in repr(resolver)
    assert "s3cret" not in repr(resolver)
    resolver.close()
    assert "closed" in repr(resolver)


def test_errors_are_resolver_errors_and_built_in_ones(resolver, connector):
    connector.fail(OSError("no"))
    for expected in (ResolverError, ConnectionError):
        with pytest.raises(expected):
            resolver.get_flight_client_for_url(URL)
    with pytest.raises(ValueError, match="scheme"):
        resolver.get_flight_client_for_url("nonsense")
    resolver.close()
    with pytest.raises(RuntimeError, match="closed"):
        resolver.get_flight_client_for_url(URL)
    with pytest.raises(ResolverClosedError):
        resolver.get_flight_client_for_url(URL)


def test_urls_of_one_stripe_and_probe_run_stay_apart(resolver):
    clients = {
        url: resolver.get_flight_client_for_url(url) for url in in_one_stripe(20, low_bits=3)
    }
    assert all(resolver.get_flight_client_for_url(url) is c for url, c in clients.items())
    assert all(client.url == url for url, client in clients.items())


def test_a_thread_keeps_its_connection(connector):
    with DefaultChannelResolver(connector, connections_per_url=3) as resolver:
        ready = threading.Barrier(6)

        def mine():
            ready.wait(10)
            return {id(resolver.get_flight_client_for_url(URL)) for _ in range(10)}

        seen = run_concurrently([mine] * 6)
        assert all(len(each) == 1 for each in seen)
        assert len(set.union(*seen)) == 3
        assert connector.calls(URL) == 3
        assert resolver.stats().clients == 3


def test_a_resolver_that_is_in_a_cycle_with_its_client_is_collected():
    class Connector:
        def connect(self, url):
            client = type("Client", (), {})()
            client.resolver = self.resolver
            return client

    connector = Connector()
    connector.resolver = DefaultChannelResolver(connector)
    client = connector.resolver.get_flight_client_for_url(URL)
    references = weakref.ref(client), weakref.ref(connector.resolver)
    del connector, client

    def collected():
        gc.collect()
        return all(reference() is None for reference in references)

    wait_until(collected)


def test_clients_of_a_resolver_nobody_closed_end_in_the_background(connector, no_gc):
    resolver = DefaultChannelResolver(connector)
    assert resolver.prefetch([URL, OTHER]) == {}  # on threads that are gone, see `elsewhere`
    reference = weakref.ref(resolver)
    del resolver
    wait_until(lambda: reference() is None)
    connector.wait_disposed(2)
    assert threading.get_ident() not in connector.disposal_threads
    assert len(connector.disposal_threads) == 1
