"""Single flight: however many threads ask, one connects."""

from __future__ import annotations

import threading

import pytest

from resolver import WorkerConnectError
from resolver.testing import FakeConnector
from tests.support.threads import Background, run_concurrently, wait_until

URL = "http://10.0.0.7:50051"


def stampede(resolver, gate, count, url=URL):
    """Results or errors of `count` threads that all ask before the connect ends."""

    def ask():
        try:
            return resolver.get_flight_client_for_url(url)
        except WorkerConnectError as error:
            return error

    def release_when_all_wait():
        wait_until(lambda: resolver.stats().waits == count - 1)
        gate.release()

    return run_concurrently([ask] * count + [release_when_all_wait])[:count]


def test_256_threads_on_one_cold_url_connect_once(resolver_type):
    connector = FakeConnector(connect_timeout=30.0)
    with resolver_type(connector) as resolver:
        clients = stampede(resolver, connector.block(URL), 256)
        assert len({id(client) for client in clients}) == 1
        assert connector.calls(URL) == 1
        stats = resolver.stats()
        assert (stats.misses, stats.waits, stats.connects, stats.hits) == (1, 255, 1, 0)
        resolver._validate()


def test_a_stampede_on_a_dead_worker_fails_once_for_all(resolver_type):
    connector = FakeConnector(connect_timeout=30.0)
    connector.fail(OSError("refused"))
    with resolver_type(connector) as resolver:
        errors = stampede(resolver, connector.block(URL), 64)
        assert all(type(error) is WorkerConnectError for error in errors)
        assert len({id(error) for error in errors}) == 64
        assert connector.calls(URL) == 1
        assert resolver.stats().connect_failures == 1
        resolver._validate()


def test_each_of_many_cold_urls_is_connected_once(resolver_type):
    connector = FakeConnector()
    urls = [f"http://10.0.3.{n}:50051" for n in range(50)]
    with resolver_type(connector) as resolver:

        def ask(shift):
            order = urls[shift:] + urls[:shift]
            return {url: id(resolver.get_flight_client_for_url(url)) for url in order}

        seen = run_concurrently([lambda n=n: ask(n * 6) for n in range(8)])
        assert all(each == seen[0] for each in seen)
        assert connector.calls() == 50
        assert len(resolver) == 50
        stats = resolver.stats()
        assert stats.misses == 50
        assert stats.hits + stats.misses + stats.waits == 400
        resolver._validate()


def test_an_interrupted_connect_in_a_stampede_is_taken_over_once(resolver_type):
    connector = FakeConnector(connect_timeout=30.0)
    connector.fail(KeyboardInterrupt(), times=1)
    with resolver_type(connector) as resolver:

        def ask():
            try:
                return resolver.get_flight_client_for_url(URL)
            except KeyboardInterrupt:
                return None

        clients = run_concurrently([ask] * 16)
        assert clients.count(None) == 1
        assert len({id(client) for client in clients if client is not None}) == 1
        assert connector.calls(URL) == 2
        resolver._validate()


def test_blocked_connects_of_many_urls_block_no_other(resolver_type):
    connector = FakeConnector(connect_timeout=30.0)
    blocked = [f"http://10.0.4.{n}:50051" for n in range(32)]
    gates = [connector.block(url) for url in blocked]
    with resolver_type(connector) as resolver:
        stuck = [
            Background(lambda url=url: resolver.get_flight_client_for_url(url)) for url in blocked
        ]
        for gate in gates:
            gate.wait_entered()
        urls = [f"http://10.0.5.{n}:50051" for n in range(100)]
        run_concurrently([lambda: [resolver.get_flight_client_for_url(u) for u in urls]] * 4)
        assert connector.calls() == 132
        assert not any(each.ended for each in stuck)
        for gate in gates:
            gate.release()
        assert len({id(each.result()) for each in stuck}) == 32
        resolver._validate()


@pytest.mark.parametrize("lanes", [2, 3])
def test_a_stampede_connects_once_per_lane(resolver_type, lanes):
    connector = FakeConnector(connect_timeout=30.0)
    with resolver_type(connector, connections_per_url=lanes) as resolver:
        ready = threading.Barrier(lanes * 4)

        def ask():
            ready.wait(20)  # all exist at once, so that they fill the lanes evenly
            return id(resolver.get_flight_client_for_url(URL))

        clients = run_concurrently([ask] * (lanes * 4))
        assert sorted(clients.count(client) for client in set(clients)) == [4] * lanes
        assert connector.calls(URL) == lanes
        resolver._validate()
