"""The asyncio resolver over grpc.aio and real Flight servers."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import pytest

from resolver import WorkerConnectError, WorkerConnectTimeoutError
from tests.support.aio import run, until
from tests.support.threads import run_concurrently, wait_until

grpc = pytest.importorskip("grpc", reason="the asyncio client needs grpcio")

from resolver.aio import DefaultChannelResolver  # noqa: E402
from tests.support.grpc_aio import ActionConnector  # noqa: E402


@pytest.fixture
def resolver():
    return DefaultChannelResolver(ActionConnector())


def test_a_thousand_tasks_open_one_connection(resolver, server):
    async def call():
        client = await resolver.get_flight_client_for_url(server.url)
        return await client.action(b"connections")

    async def main():
        async with resolver:
            assert set(await asyncio.gather(*[call() for _ in range(1000)])) == {b"1"}
            assert resolver.stats().connects == 1

    run(main())


def test_every_loop_calls_over_a_channel_of_its_own(resolver, server):
    """A grpc.aio channel that is used from another loop than its own raises."""
    both = threading.Barrier(2)

    def on_a_loop():
        async def main():
            for _ in range(20):
                client = await resolver.get_flight_client_for_url(server.url)
                assert await client.action(b"echo", b"hello") == b"hello"
            await asyncio.to_thread(both.wait, 20)
            assert await client.action(b"connections") == b"2"
            await asyncio.to_thread(both.wait, 20)

        run(main())

    run_concurrently([on_a_loop] * 2)


def open_connections(port: int) -> int:
    """Established TCP connections of this machine to a loopback port, as the client sees them."""
    tables = [Path("/proc/net", name) for name in ("tcp", "tcp6")]
    lines = [line for table in tables if table.exists() for line in table.read_text().splitlines()]
    fields = [line.split() for line in lines]
    return sum(each[2].endswith(f":{port:04X}") and each[3] == "01" for each in fields)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
def test_a_closed_loops_connections_close_when_the_next_one_connects(resolver, server):
    async def main():
        client = await resolver.get_flight_client_for_url(server.url)
        assert await client.action(b"echo", b"1") == b"1"
        await until(lambda: open_connections(server.port) == 1)

    for _ in range(4):  # without a warning or an error of any loop that is gone
        run(main())
        gc.collect()
    assert resolver.stats().connects == 4
    assert len(resolver) == 0
    gc.collect()
    wait_until(lambda: open_connections(server.port) == 0)


@pytest.mark.parametrize("drop", ["invalidate", "close"])
def test_a_stream_goes_on_after_its_client_was_dropped(resolver, server, drop):
    async def main():
        client = await resolver.get_flight_client_for_url(server.url)
        stream = client.stream(b"sleep", b"0.2")
        first = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0)
        resolver.invalidate(server.url, client) if drop == "invalidate" else resolver.close()
        await asyncio.sleep(0)
        await first  # raises if the call was cancelled
        assert await client.action(b"echo", b"x") == b"x"
        await resolver.aclose()

    run(main())


def test_a_dead_worker_is_an_error_and_a_living_one_answers_later(resolver, server):
    async def main():
        client = await resolver.get_flight_client_for_url(server.url)
        assert await client.action(b"echo", b"1") == b"1"
        server.kill()
        with pytest.raises(grpc.aio.AioRpcError):
            await client.action(b"echo", b"2")
        assert resolver.invalidate(server.url, client)
        await asyncio.to_thread(server.start)
        replacement = await resolver.get_flight_client_for_url(server.url)
        assert not resolver.invalidate(server.url, client)
        assert await replacement.action(b"echo", b"3") == b"3"
        await resolver.aclose()

    run(main())


def test_nobody_there_ends_within_the_deadline(closed_port):
    resolver = DefaultChannelResolver(ActionConnector(connect_timeout=0.3))

    async def main():
        url = f"http://127.0.0.1:{closed_port}"
        asked = [resolver.get_flight_client_for_url(url) for _ in range(50)]
        errors = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(error) for error in errors} == {WorkerConnectTimeoutError}
        assert isinstance(errors[0], WorkerConnectError)
        assert str(closed_port) in str(errors[0])
        await until(lambda: resolver.stats().connect_failures == 1)
        await resolver.aclose()

    run(main())
