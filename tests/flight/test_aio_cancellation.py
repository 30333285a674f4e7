"""Who is cancelled in asyncio, and who is not: the task, the call, the stream."""

from __future__ import annotations

import asyncio
import threading

import pyarrow as pa
import pytest
from pyarrow import flight

grpc = pytest.importorskip("grpc")

from resolver import aio  # noqa: E402  # only where grpcio is
from resolver.layers import CallMetrics  # noqa: E402
from tests.support.aio import run, until  # noqa: E402
from tests.support.flight_info import EndpointServer, batch  # noqa: E402

TICKET = flight.Ticket(b"0")
LARGE = pa.record_batch({"x": pa.array(range(131_072))})


class Server(EndpointServer):
    """Endpoint 0 streams one batch and stands still; so does a ``get_flight_info``."""

    def __init__(self):
        super().__init__()
        self.end = threading.Event()
        self.asked = threading.Event()
        self.streams = {0: self.stuck}

    def stuck(self):
        yield batch(0, 0)
        self.end.wait(30)

    def get_flight_info(self, context, descriptor):
        self.asked.set()
        self.end.wait(30)
        raise NotImplementedError


@pytest.fixture
def server():
    with Server() as running:
        yield running
        running.end.set()


def channel_to(server):
    return grpc.aio.insecure_channel(server.url.removeprefix("http://"))


def test_cancelling_a_stream_is_an_error_to_who_reads_it_and_cancels_no_task(server):
    async def main():
        async with channel_to(server) as channel:
            reader = await aio.create_flight_client(channel).do_get(TICKET)
            await reader.read_chunk()
            reading = asyncio.create_task(reader.read_chunk())
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(flight.FlightCancelledError):
                await reading
            with pytest.raises(flight.FlightCancelledError):
                await reader.read_chunk()

    run(main())


def test_a_channel_that_is_closed_cancels_no_task(server):
    async def main():
        channel = channel_to(server)
        client = aio.create_flight_client(channel)
        reader = await client.do_get(TICKET)
        await reader.read_chunk()
        calls = [
            asyncio.create_task(reader.read_chunk()),
            asyncio.create_task(client.get_flight_info(flight.FlightDescriptor.for_path("a"))),
        ]
        await until(server.asked.is_set)
        await channel.close()
        for call in calls:
            with pytest.raises(flight.FlightCancelledError):
                await call

    run(main())


class Unreading(flight.FlightServerBase):
    """Takes no batch before it is told to, and then all."""

    def __init__(self):
        super().__init__("grpc://127.0.0.1:0")
        self.end = threading.Event()
        self.active = 0

    def do_exchange(self, context, descriptor, reader, writer):
        self.active += 1
        try:
            while not self.end.wait(0.01) and not context.is_cancelled():
                pass
            for _ in reader:
                pass
        finally:
            self.active -= 1


@pytest.fixture
def unreading():
    with Unreading() as running:
        yield running
        running.end.set()


async def begun(server, layers):
    """Writer and reader of an exchange whose schema was sent."""
    client = await aio.GrpcConnector(layers=layers).connect(f"http://127.0.0.1:{server.port}")
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path("a"))
    await writer.begin(LARGE.schema)
    return writer, reader


@pytest.mark.parametrize("layers", [[], [CallMetrics()]], ids=["plain", "layered"])
@pytest.mark.parametrize("steps", [1, 2, 3, None])
def test_after_a_write_that_was_cancelled_there_is_no_other(unreading, layers, steps):
    """The batch may have been sent or not: with the next one, the server would miss it."""

    async def main():
        writer, reader = await begun(unreading, layers)
        writing = asyncio.create_task(writer.write_table(pa.Table.from_batches([LARGE] * 50)))
        if steps is None:
            await asyncio.wait([writing], timeout=0.3)  # by then it waits for the server
        for _ in range(steps or 0):
            await asyncio.sleep(0)
        assert writing.cancel()
        await asyncio.wait([writing])
        assert writing.cancelled()
        for use in (
            lambda: writer.write_batch(LARGE),
            lambda: writer.write_metadata(b"x"),
            reader.read_chunk,
            writer.close,
        ):
            with pytest.raises(flight.FlightCancelledError):
                await use()
        await until(lambda: not unreading.active)

    run(main())


@pytest.mark.parametrize("layers", [[], [CallMetrics()]], ids=["plain", "layered"])
def test_cancelling_a_stream_is_an_error_to_who_writes_it_and_cancels_no_task(unreading, layers):
    async def main():
        writer, reader = await begun(unreading, layers)
        writing = asyncio.create_task(writer.write_table(pa.Table.from_batches([LARGE] * 50)))
        await asyncio.wait([writing], timeout=0.3)
        reader.cancel()
        with pytest.raises(flight.FlightCancelledError):
            await writing

    run(main())


@pytest.mark.parametrize("layers", [[], [CallMetrics()]], ids=["plain", "layered"])
@pytest.mark.parametrize("steps", [1, 2, 3, None])
def test_a_close_that_was_cancelled_says_so_again(unreading, layers, steps):
    """Or who asks once more would take it that everything arrived."""

    async def main():
        writer, _reader = await begun(unreading, layers)
        closing = asyncio.create_task(writer.close())
        if steps is None:
            await asyncio.wait([closing], timeout=0.3)  # by then it waits for the server
        for _ in range(steps or 0):
            await asyncio.sleep(0)
        assert closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        for _ in range(2):
            with pytest.raises(flight.FlightCancelledError):
                await writer.close()
        await until(lambda: not unreading.active)

    run(main())


def test_closing_a_writer_whose_block_failed_hides_no_error(unreading):
    async def main():
        client = await aio.GrpcConnector().connect(f"http://127.0.0.1:{unreading.port}")
        writer, _reader = client.do_exchange(flight.FlightDescriptor.for_path("a"))
        with pytest.raises(KeyError):
            async with writer:
                raise KeyError
        await writer.close()

    run(main())
