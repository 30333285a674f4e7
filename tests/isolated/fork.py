"""Forks with a cached client and plays the child's part. Usage: fork.py IMPLEMENTATION CASE.

No network: clients are plain objects whose end writes one byte to a pipe. The parent
prints what the child reported and how it ended.
"""

# ruff: noqa: T201 -- a script reports to whoever runs it

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from resolver import ForkedProcessError, _background
from resolver.testing import FakeConnector
from tests.support.implementations import resolver_type
from tests.support.threads import elsewhere, wait_until

DEADLINE = 20.0
URL = "http://10.0.0.7:50051"
SPELLING = "grpc://10.0.0.7:50051/"

end_reader, end_writer = os.pipe()
report_reader, report_writer = os.pipe()


class Client:
    """Tells the pipe of its end, in whichever process that happens."""

    def __del__(self):
        os.write(end_writer, b"!")


class Connector:
    def connect(self, url):
        client = Client()
        client.url = url
        return client


def report(text):
    os.write(report_writer, text.encode() + b"\n")


def refused(work):
    started = time.monotonic()
    try:
        work()
    except ForkedProcessError as error:
        message = str(error)
    else:
        return False
    assert time.monotonic() - started < 1.0, "the contract: within a second"
    return "spawn" in message and "forkserver" in message


def use_in_child(resolver):
    """Every use is refused at once; looking is harmless."""
    for work in (
        lambda: resolver.get_flight_client_for_url(URL),
        lambda: resolver.get_flight_client_for_url(SPELLING),
        lambda: resolver.get_flight_client_for_url("http://10.0.0.9:1"),
        lambda: resolver.get_flight_client_for_url("nonsense"),
        lambda: resolver.invalidate(URL),
        lambda: resolver.prefetch([URL]),
        lambda: URL in resolver,
        lambda: len(resolver),
        resolver.clear,
        resolver.stats,
        resolver.urls,
        resolver.__enter__,
    ):
        assert refused(work)
    assert "inherited through a fork" in repr(resolver)
    assert bool(resolver)
    resolver.close()
    resolver.close()
    report("refused")


def in_a_cycle(resolver):
    """Garbage that the child's collector could find, unless the cache hides it."""
    client = resolver.get_flight_client_for_url(URL)
    client.resolver = resolver


def held_by_the_disposer(resolver):
    """A client that the parent dropped and still uses when it forks."""
    held.append(resolver.get_flight_client_for_url("http://10.0.0.8:1"))
    resolver.invalidate("http://10.0.0.8:1")
    wait_until(_background._disposer._arrivals.empty)


def queued_for_the_disposer(resolver):
    """A client that the parent dropped, which the disposer has not even seen."""

    class Blocking:
        def __del__(self):
            entered.set()
            go_on.wait(DEADLINE)

    entered = threading.Event()
    _background.discard([elsewhere(Blocking)])
    assert entered.wait(DEADLINE)
    resolver.get_flight_client_for_url("http://10.0.0.8:1")
    resolver.invalidate("http://10.0.0.8:1")


held = []
go_on = threading.Event()


def main(implementation, case):
    kind = resolver_type(implementation)
    resolver = kind(FakeConnector() if case == "unused" else Connector(), idle_timeout=5.0)
    child_body = None
    if case == "unused":

        def child_body():
            assert URL not in resolver
            client = resolver.get_flight_client_for_url(SPELLING)
            assert resolver.get_flight_client_for_url(URL) is client
            assert resolver.stats().connects == 1
            names = {thread.name for thread in threading.enumerate()}
            assert "resolver-reaper" in names
            resolver.close()
            report("adopted")
    else:
        resolver.get_flight_client_for_url(URL)
        resolver.get_flight_client_for_url(SPELLING)
    if case == "use":

        def child_body():
            use_in_child(resolver)
    elif case == "drop":

        def child_body():
            nonlocal resolver
            resolver = None
            gc.collect()
            report("dropped")
    elif case == "cycle":
        in_a_cycle(resolver)

        def child_body():
            nonlocal resolver
            resolver = None
            for _ in range(3):
                gc.collect()
            report("collected")
    elif case == "disposer":
        held_by_the_disposer(resolver)

        def child_body():
            held.clear()
            gc.collect()
            fresh = kind(FakeConnector())
            fresh.get_flight_client_for_url(URL)
            fresh.invalidate(URL)
            fresh.connector.wait_disposed(1)
            report("disposed of its own")
    elif case == "queued":
        queued_for_the_disposer(resolver)

        def child_body():
            gc.collect()
            report("kept")
    elif case == "new":

        def child_body():
            fresh = kind(FakeConnector(), idle_timeout=0.05)
            fresh.get_flight_client_for_url(URL)
            fresh.connector.wait_disposed(1)  # the child has a reaper and a disposer
            report("works")
    elif case == "locked":
        # A thread of the parent is inside connect, and others wait, while it forks.
        gate = (connector := FakeConnector()).block()
        busy = kind(connector)
        for _ in range(3):
            threading.Thread(
                target=busy.get_flight_client_for_url, args=(URL,), daemon=True
            ).start()
        gate.wait_entered()
        wait_until(lambda: busy.stats().waits == 2)

        def child_body():
            assert refused(lambda: busy.get_flight_client_for_url(URL))
            assert refused(lambda: busy.get_flight_client_for_url("http://10.0.0.9:1"))
            report("refused")

    # That a process with threads forks is what this is about.
    warnings.simplefilter("ignore", DeprecationWarning)
    child = os.fork()
    if child == 0:
        child_body()
        sys.exit(0)  # through the whole of the interpreter's shutdown
    os.close(report_writer)
    status = wait_for(child)
    with os.fdopen(report_reader) as reports:
        print("child:", reports.read().strip())
    print("status:", os.waitstatus_to_exitcode(status))
    os.set_blocking(end_reader, False)
    with contextlib.suppress(BlockingIOError):
        print("ended in the child:", len(os.read(end_reader, 100)))
    if case == "locked":
        gate.release()
    go_on.set()
    if resolver is not None and case not in ("unused", "locked"):
        assert resolver.get_flight_client_for_url(URL).url == URL, "the parent's still works"


def wait_for(child):
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    sys.exit("the child hangs")


if __name__ == "__main__":
    main(*sys.argv[1:])
