"""Forks with an asyncio resolver and plays the child's part. Usage: aio_fork.py IMPLEMENTATION CASE.

No network: clients are plain objects whose end writes one byte to a pipe. Prints "ok".
"""

# ruff: noqa: T201 -- a script reports to whoever runs it

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from resolver import ForkedProcessError
from resolver.aio._fetch import Fetch
from tests.support.aio import aio_resolver_type

DEADLINE = 20.0
URL = "http://10.0.0.7:50051"

end_reader, end_writer = os.pipe()


class Client:
    """Knows its loop, and tells the pipe of its end, in whichever process that happens."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()

    def __del__(self):
        os.write(end_writer, b"!")


class Connector:
    connect_timeout = 5.0

    async def connect(self, url):
        return Client()


def in_child(work: Callable[[], None]) -> None:
    """Fork, run `work` in the child, and fail unless it ends well before the deadline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the reaper is one
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hung")


def refused(use: Callable[[], object]) -> None:
    try:
        answer = use()
    except ForkedProcessError as error:
        message = str(error)
    else:
        raise AssertionError(f"a forked child got {answer!r}")
    assert "spawn" in message
    assert "forkserver" in message


def step(awaitable: object) -> object:
    """The result of an awaitable that never waits, also where a loop runs already."""

    async def run():
        return await awaitable

    coroutine = run()
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waited")


def assert_no_end() -> None:
    os.set_blocking(end_reader, False)
    try:
        raise AssertionError(f"a client ended: {os.read(end_reader, 8)!r}")
    except BlockingIOError:
        pass


def every_use_is_refused(resolver: object, client: object) -> None:
    refused(lambda: step(resolver.get_flight_client_for_url(URL)))
    refused(lambda: step(resolver.get_flight_client_for_url("http://b:1")))
    refused(lambda: step(resolver.prefetch([URL])))
    refused(lambda: resolver.invalidate(URL, client))
    refused(lambda: len(resolver))
    refused(resolver.stats)
    assert "fork" in repr(resolver)
    resolver.close()  # must leave the parent's clients alone
    gc.collect()
    assert_no_end()


def inside_a_running_loop(kind: type) -> None:
    """The child goes on in the middle of the parent's task."""

    async def main():
        resolver = kind(Connector())
        client = await resolver.get_flight_client_for_url(URL)
        in_child(lambda: every_use_is_refused(resolver, client))
        assert await resolver.get_flight_client_for_url(URL) is client
        assert_no_end()

    asyncio.run(main())


def with_a_loop_of_its_own(kind: type) -> None:
    """The parent's loop is not running; the child starts one."""
    resolver = kind(Connector())
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(resolver.get_flight_client_for_url(URL))

    def child() -> None:
        refused(lambda: asyncio.run(resolver.get_flight_client_for_url(URL)))
        every_use_is_refused(resolver, client)
        # A resolver of the child's own is nobody else's business.
        own = kind(Connector())
        assert asyncio.run(own.get_flight_client_for_url(URL)) is not client

    in_child(child)
    assert loop.run_until_complete(resolver.get_flight_client_for_url(URL)) is client
    loop.close()


def half_read(_kind: type) -> None:
    """What the parent reads is none of the child's."""

    async def main():
        ended = False

        async def job(_index, fetch):
            nonlocal ended
            try:
                for number in range(9):
                    await fetch.put(0, number)
            finally:
                ended = True

        def child() -> None:
            refused(lambda: step(fetch.take()))
            step(fetch.stop())
            assert not ended

        fetch = Fetch(job, 1, ordered=True, concurrency=1, prefetch=2)
        assert await fetch.take() == 0
        in_child(child)
        assert [await fetch.take() for _ in range(8)] == list(range(1, 9))

    asyncio.run(main())


def dropped_in_the_child(kind: type) -> None:
    """A child that lets go of the resolver frees none of the parent's clients."""
    holder = [kind(Connector())]
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_look_up(holder[0]))

    def child() -> None:
        holder.clear()
        gc.collect()
        assert_no_end()

    in_child(child)
    assert_no_end()
    loop.run_until_complete(_look_up(holder[0]))
    assert holder[0].stats().connects == 1
    loop.close()


async def _look_up(resolver: object) -> None:
    await resolver.get_flight_client_for_url(URL)


def never_used(kind: type) -> None:
    """A resolver that connected nothing works on in the child, and in the parent."""
    resolver = kind(Connector())

    def child() -> None:
        async def main():
            client = await resolver.get_flight_client_for_url(URL)
            assert await resolver.get_flight_client_for_url(URL) is client
            assert len(resolver) == 1

        asyncio.run(main())

    in_child(child)
    assert asyncio.run(resolver.get_flight_client_for_url(URL))


if __name__ == "__main__":
    parent = os.getpid()
    globals()[sys.argv[2]](aio_resolver_type(sys.argv[1]))
    if os.getpid() == parent:
        print("ok")
