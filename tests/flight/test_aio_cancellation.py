"""Who is cancelled in asyncio, and who is not: the task, the call, the stream."""

from __future__ import annotations

import asyncio
import threading

import pytest
from pyarrow import flight

grpc = pytest.importorskip("grpc")

from resolver import aio  # noqa: E402  # only where grpcio is
from tests.support.aio import run, until  # noqa: E402
from tests.support.flight_info import EndpointServer, batch  # noqa: E402

TICKET = flight.Ticket(b"0")


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
