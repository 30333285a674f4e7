"""Forks in a process of its own, since a test runner with threads must not; prints "ok".

Run as ``fork_script.py SCENARIO URL [exit]``: SCENARIO is one of the functions below,
URL a plaintext Flight server. With ``exit`` the child ends by ``sys.exit``, finalizers
and all, else by ``os._exit``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from pyarrow import flight

from resolver import DefaultChannelResolver, FlightConnector, ForkedProcessError
from resolver.testing import FakeConnector

AT_ONCE = 1.0
"""Seconds in which a forked child must be refused: the issue's own figure."""

OTHER = "http://127.0.0.1:1"


def in_child(work: Callable[[], None], *, finalize: bool) -> None:
    """Fork, run `work` in the child, and fail unless it ends well within 10 s."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        if finalize:
            sys.exit(status)
        os._exit(status)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hung")


def refused(use: Callable[[], object]) -> None:
    started = time.monotonic()
    try:
        answer = use()
    except ForkedProcessError as error:
        elapsed, message = time.monotonic() - started, str(error)
    else:
        raise AssertionError(f"a forked child got {answer!r}")
    assert elapsed < AT_ONCE
    assert "spawn" in message
    assert "forkserver" in message


def live_connection(url: str, finalize: bool) -> None:
    """Every use in the child is refused, and the parent's stream and client go on."""
    resolver = DefaultChannelResolver()
    client = resolver.get_flight_client_for_url(url)
    reader = client.do_get(flight.Ticket(b"500"))
    rows = reader.read_chunk().data.num_rows

    # A stream that the caller holds is the caller's own to leave alone in a child.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(reader))

    def child() -> None:
        refused(lambda: resolver.get_flight_client_for_url(url))
        refused(lambda: resolver.get_flight_client_for_url(OTHER))
        refused(lambda: resolver.prefetch([url]))
        refused(lambda: resolver.invalidate(url, client))
        refused(lambda: FlightConnector().connect(url))
        refused(lambda: DefaultChannelResolver().get_flight_client_for_url(url))
        resolver.close()  # must leave the parent's clients alone

    in_child(child, finalize=finalize)
    assert resolver.get_flight_client_for_url(url) is client
    rows += sum(chunk.data.num_rows for chunk in reader)
    assert rows == 500 * 1_024
    (connections,) = client.do_action("connections")
    assert connections.body.to_pybytes() == b"1", "nothing was closed and opened again"


def constructed_only(url: str, finalize: bool) -> None:
    """A connect that failed has started gRPC's threads just as well."""
    with contextlib.suppress(ConnectionError):
        FlightConnector(connect_timeout=1).connect(OTHER)
    in_child(lambda: refused(lambda: FlightConnector().connect(url)), finalize=finalize)


def grandchild(url: str, finalize: bool) -> None:
    """The refusal is inherited."""
    FlightConnector().connect(url)

    def child() -> None:
        in_child(lambda: refused(lambda: FlightConnector().connect(url)), finalize=finalize)

    in_child(child, finalize=finalize)


def nothing_constructed(url: str, finalize: bool) -> None:
    """Importing and configuring starts nothing, so a child may connect; so may the parent."""
    resolver = DefaultChannelResolver()

    def child() -> None:
        assert resolver.get_flight_client_for_url(url).list_actions()

    in_child(child, finalize=finalize)
    assert resolver.get_flight_client_for_url(url).list_actions()


def connector_without_grpc(url: str, finalize: bool) -> None:
    """Clients that are not the parent's are none of the child's business either."""
    resolver = DefaultChannelResolver(FakeConnector())
    fake = resolver.get_flight_client_for_url(url)
    in_child(lambda: refused(lambda: resolver.get_flight_client_for_url(url)), finalize=finalize)
    assert resolver.get_flight_client_for_url(url) is fake


if __name__ == "__main__":
    scenario: Callable[[str, bool], None] = globals()[sys.argv[1]]
    parent = os.getpid()
    scenario(sys.argv[2], sys.argv[3:] == ["exit"])
    if os.getpid() == parent:
        sys.stdout.write("ok\n")
