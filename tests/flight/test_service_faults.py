"""The grpcio clients against a server that pyarrow would not be: odd answers, and odd ends."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import struct
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.flight as flight
import pytest

grpc = pytest.importorskip("grpc")

from resolver import (  # noqa: E402  # only where grpcio is
    DefaultChannelResolver,
    GrpcConnector,
    WorkerConnectError,
    create_flight_client,
    read,
)
from resolver import _flight_wire as wire  # noqa: E402
from resolver._flight_batches import BatchEncoder  # noqa: E402
from resolver.aio import GrpcConnector as AioConnector  # noqa: E402
from resolver.layers import CallMetrics, RequestHeaders  # noqa: E402
from tests.support.threads import wait_until  # noqa: E402

BATCHES = [pa.record_batch({"n": pa.array([first, 2, 3])}) for first in range(3)]
DESCRIPTOR = flight.FlightDescriptor.for_command(b"query")
GARBAGE = b"\xff\xff"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def batches(*, padding=b"", cut=None):
    encoder = BatchEncoder(BATCHES[0].schema)
    yield encoder.begin()
    for batch in BATCHES:
        for data in map(wire.decode_data, encoder.encode(batch)):
            yield wire.encode_data(header=data.header, body=[data.body[:cut], padding])


def one_short():
    first, second, *rest = batches()
    yield from (first, second, [*batches(cut=-8)][2], *rest)


def endless():
    yield from batches()
    while True:
        yield wire.encode_data(app_metadata=b"x")


STREAMS = {
    b"plain": batches,
    b"padded": lambda: batches(padding=bytes(64)),
    b"short": lambda: batches(cut=-8),
    b"one short": one_short,
    b"garbage": lambda: iter([GARBAGE]),
    b"endless": endless,
}


def poll_info(seconds):
    info = flight.FlightInfo(BATCHES[0].schema, DESCRIPTOR, [], 1, 2).serialize()
    following = flight.FlightDescriptor.for_command(b"next").serialize()
    expires = bytes([8]) + wire._varint(seconds % 2**64) + bytes([16]) + wire._varint(5_000)
    fields = [(1, info), (2, following), (4, expires)]
    return b"".join(wire._bytes(*field) for field in fields) + b"\x19" + struct.pack("<d", 0.5)


class Handler(grpc.GenericRpcHandler):
    """Answers in bytes of its own."""

    def __init__(self):
        self.echoes = False
        self.ended = threading.Event()
        self.peer_port = 0

    def service(self, details):
        name = details.method.rpartition("/")[2]
        streams = {"DoGet": self.do_get, "DoAction": self.garbage, "ListActions": self.list_actions}
        if name in streams:
            return grpc.unary_stream_rpc_method_handler(streams[name])
        if name == "Handshake":
            return grpc.stream_stream_rpc_method_handler(self.handshake)
        return grpc.unary_unary_rpc_method_handler(self.unary)

    def do_get(self, request, context):
        self.peer_port = int(context.peer().rpartition(":")[2])
        context.add_callback(self.ended.set)
        yield from STREAMS[flight.Ticket.deserialize(request).ticket]()

    def garbage(self, request, context):
        yield GARBAGE

    def list_actions(self, request, context):
        if self.echoes:
            sent = dict(context.invocation_metadata())["authorization"]
            context.abort(UNAVAILABLE, f"I do not like {sent}")
        yield from ()

    def handshake(self, requests, context):
        for request in requests:
            yield wire.encode_handshake(wire.decode_handshake(request) + b"!")

    def unary(self, request, context):
        when = dict(context.invocation_metadata()).get("x-expires")
        return GARBAGE if when is None else poll_info(int(when))


@pytest.fixture(scope="module")
def handler():
    return Handler()


@pytest.fixture(scope="module")
def url(handler):
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"http://127.0.0.1:{port}"
        server.stop(None).wait()


class Blocking:
    def __init__(self, url, **options):
        self.client = GrpcConnector(**options).connect(url)

    def call(self, name, *arguments, **options):
        answer = getattr(self.client, name)(*arguments, **options)
        return list(answer) if hasattr(answer, "__next__") else answer

    def read(self, ticket):
        return self.client.do_get(flight.Ticket(ticket)).read_all()

    def do(self, function):
        return function()

    def close(self):
        self.client.close()


class Aio:
    def __init__(self, url, **options):
        self.runner = asyncio.Runner()
        try:
            self.client = self.runner.run(AioConnector(**options).connect(url))
        except BaseException:
            self.runner.close()
            raise

    def call(self, name, *arguments, **options):
        async def call():
            answer = getattr(self.client, name)(*arguments, **options)
            return [each async for each in answer] if hasattr(answer, "__anext__") else await answer

        return self.runner.run(call())

    def read(self, ticket):
        async def read():
            return await (await self.client.do_get(flight.Ticket(ticket))).read_all()

        return self.runner.run(read())

    def do(self, function):
        return self.runner.run(function())

    def close(self):
        self.runner.run(self.client.close())
        self.runner.close()


class LayeredAio(Aio):
    """With interceptors, behind which grpc.aio has calls of another kind."""

    def __init__(self, url, **options):
        super().__init__(url, **{"layers": [CallMetrics()], **options})


@pytest.fixture(params=[Blocking, Aio, LayeredAio], ids=["grpcio", "aio", "layered aio"])
def kind(request):
    return request.param


@pytest.fixture
def client(kind, url):
    client = kind(url)
    yield client
    client.close()


@pytest.mark.parametrize("ticket", [b"plain", b"padded"])
def test_a_padded_body_loses_no_batch(client, ticket):
    assert client.read(ticket) == pa.Table.from_batches(BATCHES)


def test_a_body_cut_short_is_an_error(client):
    with pytest.raises(OSError, match="message body"):
        client.read(b"short")


def test_after_a_message_that_cannot_be_read_there_is_no_other(client):
    """Or the batches about it would look like all there are."""
    reader = client.do(lambda: client.client.do_get(flight.Ticket(b"one short")))
    for _ in range(3):
        with pytest.raises(OSError, match="message body"):
            client.do(reader.read_all)


@pytest.mark.parametrize("name", ["do_get", "do_action", "get_flight_info", "get_schema"])
def test_an_answer_that_cannot_be_read_is_an_error_and_never_none(client, name):
    argument = {"do_get": flight.Ticket(b"garbage"), "do_action": "any"}.get(name, DESCRIPTOR)
    with pytest.raises(flight.FlightInternalError):
        client.call(name, argument)


def test_a_handshake(client):
    assert client.call("handshake", b"hello") == [b"hello!"]


def test_a_query_that_still_runs(client):
    found = client.call("poll_flight_info", DESCRIPTOR, headers={"x-expires": "1700000000"})
    assert found.info.total_records == 1
    assert found.descriptor.command == b"next"
    assert found.progress == 0.5
    assert found.expiration_time == dt.datetime(2023, 11, 14, 22, 13, 20, 5, dt.UTC)


def test_a_time_before_1970(client):
    found = client.call("poll_flight_info", DESCRIPTOR, headers={"x-expires": "-1"})
    assert found.expiration_time == dt.datetime(1969, 12, 31, 23, 59, 59, 5, dt.UTC)


def test_a_time_that_no_clock_shows_is_an_error(client):
    with pytest.raises(flight.FlightInternalError):
        client.call("poll_flight_info", DESCRIPTOR, headers={"x-expires": str(2**62)})


def test_a_server_that_repeats_a_token_gets_it_into_no_error(kind, url, handler):
    handler.echoes = True
    layers = [RequestHeaders({"authorization": "Bearer very-secret"})]
    try:
        with pytest.raises(WorkerConnectError, match="I do not like") as raised:
            kind(url, layers=layers)
    finally:
        handler.echoes = False
    assert "very-secret" not in "".join(traceback.format_exception(raised.value))
    assert raised.value.__context__ is raised.value.__cause__ or raised.value.__context__ is None


def test_a_cancelled_task_ends_its_call(url, handler):
    handler.ended.clear()

    async def main():
        client = await AioConnector().connect(url)
        reader = await client.do_get(flight.Ticket(b"endless"))
        first = asyncio.Event()

        async def read():
            async for _ in reader:
                first.set()

        task = asyncio.create_task(read())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(handler.ended.wait, 20)
        await client.close()

    asyncio.run(main())


def test_a_cycle_collected_by_grpcs_own_thread_hangs_nothing(url, handler):
    client = GrpcConnector().connect(url)
    reader = client.do_get(flight.Ticket(b"endless"))
    reader.itself = reader
    collected = threading.Event()

    def collect():
        gc.collect()
        collected.set()

    handler.ended.clear()
    short = client.do_get(flight.Ticket(b"plain"))
    short._messages._call.add_callback(collect)
    short._messages._channel = None
    del client, reader
    list(short._messages._call)
    assert collected.wait(20)
    assert handler.ended.wait(20)


def is_connected(port):
    """Whether a connection from this port is open, by either end's view."""
    tables = [Path("/proc/net", name) for name in ("tcp", "tcp6")]  # gRPC's sockets speak both
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return any(row[3] == "01" and row[1].endswith(f":{port:04X}") for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net/tcp")
def test_the_connection_ends_with_the_last_stream(url, handler):
    client = GrpcConnector().connect(url)
    reader = client.do_get(flight.Ticket(b"endless"))
    port = handler.peer_port
    client.close()
    del client
    gc.collect()
    assert reader.read_chunk().data == BATCHES[0]
    assert is_connected(port)
    del reader
    wait_until(lambda: not is_connected(port))


LEFT_OPEN = """
import pyarrow as pa, pyarrow.flight as flight
from resolver import GrpcConnector

client = GrpcConnector().connect({url!r})
reader = client.do_get(flight.Ticket(b"endless"))
reader.read_chunk()
{cycle}
print("done")
"""


@pytest.mark.parametrize("cycle", ["", "reader.itself = reader"])
def test_a_program_ends_though_a_stream_is_left_open(url, cycle):
    program = LEFT_OPEN.format(url=url, cycle=cycle)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_a_stream_that_failed_does_not_end_as_if_it_were_whole():
    """In asyncio a caller that goes on after an error or a cancelled wait must not get a part."""

    class Stuck(flight.FlightServerBase):
        def do_get(self, context, ticket):
            batch = pa.record_batch({"a": [1]})
            return flight.GeneratorStream(batch.schema, self.batches(batch, ticket, context))

        def batches(self, batch, ticket, context):
            yield batch
            if ticket.ticket == b"fails":
                raise flight.FlightServerError("half-way")
            while not context.is_cancelled():
                threading.Event().wait(0.01)

    async def read(port, name, error):
        client = await AioConnector().connect(f"http://127.0.0.1:{port}")
        reader = await client.do_get(flight.Ticket(name))
        await reader.read_chunk()
        with pytest.raises((TimeoutError, flight.FlightServerError)):
            await asyncio.wait_for(reader.read_chunk(), 0.5)
        for _ in range(2):
            with pytest.raises(error):
                await reader.read_all()
        await client.close()

    with Stuck("grpc://127.0.0.1:0") as server:
        asyncio.run(read(server.port, b"fails", flight.FlightServerError))
        asyncio.run(read(server.port, b"stuck", flight.FlightCancelledError))


def test_a_reader_of_a_stream_that_failed_does_not_end_as_if_it_were_whole(url):
    with GrpcConnector().connect(url) as client:
        reader = client.do_get(flight.Ticket(b"one short")).to_reader()
        assert reader.read_next_batch() == BATCHES[0]
        for _ in range(2):
            with pytest.raises(OSError, match="message body"):
                reader.read_all()


def test_nothing_is_written_after_the_end_was_announced():
    class Taking(flight.FlightServerBase):
        def do_put(self, context, descriptor, reader, writer):
            reader.read_all()

    batch = pa.record_batch({"a": [1]})
    descriptor = flight.FlightDescriptor.for_path("a")

    async def put(port):
        client = await AioConnector().connect(f"http://127.0.0.1:{port}")
        writer, _ = await client.do_put(descriptor, batch.schema)
        await writer.done_writing()
        with pytest.raises(pa.ArrowInvalid, match="closed"):
            await writer.write_batch(batch)
        await writer.close()
        await client.close()

    with Taking("grpc://127.0.0.1:0") as server:
        asyncio.run(put(server.port))
        with GrpcConnector().connect(f"http://127.0.0.1:{server.port}") as client:
            writer, _ = client.do_put(descriptor, batch.schema)
            writer.done_writing()
            with pytest.raises(pa.ArrowInvalid, match="closed"):
                writer.write_batch(batch)
            writer.close()


def test_a_flight_info_is_read_through_grpcio_clients():
    class Two(flight.FlightServerBase):
        def get_flight_info(self, context, descriptor):
            endpoints = [flight.FlightEndpoint(b"%d" % n, []) for n in range(2)]
            return flight.FlightInfo(pa.schema([("a", pa.int64())]), descriptor, endpoints, -1, -1)

        def do_get(self, context, ticket):
            return flight.RecordBatchStream(pa.table({"a": [int(ticket.ticket)]}))

    with Two("grpc://127.0.0.1:0") as server, DefaultChannelResolver(GrpcConnector()) as resolver:
        reader = read(
            flight.FlightDescriptor.for_path("a"),
            resolver,
            url=f"http://127.0.0.1:{server.port}",
            timeout=20.0,
        )
        assert sorted(reader.read_all().column("a").to_pylist()) == [0, 1]


def test_a_client_of_another_loop_says_whose_it_is(url):
    async def connected():
        return await AioConnector().connect(url)

    async def used(client):
        await client.list_actions()

    with asyncio.Runner() as first, asyncio.Runner() as second:
        client = first.run(connected())
        first.run(used(client))
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            second.run(used(client))
        first.run(used(client))
        first.run(client.close())


def test_a_stream_of_another_loop_says_whose_it_is(url):
    async def exchanged():
        client = await AioConnector().connect(url)
        return client, *client.do_exchange(flight.FlightDescriptor.for_path("x"))

    uses = {
        "write": lambda writer, _reader: writer.begin(pa.schema([("a", pa.int64())])),
        "end": lambda writer, _reader: writer.done_writing(),
        "close": lambda writer, _reader: writer.close(),
        "read": lambda _writer, reader: reader.read_chunk(),
    }
    with asyncio.Runner() as first, asyncio.Runner() as second:
        client, writer, reader = first.run(exchanged())
        for use in uses.values():

            async def elsewhere(use=use):
                async with asyncio.timeout(5):
                    await use(writer, reader)

            with pytest.raises(RuntimeError, match="belongs to the event loop in which"):
                second.run(elsewhere())
        reader.cancel()
        first.run(client.close())


class Relaying(grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """As many are written: generators, which are no calls."""

    def __init__(self):
        self.ended = threading.Event()
        self.relayed = 0

    def intercept_unary_stream(self, continuation, details, request):
        try:
            yield from continuation(details, request)
        finally:
            self.ended.set()

    def intercept_stream_stream(self, continuation, details, requests):
        self.relayed += 1
        yield from continuation(details, requests)


@pytest.fixture
def relayed(url):
    relaying = Relaying()
    with grpc.insecure_channel(url.removeprefix("http://")) as channel:
        intercepted = grpc.intercept_channel(channel, relaying)
        with create_flight_client(intercepted) as client:
            yield SimpleNamespace(client=client, ended=relaying.ended, relaying=relaying)


def test_a_generator_of_an_interceptor_is_read_as_a_call(relayed):
    assert relayed.client.do_get(flight.Ticket(b"plain")).read_all().num_rows == 9
    with pytest.raises(flight.FlightInternalError):
        list(relayed.client.do_action("any"))


@pytest.mark.parametrize("how", ["cancelled", "dropped"])
def test_a_generator_of_an_interceptor_ends_with_its_stream(relayed, handler, how):
    handler.ended.clear()
    reader = relayed.client.do_get(flight.Ticket(b"endless"))
    reader.read_chunk()
    if how == "cancelled":
        reader.cancel()
    else:
        del reader
        gc.collect()
    assert relayed.ended.wait(30)
    assert handler.ended.wait(30), "the server was not told"


def test_a_generator_where_headers_are_read_is_refused(relayed):
    """It has none. Refused before the password is sent."""
    with pytest.raises(TypeError, match="an interceptor of handshake returned generator"):
        relayed.client.authenticate_basic_token("anna", "password")
    assert relayed.relaying.relayed == 0
    assert relayed.client.handshake(b"hello") == [b"hello!"]


def test_a_generator_where_batches_are_written_is_refused(relayed):
    """It would begin with the first read, so the writer would wait for ever."""
    with pytest.raises(TypeError, match="an interceptor of do_put returned generator"):
        relayed.client.do_put(DESCRIPTOR, BATCHES[0].schema)
