"""Every kind of call, on every client: a layer sees it begin, and end once, with its status."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
from typing import Any

import grpc
import grpc.aio
import pyarrow as pa
import pytest
from pyarrow import flight

from resolver import FlightConnector, WorkerConnectError
from resolver.layers import Call, CallMetrics, Deadline, Layer, RequestHeaders
from tests.layers.calls import SERVICE, act, action, body, headers_on_grpc, message, stream
from tests.support.threads import Background, wait_until

GET_TWO = message(1, b"2")
ENDLESS = message(1, b"endless")


class Log(Layer):
    """Writes down what it sees."""

    def __init__(self, name="log", events=None):
        self.name = name
        self.events = [] if events is None else events

    def begin(self, call: Call):
        self.events.append((self.name, "begin", call.name))
        return lambda status: self.events.append((self.name, status, call.name))

    @property
    def statuses(self):
        return [what for _, what, _ in self.events if what != "begin"]

    def wait_ended(self, *statuses):
        wait_until(lambda: len(self.statuses) >= len(statuses))
        assert self.statuses == list(statuses)


class Refusing(Layer):
    def begin(self, call):
        raise LookupError("refused by the layer")


class Failing(grpc.GenericRpcHandler):
    """A grpcio server's method for each kind of call; a request of b"fail" aborts."""

    def service(self, details):
        def one(request, context):
            if request == b"fail":
                context.abort(grpc.StatusCode.DATA_LOSS, "asked to")
            return request

        def many(request, context):
            yield one(request, context)
            yield b"more"

        def from_many(requests, context):
            return b"".join(one(each, context) for each in requests)

        def both(requests, context):
            for each in requests:
                yield one(each, context)

        kinds = {
            "UU": grpc.unary_unary_rpc_method_handler(one),
            "US": grpc.unary_stream_rpc_method_handler(many),
            "SU": grpc.stream_unary_rpc_method_handler(from_many),
            "SS": grpc.stream_stream_rpc_method_handler(both),
        }
        return kinds.get(details.method.rpartition("/")[2])


@pytest.fixture(scope="module")
def four_kinds():
    """The port of a server with one method for each of gRPC's kinds of call."""
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(4), handlers=[Failing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0).wait(10)


def call_all_kinds(channel, request):
    """What the four kinds of call answer; the first error of each instead, where it fails."""
    one = [request]
    return [
        _outcome(lambda: channel.unary_unary("/s.S/UU")(request)),
        _outcome(lambda: list(channel.unary_stream("/s.S/US")(request))),
        _outcome(lambda: channel.stream_unary("/s.S/SU")(iter(one))),
        _outcome(lambda: list(channel.stream_stream("/s.S/SS")(iter(one)))),
    ]


def _outcome(call):
    try:
        return call()
    except grpc.RpcError as error:
        return error.code().name


# -- grpcio ------------------------------------------------------------------------------------


def test_all_four_kinds_of_call_begin_and_end(four_kinds):
    log = Log()
    with grpc.insecure_channel(f"127.0.0.1:{four_kinds}") as raw:
        channel = log(raw)
        assert call_all_kinds(channel, b"x") == [b"x", [b"x", b"more"], b"x", [b"x"]]
        log.wait_ended("OK", "OK", "OK", "OK")
        assert call_all_kinds(channel, b"fail") == ["DATA_LOSS"] * 4
        log.wait_ended(*["OK"] * 4, *["DATA_LOSS"] * 4)
        names = [name for _, what, name in log.events if what == "begin"]
        assert names == ["UU", "US", "SU", "SS"] * 2


def test_futures_end_too(four_kinds):
    log = Log()
    with grpc.insecure_channel(f"127.0.0.1:{four_kinds}") as raw:
        channel = log(raw)
        future = channel.unary_unary("/s.S/UU").future(b"x")
        assert isinstance(future, grpc.Future)
        assert future.result(30) == b"x"
        assert channel.stream_unary("/s.S/SU").future(iter([b"a", b"b"])).result(30) == b"ab"
        response, call = channel.unary_unary("/s.S/UU").with_call(b"x")
        assert (response, call.code()) == (b"x", grpc.StatusCode.OK)
        log.wait_ended("OK", "OK", "OK")


