"""The grpcio clients, blocking and asyncio, against pyarrow's server: calls, types, errors."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from resolver import FlightConnector
from resolver._flight_batches import BatchDecoder, BatchEncoder
from resolver._flight_calls import METHODS
from resolver._flight_wire import decode_data, encode_data
from resolver._grpc import GrpcConnector, create_flight_client
from resolver.aio import _connector as aio_connector
from resolver.layers import CallMetrics

pytest.importorskip("grpc")

DESCRIPTOR = flight.FlightDescriptor.for_path("a", "b")
ERRORS = {
    "cancelled": flight.FlightCancelledError("said", b"extra"),
    "internal": flight.FlightInternalError("said", b"extra"),
    "server": flight.FlightServerError("said", b"extra"),
    "timed out": flight.FlightTimedOutError("said", b"extra"),
    "unauthenticated": flight.FlightUnauthenticatedError("said", b"extra"),
    "unauthorized": flight.FlightUnauthorizedError("said", b"extra"),
    "unavailable": flight.FlightUnavailableError("said", b"extra"),
    "invalid": pa.ArrowInvalid("said"),
    "key": KeyError("said"),
    "not implemented": NotImplementedError("said"),
    "type": TypeError("said"),
    "io": OSError("said"),
    "runtime": RuntimeError("said"),
}


def dictionary(*values):
    return pa.array(values).dictionary_encode()


BATCHES = {
    "numbers": [pa.record_batch({"a": pa.array([1, 2, None]), "b": pa.array([1.5, None, 2.5])})],
    "text": [pa.record_batch({"s": pa.array(["a", "", None, "äß" * 50])})],
    "nested": [
        pa.record_batch(
            {"l": pa.array([[1], [], None]), "s": pa.array([{"x": 1, "y": [None]}, None, {"x": 2}])}
        )
    ],
    "a dictionary": [pa.record_batch({"d": dictionary("x", "y", "x")})],
    "another dictionary each time": [
        pa.record_batch({"d": dictionary("x", "y")}),
        pa.record_batch({"d": dictionary("z")}),
        pa.record_batch({"d": dictionary("x", "w", "w")}),
    ],
    "nested dictionaries": [
        pa.record_batch({"l": pa.ListArray.from_arrays([0, 1, 3], dictionary("a", "b", "a"))})
    ],
    "no rows": [pa.record_batch({"a": pa.array([], pa.int64())})],
    "no rows of a dictionary": [pa.record_batch({"d": dictionary("x", "y").slice(0, 0)})],
    "no columns": [pa.RecordBatch.from_struct_array(pa.array([{}] * 7, pa.struct([])))],
    "views": [pa.record_batch({"v": pa.array(["short", "x" * 40], pa.string_view())})],
    "a slice": [pa.record_batch({"a": pa.array(range(100))}).slice(40, 7)],
    "5 MB": [pa.record_batch({"a": pa.array(range(650_000))})],
    "66 MB": [pa.record_batch({"a": pa.array([b"\x01" * (66 << 20)])})],
    "many": [pa.record_batch({"a": [n]}) for n in range(200)],
    "none": [],
}
SCHEMAS = {name: batches[0].schema for name, batches in BATCHES.items() if batches}
SCHEMAS["none"] = pa.schema([("d", pa.dictionary(pa.int8(), pa.string())), ("a", pa.int64())])


class Server(flight.FlightServerBase):
    """Answers every call; gives what is asked for by name."""

    def __init__(self):
        self.received = []
        self.headers = []
        self.ended = threading.Event()
        super().__init__("grpc://127.0.0.1:0", middleware={"headers": Headers(self.headers)})

    def list_flights(self, context, criteria):
        for name in (b"one", b"two", criteria):
            yield flight.FlightInfo(
                SCHEMAS["text"], flight.FlightDescriptor.for_command(name), [], 3, 4
            )

    def get_flight_info(self, context, descriptor):
        if descriptor.command:
            raise ERRORS[descriptor.command.decode()]
        endpoint = flight.FlightEndpoint(b"ticket", ["grpc://127.0.0.1:1"])
        return flight.FlightInfo(SCHEMAS["text"], descriptor, [endpoint], 10, 20)

    def get_schema(self, context, descriptor):
        return flight.SchemaResult(SCHEMAS["nested"])

    def do_get(self, context, ticket):
        name = ticket.ticket.decode()
        if name in ERRORS:
            raise ERRORS[name]
        if name == "endless":
            return flight.GeneratorStream(SCHEMAS["numbers"], self._endless(context))
        if name == "metadata":
            return flight.GeneratorStream(SCHEMAS["numbers"], with_metadata())
        if name == "long error":
            raise flight.FlightServerError("x" * 12_000)
        if name == "fails later":
            return flight.GeneratorStream(SCHEMAS["numbers"], failing())
        kind, _, compression = name.partition("|")
        options = pa.ipc.IpcWriteOptions(compression=compression or None)
        reader = pa.RecordBatchReader.from_batches(SCHEMAS[kind], BATCHES[kind])
        return flight.RecordBatchStream(reader, options=options)

    def _endless(self, context):
        try:
            while not context.is_cancelled():
                yield BATCHES["numbers"][0]
        finally:
            self.ended.set()

    def do_put(self, context, descriptor, reader, writer):
        for chunk in reader:
            if descriptor.command == b"refuse":
                raise ERRORS["unauthorized"]
            self.received.append((descriptor.path, chunk.data, chunk.app_metadata))
            writer.write(b"got %d" % len(self.received))

    def do_exchange(self, context, descriptor, reader, writer):
        begun = False
        for chunk in reader:
            if chunk.data is None:
                writer.write_metadata(chunk.app_metadata)
                continue
            if not begun:
                writer.begin(chunk.data.schema)
                begun = True
            metadata = chunk.app_metadata
            if metadata is None:
                writer.write_batch(chunk.data)
            else:
                writer.write_with_metadata(chunk.data, metadata)

    def do_action(self, context, action):
        if action.type in ERRORS:
            raise ERRORS[action.type]
        yield flight.Result(action.type.encode())
        yield flight.Result(action.body)

    def list_actions(self, context):
        return [("one", "the first"), ("two", "")]


class Headers(flight.ServerMiddlewareFactory):
    def __init__(self, seen):
        self.seen = seen

    def start_call(self, info, headers):
        self.seen.append(dict(headers))


def with_metadata():
    yield BATCHES["numbers"][0], b"first"
    yield BATCHES["numbers"][0]
    yield BATCHES["numbers"][0], b"third"


def failing():
    yield BATCHES["numbers"][0]
    raise ERRORS["invalid"]


class Blocking:
    """What a test asks of a client, over the blocking one."""

    def __init__(self, port):
        self.client = GrpcConnector().connect(f"http://127.0.0.1:{port}")

    def call(self, name, *arguments, **options):
        answer = getattr(self.client, name)(*arguments, **options)
        return list(answer) if hasattr(answer, "__next__") else answer

    def get(self, name, **options):
        reader = self.client.do_get(flight.Ticket(name), **options)
        return reader.schema, list(reader)

    def table(self, name):
        return self.client.do_get(flight.Ticket(name)).read_all()

    def put(self, descriptor, schema, batches, extra=b""):
        writer, reader = self.client.do_put(descriptor, schema)
        with writer:
            for number, batch in enumerate(batches):
                writer.write_with_metadata(batch, b"batch %d" % number)
            if extra:
                writer.write_metadata(extra)
        return list(iter(lambda: (b := reader.read()) and b.to_pybytes(), None))

    def exchange(self, batches):
        writer, reader = self.client.do_exchange(DESCRIPTOR)
        with writer:
            writer.begin(batches[0].schema)
            for batch in batches:
                writer.write_with_metadata(batch, b"there")
            writer.done_writing()
            return reader.schema, list(reader)

    def first_and_cancel(self, name):
        reader = self.client.do_get(flight.Ticket(name))
        first = reader.read_chunk()
        reader.cancel()
        with pytest.raises(flight.FlightCancelledError):
            for _ in reader:
                pass
        return first

    def first_and_drop(self, name):
        reader = self.client.do_get(flight.Ticket(name))
        return reader.read_chunk()

    def after_close(self, name):
        reader = self.client.do_get(flight.Ticket(name))
        self.client.close()
        with pytest.raises(pa.ArrowInvalid, match="closed"):
            self.client.list_actions()
        del self.client
        gc.collect()
        return list(reader)

    def close(self):
        if hasattr(self, "client"):
            self.client.close()


class Aio:
    """The same over the asyncio client."""

    layers = ()

    def __init__(self, port):
        self.runner = asyncio.Runner()
        connector = aio_connector.GrpcConnector(layers=self.layers)
        self.client = self.runner.run(connector.connect(f"http://127.0.0.1:{port}"))

    def call(self, name, *arguments, **options):
        async def call():
            answer = getattr(self.client, name)(*arguments, **options)
            if hasattr(answer, "__anext__"):
                return [each async for each in answer]
            return await answer

        return self.runner.run(call())

    def get(self, name, **options):
        async def get():
            reader = await self.client.do_get(flight.Ticket(name), **options)
            return reader.schema, [chunk async for chunk in reader]

        return self.runner.run(get())

    def table(self, name):
        async def table():
            return await (await self.client.do_get(flight.Ticket(name))).read_all()

        return self.runner.run(table())

    def put(self, descriptor, schema, batches, extra=b""):
        async def put():
            writer, reader = await self.client.do_put(descriptor, schema)
            async with writer:
                for number, batch in enumerate(batches):
                    await writer.write_with_metadata(batch, b"batch %d" % number)
                if extra:
                    await writer.write_metadata(extra)
            said = []
            while (buffer := await reader.read()) is not None:
                said.append(buffer.to_pybytes())
            return said

        return self.runner.run(put())

    def exchange(self, batches):
        async def exchange():
            writer, reader = self.client.do_exchange(DESCRIPTOR)
            async with writer:
                await writer.begin(batches[0].schema)
                for batch in batches:
                    await writer.write_with_metadata(batch, b"there")
                await writer.done_writing()
                return await reader.read_schema(), [chunk async for chunk in reader]

        return self.runner.run(exchange())

    def first_and_cancel(self, name):
        async def first():
            reader = await self.client.do_get(flight.Ticket(name))
            chunk = await reader.read_chunk()
            reader.cancel()
            # Of asyncio, a call that was cancelled here says so as a task does.
            with pytest.raises((flight.FlightCancelledError, asyncio.CancelledError)):
                async for _ in reader:
                    pass
            return chunk

        return self.runner.run(first())

    def first_and_drop(self, name):
        async def first():
            reader = await self.client.do_get(flight.Ticket(name))
            return await reader.read_chunk()

        return self.runner.run(first())

    def after_close(self, name):
        async def after_close():
            reader = await self.client.do_get(flight.Ticket(name))
            await self.client.close()
            with pytest.raises(pa.ArrowInvalid, match="closed"):
                await self.client.list_actions()
            del self.client
            gc.collect()
            return [chunk async for chunk in reader]

        return self.runner.run(after_close())

    def close(self):
        if hasattr(self, "client"):
            self.runner.run(self.client.close())
            del self.client
        self.runner.close()


class LayeredAio(Aio):
    """With interceptors, behind which grpc.aio has calls of another kind."""

    layers = (CallMetrics(),)


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(params=[Blocking, Aio, LayeredAio], ids=["grpcio", "aio", "layered aio"])
def client(request, server):
    client = request.param(server.port)
    yield client
    client.close()


@pytest.fixture(scope="module")
def pyarrow_client(server):
    with flight.connect(f"grpc://127.0.0.1:{server.port}") as client:
        yield client


@pytest.mark.parametrize("compression", ["", "lz4", "zstd"])
@pytest.mark.parametrize("kind", BATCHES)
def test_batches_come_as_pyarrow_sees_them(client, pyarrow_client, kind, compression):
    name = f"{kind}|{compression}"
    expected = list(pyarrow_client.do_get(flight.Ticket(name)))
    schema, chunks = client.get(name)
    assert schema == SCHEMAS[kind]
    assert len(chunks) == len(expected)
    for chunk, other in zip(chunks, expected, strict=True):
        chunk.data.validate(full=True)
        assert chunk.data.equals(other.data)
        assert chunk.data.num_rows == other.data.num_rows
        assert chunk.app_metadata is None
    assert client.table(name).equals(pa.Table.from_batches([c.data for c in chunks], schema))


def test_application_metadata_comes_with_its_batch(client):
    _, chunks = client.get("metadata")
    metadata = [chunk.app_metadata and chunk.app_metadata.to_pybytes() for chunk in chunks]
    assert metadata == [b"first", None, b"third"]


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "none"])
def test_batches_are_put(client, server, kind):
    server.received.clear()
    said = client.put(DESCRIPTOR, SCHEMAS[kind], BATCHES[kind], extra=b"the end")
    assert said == [b"got %d" % (n + 1) for n in range(len(BATCHES[kind]) + 1)]
    *received, (_, nothing, last) = server.received
    assert nothing is None
    assert last.to_pybytes() == b"the end"
    assert [path for path, *_ in received] == [[b"a", b"b"]] * len(received)
    for number, (batch, other) in enumerate(zip(BATCHES[kind], received, strict=True)):
        assert other[1].equals(batch)
        assert other[2].to_pybytes() == b"batch %d" % number


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if BATCHES[kind] and kind != "66 MB"])
def test_batches_are_exchanged(client, kind):
    schema, chunks = client.exchange(BATCHES[kind])
    assert schema == SCHEMAS[kind]
    assert all(c.data.equals(b) for c, b in zip(chunks, BATCHES[kind], strict=True))
    assert {chunk.app_metadata.to_pybytes() for chunk in chunks} == {b"there"}


def test_calls_with_one_answer(client, pyarrow_client):
    info = client.call("get_flight_info", DESCRIPTOR)
    assert info == pyarrow_client.get_flight_info(DESCRIPTOR)
    assert info.endpoints[0].ticket.ticket == b"ticket"
    assert client.call("get_schema", DESCRIPTOR).schema == SCHEMAS["nested"]


def test_calls_with_several_answers(client, pyarrow_client):
    found = client.call("list_flights", b"three")
    assert [info.descriptor.command for info in found] == [b"one", b"two", b"three"]
    assert found == list(pyarrow_client.list_flights(b"three"))
    assert client.call("list_actions") == pyarrow_client.list_actions()
    for action in ("plain", ("pair", b"body"), flight.Action("object", b"body")):
        results = client.call("do_action", action)
        expected = pyarrow_client.do_action((action, b"") if isinstance(action, str) else action)
        assert [r.body for r in results] == [r.body for r in expected]


def test_headers_go_with_a_call(client, server):
    server.headers.clear()
    client.call("list_actions", headers={"X-Tenant": "acme", "token-bin": b"\x00\xff"})
    (seen,) = server.headers
    assert seen["x-tenant"] == ["acme"]
    assert seen["token-bin"] == [b"\x00\xff"]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_pyarrows_client(client, pyarrow_client, name):
    ways = {
        "do_get": (
            lambda: client.get(name),
            lambda: pyarrow_client.do_get(flight.Ticket(name)).read_all(),
        ),
        "do_action": (
            lambda: client.call("do_action", name),
            lambda: list(pyarrow_client.do_action((name, b""))),
        ),
        "get_flight_info": (
            lambda: client.call("get_flight_info", flight.FlightDescriptor.for_command(name)),
            lambda: pyarrow_client.get_flight_info(flight.FlightDescriptor.for_command(name)),
        ),
    }
    for ours, theirs in ways.values():
        with pytest.raises(Exception) as expected:  # whatever it is
            theirs()
        with pytest.raises(type(expected.value)) as raised:
            ours()
        assert type(raised.value) is type(expected.value)
        assert getattr(raised.value, "extra_info", None) == getattr(
            expected.value, "extra_info", None
        )
        assert "said" in str(raised.value)


def test_a_long_error_arrives(client):
    with pytest.raises(flight.FlightServerError, match="x" * 12_000):
        client.get("long error")


def test_a_long_error_arrives_through_pyarrow(server):
    client = FlightConnector().connect(f"http://127.0.0.1:{server.port}")
    with pytest.raises(flight.FlightServerError, match="x" * 12_000):
        client.do_get(flight.Ticket("long error")).read_all()


def test_an_error_after_the_first_batch(client):
    with pytest.raises(pa.ArrowInvalid, match="said"):
        client.get("fails later")


def test_a_refused_put_is_told_when_it_is_closed_or_before(client):
    descriptor = flight.FlightDescriptor.for_command(b"refuse")
    with pytest.raises(flight.FlightUnauthorizedError, match="said"):
        client.put(descriptor, SCHEMAS["numbers"], BATCHES["numbers"] * 500)


def test_a_method_that_a_server_lacks(client):
    with pytest.raises(pa.ArrowNotImplementedError):
        client.call("poll_flight_info", DESCRIPTOR)


def test_a_deadline_ends_a_call(client):
    with pytest.raises(flight.FlightTimedOutError):
        client.get("endless", timeout=0.2)


@pytest.mark.parametrize("way", ["first_and_cancel", "first_and_drop"])
def test_the_server_stops_when_nobody_reads_any_more(client, server, way):
    server.ended.clear()
    chunk = getattr(client, way)("endless")
    assert chunk.data.equals(BATCHES["numbers"][0])
    del chunk
    gc.collect()
    assert server.ended.wait(20)


def test_a_stream_outlives_its_client(client):
    chunks = client.after_close("many")
    assert [chunk.data.column(0)[0].as_py() for chunk in chunks] == list(range(200))


def test_a_channel_of_ones_own_is_wrapped_and_stays_open(server):
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        create_flight_client(channel).close()
        assert create_flight_client(channel).list_actions()[0].type == "one"


def test_a_body_is_not_copied():
    batch = pa.record_batch({"a": pa.array(range(1_000_000))})
    encoder, decoder = BatchEncoder(batch.schema), BatchDecoder()
    decoder.decode(decode_data(encoder.begin()))
    (message,) = encoder.encode(batch)
    before = pa.total_allocated_bytes()
    chunk = decoder.decode(decode_data(message))
    assert chunk.data.equals(batch)
    assert pa.total_allocated_bytes() - before < 10_000


def test_a_body_is_copied_once_when_it_is_written():
    """Into the bytes that grpcio asks for. Arrow's own buffers are not traced."""
    batch = pa.record_batch({"a": pa.array(range(1_000_000)), "b": pa.array(range(1_000_000))})
    encoder = BatchEncoder(batch.schema)
    serialize = METHODS["do_put"].encode
    tracemalloc.start()
    try:
        (message,) = map(serialize, encoder.encode(batch))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert batch.nbytes < len(message) < peak < 1.01 * batch.nbytes


