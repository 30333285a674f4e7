"""A blocking stream whose thread is interrupted while it waits never ends as if it were whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest
from pyarrow import flight

pytest.importorskip("grpc")

from resolver import GrpcConnector
from tests.support.threads import wait_until

BATCH = pa.record_batch({"n": pa.array(range(100_000))})
SILENT = flight.Ticket(b"silent")
DESCRIPTOR = flight.FlightDescriptor.for_command(b"x")


class Server(flight.FlightServerBase):
    """Does nothing after the first batch until ``go_on`` is set; then tells whether that was in order."""

    def __init__(self) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.go_on = threading.Event()
        self.was_cancelled: list[bool] = []

    def do_put(self, context, descriptor, reader, writer):
        reader.read_chunk()
        assert self.go_on.wait(60)
        reader.read_all()
        self.was_cancelled.append(context.is_cancelled())

    def do_exchange(self, context, descriptor, reader, writer):
        self.do_put(context, descriptor, reader, writer)

    def do_get(self, context, ticket):
        return flight.GeneratorStream(BATCH.schema, self._batches())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        yield BATCH
        assert self.go_on.wait(60)
        yield BATCH


@pytest.fixture
def server():
    with Server() as running:
        yield running
        running.go_on.set()


@pytest.fixture
def client(server):
    with GrpcConnector().connect(f"http://127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture
def steps():
    """What this thread has done; once it does no more, it is interrupted, as by Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    done: list[object] = []
    ended = threading.Event()

    def watch():
        seen, polls = 0, 0
        while not ended.wait(0.05):
            polls = polls + 1 if len(done) == seen else 0
            seen = len(done)
            if seen and polls == 8:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    yield done
    ended.set()
    thread.join()
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("call", ["do_put", "do_exchange"])
def test_what_is_written_in_part_is_never_closed_in_order(server, client, steps, call):
    if call == "do_put":
        writer, _ = client.do_put(DESCRIPTOR, BATCH.schema)
    else:
        writer, _ = client.do_exchange(DESCRIPTOR)
        writer.begin(BATCH.schema)
    with pytest.raises(KeyboardInterrupt):
        while True:
            steps.append(writer.write_batch(BATCH))
    server.go_on.set()
    for _ in range(2):
        with pytest.raises(flight.FlightCancelledError, match="interrupted"):
            writer.close()
    wait_until(lambda: server.was_cancelled == [True])


def test_after_a_read_was_interrupted_there_is_no_short_result(server, client, steps):
    reader = client.do_get(SILENT)
    steps.append(reader.read_chunk())
    with pytest.raises(KeyboardInterrupt):
        reader.read_chunk()
    server.go_on.set()
    for _ in range(2):
        with pytest.raises(flight.FlightCancelledError, match="interrupted"):
            reader.read_chunk()