def test_a_future_that_nobody_holds_goes_on_as_grpcs_own_does(channel_with):
    log, done = Log(), []
    ask = channel_with(log).unary_unary(SERVICE + "DoAction")
    assert body(ask.future(action(b"sleep", b"0.05")).result(30)) == b"slept"
    ask.future(action(b"sleep", b"0.05")).add_done_callback(done.append)
    log.wait_ended("OK", "OK")
    wait_until(lambda: done)
    assert body(done[0].result(0)) == b"slept"
    done[0].add_done_callback(done.append)  # it is done
    assert done[1] is done[0]


def test_a_stream_ends_when_it_is_cancelled_or_nobody_holds_it(channel_with):
    log = Log()
    channel = channel_with(log)
    reading = stream(channel, "DoGet")(ENDLESS)
    assert isinstance(reading, grpc.Call)
    next(reading)
    assert log.statuses == []
    reading.cancel()
    log.wait_ended("CANCELLED")
    reading = stream(channel, "DoGet")(ENDLESS)
    next(reading)
    del reading
    gc.collect()
    log.wait_ended("CANCELLED", "CANCELLED")


def test_a_stream_that_was_read_and_dropped_at_once_ended_well(channel_with):
    log = Log()
    get = stream(channel_with(log), "DoGet")
    for _ in range(50):
        assert len(list(get(GET_TWO))) == 3
    log.wait_ended(*["OK"] * 50)


def fail(*_arguments):
    raise RuntimeError("down")


def test_an_end_that_raises_is_logged_and_ends_nothing_else(four_kinds, caplog):
    layer = CallMetrics(on_end=fail)
    with grpc.insecure_channel(f"127.0.0.1:{four_kinds}") as raw:
        channel = layer(raw)
        for _ in range(2):  # again on the same channel, whose thread is alive
            calling = Background(lambda: call_all_kinds(channel, b"x"))
            assert calling.result() == [b"x", [b"x", b"more"], b"x", [b"x"]]
        future = channel.unary_unary("/s.S/UU").future(b"x")
        future.add_done_callback(fail)
        assert Background(lambda: future.result(10)).result() == b"x"
        assert Background(lambda: channel.unary_unary("/s.S/UU")(b"x")).result() == b"x"
    wait_until(lambda: caplog.text.count("a layer failed at the end of a call") == 10)


def test_an_end_that_raises_is_logged_in_pyarrow_and_asyncio(worker, client_with, caplog):
    layer = CallMetrics(on_end=fail)
    client_with(layer).list_actions()
    assert caplog.text.count("a layer failed at the end of a call") == 2  # the connect's, too

    async def main():
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{worker.port}", interceptors=layer.aio_interceptors()
        ) as channel:
            return await channel.unary_unary(SERVICE + "DoAction")(action(b"echo", b"x"))

    assert body(asyncio.run(main())) == b"x"
    wait_until(lambda: caplog.text.count("a layer failed at the end of a call") == 3)


def test_the_first_layer_is_outermost_on_a_channel(channel_with):
    events = []
    channel = channel_with(Log("outer", events), Log("inner", events))
    act(channel, b"pid")
    wait_until(lambda: len(events) == 4)
    assert [(name, what) for name, what, _ in events[:2]] == [
        ("outer", "begin"),
        ("inner", "begin"),
    ]


def test_an_outer_layers_end_comes_after_an_inner_ones_begin_failed(channel_with):
    log = Log()
    channel = channel_with(log, Refusing())
    with pytest.raises(LookupError, match="refused by the layer"):
        act(channel, b"pid")
    log.wait_ended("INTERNAL")


def test_a_refused_unary_call_raises_the_layers_own_error(four_kinds):
    with grpc.insecure_channel(f"127.0.0.1:{four_kinds}") as raw, pytest.raises(LookupError):
        Refusing()(raw).unary_unary("/s.S/UU")(b"x")