def test_what_follows_a_batch_that_was_sent_in_part_is_refused():
    """It would be read with the dictionaries of the one before."""
    first, second, third = (
        pa.record_batch({"d": pa.array([text]).dictionary_encode()}) for text in "abb"
    )
    encoder = BatchEncoder(first.schema)
    assert len(list(encoder.encode(first))) == 2
    next(encoder.encode(second))  # and whoever sends it was interrupted
    with pytest.raises(pa.ArrowInvalid, match="begin a new stream"):
        next(encoder.encode(third))


def test_a_batch_of_another_schema_does_not_end_the_stream():
    batch = pa.record_batch({"d": pa.array(["a"]).dictionary_encode()})
    encoder = BatchEncoder(batch.schema)
    for _ in range(2):
        with pytest.raises(pa.ArrowInvalid, match="schema"):
            next(encoder.encode(pa.record_batch({"n": [1]})))
        assert list(encoder.encode(batch))


def test_a_batch_that_changes_once_it_is_written_was_sent_as_it_was():
    memory = bytearray(8)
    batch = pa.record_batch(
        [pa.Array.from_buffers(pa.int64(), 1, [None, pa.py_buffer(memory)])], ["a"]
    )
    encoder, decoder = BatchEncoder(batch.schema), BatchDecoder()
    decoder.decode(decode_data(encoder.begin()))
    (message,) = encoder.encode(batch)
    memory[0] = 1
    assert decoder.decode(decode_data(message)).data.to_pydict() == {"a": [0]}


@pytest.mark.parametrize(
    "message",
    [
        b"\xff",
        b"\x12",
        b"\x12\x05ab",
        b"\x0b",
        b"\x08" + b"\xff" * 11,
        encode_data(descriptor=b"x", header=b"x", app_metadata=b"x", body=[b"x"]),
        encode_data(header=b"\0" * 64),
    ],
)
def test_garbage_is_an_error(message):
    with pytest.raises((ValueError, pa.ArrowInvalid)):
        BatchDecoder().decode(decode_data(message))
