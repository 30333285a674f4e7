"""An exchange whose writer is closed while, or before, its answers are read: none is lost."""

from __future__ import annotations

import asyncio
import gc
import struct
import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest
from pyarrow import flight

from resolver._flight_batches import BatchEncoder
from resolver._flight_wire import decode_data
from tests.support.threads import Background

pytest.importorskip("grpc")

BATCHES = 200
SCHEMA = pa.schema([("n", pa.int64())])
GIVEN = pa.record_batch([[1]], schema=SCHEMA)


class Server(flight.FlightServerBase):
    """Answers an exchange with many batches once the first has come; "fail": and then fails."""

    def do_exchange(self, _context, descriptor, reader, writer):
        reader.read_chunk()
        writer.begin(SCHEMA)
        for number in range(BATCHES):
            writer.write_batch(pa.record_batch([[number]], schema=SCHEMA))
        if descriptor.command == b"fail":
            raise flight.FlightUnauthorizedError("that is enough")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Server("grpc://127.0.0.1:0") as server:
        yield f"http://127.0.0.1:{server.port}"


def descriptor(what: str) -> flight.FlightDescriptor:
    return flight.FlightDescriptor.for_command(what)


def numbers(chunks) -> list[int]:
    return [number for chunk in chunks for number in chunk.data["n"].to_pylist()]


@pytest.mark.parametrize(
    "options",
    [
        pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4),
        pa.ipc.IpcWriteOptions(use_legacy_format=True),
        pa.ipc.IpcWriteOptions(compression="zstd"),
    ],
    ids=["version 4", "legacy", "zstd"],
)
def test_what_is_written_is_as_the_options_say(url, options):
    from resolver import GrpcConnector

    batch = pa.record_batch({"n": [1], "d": pa.array(["x"]).dictionary_encode()})
    encoder = BatchEncoder(batch.schema, options)
    for message in map(decode_data, (encoder.begin(), *encoder.encode(batch))):
        framed = struct.pack("<ii", -1, len(message.header)) + bytes(message.header)
        read = pa.ipc.read_message(pa.py_buffer(framed + bytes(message.body)))
        assert read.metadata_version == options.metadata_version
    with GrpcConnector().connect(url) as client:
        writer, reader = client.do_exchange(descriptor("give"), write_options=options, timeout=60)
        writer.begin(batch.schema)
        writer.write_batch(batch)
        assert numbers([reader.read_chunk()]) == [0]
        reader.cancel()


class TestBlocking:
    @pytest.fixture
    def client(self, url):
        from resolver import GrpcConnector

        with GrpcConnector().connect(url) as client:
            yield client

    def begun(self, client, what="give"):
        writer, reader = client.do_exchange(descriptor(what), timeout=60)
        writer.begin(SCHEMA)
        writer.write_batch(GIVEN)
        return writer, reader

    def test_what_was_not_read_before_the_close_can_be_read_after_it(self, client):
        writer, reader = self.begun(client)
        assert numbers([reader.read_chunk()]) == [0]
        writer.close()
        assert numbers(reader) == list(range(1, BATCHES))

    def test_a_reader_on_another_thread_misses_nothing(self, client):
        for _ in range(10):
            writer, reader = self.begun(client)
            reading = threading.Event()

            def read(reader=reader, reading=reading):
                first = numbers([reader.read_chunk()])
                reading.set()
                return first + numbers(reader)

            all_read = Background(read)
            assert reading.wait(30)
            writer.close()
            assert all_read.result() == list(range(BATCHES))

    def test_an_error_is_told_to_both(self, client):
        writer, reader = self.begun(client, "fail")
        for _ in range(2):  # who closes it again must not take it that everything arrived
            with pytest.raises(flight.FlightUnauthorizedError, match="that is enough"):
                writer.close()
        read = []
        for _ in range(2):  # the end of the batches is not the end of the answer
            with pytest.raises(flight.FlightUnauthorizedError, match="that is enough"):
                read += [numbers([reader.read_chunk()]) for _ in range(BATCHES + 1)]

    def test_what_came_before_an_error_can_be_read(self, client):
        writer, reader = self.begun(client, "fail")
        with pytest.raises(flight.FlightUnauthorizedError):
            writer.close()
        assert numbers(reader.read_chunk() for _ in range(BATCHES)) == list(range(BATCHES))

    def test_nothing_is_kept_for_a_reader_that_is_gone(self, client):
        writer, reader = self.begun(client)
        messages = reader._messages
        del reader
        gc.collect()
        writer.close()
        assert not messages._kept


class TestAio:
    def run(self, url, what, use):
        from resolver.aio import GrpcConnector

        async def main():
            async with await GrpcConnector().connect(url) as client:
                writer, reader = client.do_exchange(descriptor(what), timeout=60)
                await writer.begin(SCHEMA)
                await writer.write_batch(GIVEN)
                return await use(writer, reader)

        return asyncio.run(asyncio.wait_for(main(), 60))

    def test_what_was_not_read_before_the_close_can_be_read_after_it(self, url):
        async def use(writer, reader):
            first = await reader.read_chunk()
            await writer.close()
            return numbers([first, *[chunk async for chunk in reader]])

        assert self.run(url, "give", use) == list(range(BATCHES))

    def test_a_reader_in_another_task_misses_nothing(self, url):
        async def use(writer, reader):
            async def read():
                return numbers([chunk async for chunk in reader])

            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            await writer.close()
            return await reading

        for _ in range(5):
            assert self.run(url, "give", use) == list(range(BATCHES))

    def test_an_error_is_told_to_both_after_what_came_before_it(self, url):
        async def use(writer, reader):
            for _ in range(2):
                with pytest.raises(flight.FlightUnauthorizedError, match="that is enough"):
                    await writer.close()
            read = numbers([await reader.read_chunk() for _ in range(BATCHES)])
            with pytest.raises(flight.FlightUnauthorizedError, match="that is enough"):
                await reader.read_chunk()
            return read

        assert self.run(url, "fail", use) == list(range(BATCHES))

    def test_a_stream_dropped_on_another_thread_is_cancelled_on_its_loop(self, url):
        from resolver.aio import GrpcConnector

        async def main():
            async with await GrpcConnector().connect(url) as client:
                writer, reader = client.do_exchange(descriptor("give"), timeout=60)
                await writer.begin(SCHEMA)
                call = reader._messages._call
                threads = []
                cancel = call.cancel

                def cancelling():
                    threads.append(threading.current_thread())
                    return cancel()

                call.cancel = cancelling
                held = [(writer, reader)]
                del writer, reader
                await asyncio.to_thread(held.clear)
                await asyncio.sleep(0)
                return threads

        threads = asyncio.run(asyncio.wait_for(main(), 60))
        assert threads == [threading.main_thread()]
