"""What is done with a client that could not reach its worker."""

from __future__ import annotations

import pyarrow as pa
import pytest
from pyarrow import flight

from resolver import WorkerConnectError
from resolver.distributed import _reach
from resolver.distributed._reach import reach

URL = "http://127.0.0.1:5005"
REFUSED = flight.FlightUnavailableError(
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:5005: "
    "Failed to connect to remote host: Connection refused"
)


class Resolver:
    """Gives out "client 1", "client 2", …; a new one after each ``invalidate``."""

    def __init__(self) -> None:
        self.number = 1

    def get_flight_client_for_url(self, url):
        assert url == URL
        return f"client {self.number}"

    def invalidate(self, url, client):
        assert client == self.get_flight_client_for_url(url)
        self.number += 1


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(_reach, "_HANDOVER", 0.0)


def failing_with(*errors):
    """A call that fails with each of these in turn, then says whose it was; and its clients."""
    left, clients = list(errors), []

    def call(client):
        clients.append(client)
        if left:
            raise left.pop(0)
        return f"by {client}"

    return call, clients


def test_a_refused_connection_is_tried_once_more_with_a_new_client():
    call, clients = failing_with(REFUSED)
    assert reach(Resolver(), URL, call) == "by client 2"
    assert clients == ["client 1", "client 2"]


def test_and_only_once():
    call, clients = failing_with(REFUSED, REFUSED)
    with pytest.raises(flight.FlightUnavailableError):
        reach(Resolver(), URL, call)
    assert len(clients) == 2


def test_a_worker_that_cannot_be_connected_to_any_more_is_told_as_such():
    resolver = Resolver()
    call, _ = failing_with(REFUSED)
    given = resolver.get_flight_client_for_url

    def get(url):
        if resolver.number > 1:
            raise WorkerConnectError("refused", url=url)
        return given(url)

    resolver.get_flight_client_for_url = get
    resolver.invalidate = lambda url, client: setattr(resolver, "number", 2)
    with pytest.raises(WorkerConnectError):
        reach(resolver, URL, call)


@pytest.mark.parametrize(
    "error",
    [
        flight.FlightUnavailableError("Socket closed"),  # in mid-call: it may have arrived
        flight.FlightTimedOutError("Deadline Exceeded"),
        flight.FlightCancelledError("cancelled"),
        EOFError("answered with 0 results"),
    ],
)
def test_what_may_have_arrived_is_not_sent_again(error):
    resolver = Resolver()
    call, clients = failing_with(error)
    with pytest.raises(type(error)):
        reach(resolver, URL, call)
    assert clients == ["client 1"]
    assert resolver.number == 2  # dropped


@pytest.mark.parametrize(
    "error",
    [
        flight.FlightServerError("division by zero"),
        flight.FlightUnauthenticatedError("a valid bearer token is required"),
        flight.FlightUnavailableError("it takes no more tasks", b'{"refused": true}'),
        pa.ArrowKeyError("this worker does not hold that output"),
        pa.ArrowInvalid("truncated"),
    ],
)
def test_a_worker_that_answers_keeps_its_client(error):
    resolver = Resolver()
    call, clients = failing_with(error)
    with pytest.raises(type(error)):
        reach(resolver, URL, call)
    assert (clients, resolver.number) == (["client 1"], 1)


def test_after_the_query_nothing_is_dropped():
    resolver = Resolver()
    call, _ = failing_with(flight.FlightCancelledError("over"))
    with pytest.raises(flight.FlightCancelledError):
        reach(resolver, URL, call, may_drop=lambda: False)
    assert resolver.number == 1


def test_a_resolver_of_somebody_else_need_not_know_of_dropping():
    class Plain:
        def get_flight_client_for_url(self, url):
            return "the client"

    call, _ = failing_with(REFUSED)
    assert reach(Plain(), URL, call) == "by the client"