def test_interceptors_of_ones_own_fit_among_layers(worker):
    class Own(grpc.UnaryStreamClientInterceptor):
        def intercept_unary_stream(self, continuation, details, request):
            return continuation(details._replace(metadata=(("x-own", "1"),)), request)

    with grpc.insecure_channel(f"127.0.0.1:{worker.port}") as raw:
        from resolver.layers import apply_layers

        layers = [Own, RequestHeaders({"x-layer": "2"})]
        layers[0] = lambda channel: grpc.intercept_channel(channel, Own())
        seen = headers_on_grpc(apply_layers(raw, layers))
    assert (seen["x-own"], seen["x-layer"]) == (["1"], ["2"])


def test_what_is_no_blocking_channel_is_refused():
    with pytest.raises(TypeError, match="not int"):
        Log()(7)

    async def main():
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            with pytest.raises(TypeError, match="aio_interceptors"):
                Log()(channel)

    asyncio.run(main())


# -- grpc.aio ----------------------------------------------------------------------------------


def test_all_four_kinds_of_call_in_asyncio(four_kinds):
    log = Log()

    async def main():
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{four_kinds}", interceptors=log.aio_interceptors()
        ) as channel:
            assert await call_all_kinds_async(channel, b"x") == [
                b"x",
                [b"x", b"more"],
                b"x",
                [b"x"],
            ]
            assert await call_all_kinds_async(channel, b"fail") == ["DATA_LOSS"] * 4

    asyncio.run(main())
    assert log.statuses == ["OK"] * 4 + ["DATA_LOSS"] * 4


async def call_all_kinds_async(channel, request):
    """`call_all_kinds` in asyncio."""
    calls = (
        lambda: channel.unary_unary("/s.S/UU")(request),
        lambda: everything(channel.unary_stream("/s.S/US")(request)),
        lambda: channel.stream_unary("/s.S/SU")(iter([request])),
        lambda: everything(channel.stream_stream("/s.S/SS")(iter([request]))),
    )
    outcomes = []
    for call in calls:
        try:
            outcomes.append(await call())
        except grpc.aio.AioRpcError as error:
            outcomes.append(error.code().name)
    return outcomes


async def everything(stream):
    return [each async for each in stream]


def test_a_stream_in_asyncio_ends_when_it_is_cancelled(worker):
    log = Log()

    async def main():
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{worker.port}", interceptors=log.aio_interceptors()
        ) as channel:
            call = channel.unary_stream(SERVICE + "DoGet")(ENDLESS)
            await call.read()
            assert log.statuses == []
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                while True:
                    await call.read()

    asyncio.run(main())
    assert log.statuses == ["CANCELLED"]


def test_headers_and_timeouts_of_a_layer_hold_in_asyncio(worker):
    async def main():
        layers = [RequestHeaders({"x-tenant": "a"}), Deadline(0.2)]
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{worker.port}",
            interceptors=[each for layer in layers for each in layer.aio_interceptors()],
        ) as channel:
            seen = await everything(channel.unary_stream(SERVICE + "DoAction")(action(b"headers")))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await everything(channel.unary_stream(SERVICE + "DoAction")(action(b"sleep", b"9")))
            return seen, caught.value.code()

    (seen,), code = asyncio.run(main())
    assert b'"x-tenant": ["a"]' in seen
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED


# -- pyarrow -----------------------------------------------------------------------------------


def test_every_kind_of_pyarrow_call_ends(client_with):
    log = Log()
    client = client_with(log)  # whose probe is a call too
    client.do_get(flight.Ticket(b"2")).read_all()
    list(client.do_action("pid"))
    with pytest.raises(pa.ArrowNotImplementedError):
        client.get_flight_info(flight.FlightDescriptor.for_path("x"))
    with pytest.raises(pa.ArrowInvalid):
        client.do_get(flight.Ticket(b"no number")).read_all()
    with pytest.raises(flight.FlightTimedOutError):
        list(client.do_action(flight.Action("sleep", b"9"), flight.FlightCallOptions(timeout=0.1)))
    assert log.statuses == [
        "OK", "OK", "OK", "UNIMPLEMENTED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED",
    ]  # fmt: skip
    assert [name for _, what, name in log.events if what == "begin"] == [
        "ListActions", "DoGet", "DoAction", "GetFlightInfo", "DoGet", "DoAction",
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["drop", "cancel", "close"])
def test_a_pyarrow_stream_ends_however_it_ends(client_with, end):
    log = Log()
    client = client_with(log)
    reader = client.do_get(flight.Ticket(b"endless"))
    reader.read_chunk()
    assert log.statuses == ["OK"]
    if end == "cancel":
        reader.cancel()
    elif end == "close":
        client.close()
    del reader
    gc.collect()
    log.wait_ended("OK", "CANCELLED")


def test_the_first_layer_is_outermost_in_pyarrow(client_with):
    events = []
    client_with(Log("outer", events), Log("inner", events))
    begun = [name for name, what, _ in events if what == "begin"]
    assert begun == ["outer", "inner"]


def gets_seen(client):
    """How many do_get calls reached the server."""
    (result,) = client.do_action("calls")
    return json.loads(result.body.to_pybytes()).get("do_get", 0)


def test_a_refused_pyarrow_call_never_leaves(worker, caplog):
    class Moody(Refusing):
        moody = False

        def begin(self, call):
            return super().begin(call) if self.moody else None

    layer = Moody()
    client = FlightConnector(layers=[layer]).connect(worker.url)
    before = gets_seen(client)
    layer.moody = True
    for _ in range(3):
        with pytest.raises(flight.FlightInternalError):
            client.do_get(flight.Ticket(b"1"))
    layer.moody = False
    assert gets_seen(client) == before
    assert caplog.text.count("Moody layer refused a call (LookupError)") == 1


class Adding(Log):
    """Adds one header to calls, which may be nonsense."""

    header: Any = ("x-a", "1")

    def begin(self, call: Call):
        call.headers.append(self.header)
        return super().begin(call)


@pytest.mark.parametrize(
    "header",
    [("authorization", None), ("authorization", 5), ("x-a", "né"), (b"x-a", "1"), ("x-a",)],
)
def test_a_pyarrow_call_never_leaves_without_a_header_of_a_layer(header, client_with):
    layer = Adding()
    client = client_with(layer)
    layer.header = header
    with pytest.raises(flight.FlightInternalError):
        list(client.do_action("echo"))
    assert layer.statuses == ["OK", "INTERNAL"]


def test_a_header_that_is_none_of_grpcs_ends_the_call_in_asyncio(worker):
    layer = Adding()
    layer.header = ("x-a",)

    async def main():
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{worker.port}", interceptors=layer.aio_interceptors()
        ) as channel:
            with pytest.raises(ValueError, match="unpack"):
                await channel.unary_unary(SERVICE + "DoAction")(action(b"echo", b"x"))

    asyncio.run(main())
    assert layer.statuses == ["INTERNAL"]


def test_a_layer_that_refuses_the_probe_fails_the_connect(worker):
    with pytest.raises(WorkerConnectError, match=r"Refusing layer refused.*LookupError"):
        FlightConnector(layers=[Refusing()]).connect(worker.url)


def test_what_pyarrow_cannot_do_is_refused_at_construction():
    with pytest.raises(TypeError, match=r"Deadline.*FlightCallOptions"):
        FlightConnector(layers=[Deadline(1)])
    with pytest.raises(TypeError, match="no layer that pyarrow can use"):
        FlightConnector(layers=[lambda channel: channel])
    with pytest.raises(TypeError, match="no layer"):
        FlightConnector(layers=[Log])
    with pytest.raises(TypeError, match="sequence"):
        FlightConnector(layers=Log())


def test_importing_layers_imports_neither_grpc_nor_opentelemetry():
    code = (
        "import sys, resolver.layers as l; l.Deadline(1), l.CallMetrics().middleware(); "
        "sys.exit(any(name in sys.modules for name in ('grpc', 'opentelemetry', 'datafusion')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_share_a_layer(channel_with, client_with):
    log = Log()
    channel, client = channel_with(log), client_with(log)

    def work():
        for _ in range(10):
            act(channel, b"pid")
            list(client.do_action("pid"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    log.wait_ended(*["OK"] * 81)
