"""Each layer that is shipped, on a real Flight server, through grpcio, grpc.aio and pyarrow."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import pytest
from pyarrow import flight

import resolver.aio
from resolver import FlightConnector, GrpcConnector, ResolverError, WorkerConnectError
from resolver.layers import (
    CallMetrics,
    Deadline,
    InFlightLimit,
    MethodMetrics,
    RequestHeaders,
    TooManyCallsError,
    Tracing,
)
from resolver.layers._call import Call
from tests.layers.calls import (
    SERVICE,
    act,
    action,
    headers_on_grpc,
    headers_on_pyarrow,
    message,
    stream,
)
from tests.support.threads import Background, run_concurrently, wait_until

ENDLESS = message(1, b"endless")


# -- headers -----------------------------------------------------------------------------------


def test_static_headers_arrive_on_both(channel_with, client_with):
    layer = RequestHeaders([("X-Tenant", "a"), ("x-tenant", "b"), ("x-key-bin", b"\x00\xff")])
    for seen in (headers_on_grpc(channel_with(layer)), headers_on_pyarrow(client_with(layer))):
        assert seen["x-tenant"] == ["a", "b"]
        assert seen["x-key-bin"] == ["AP8="]


def test_a_callable_is_asked_for_every_call(channel_with, client_with):
    turns = iter(range(100))
    layer = RequestHeaders(lambda: {"x-turn": str(next(turns))})
    channel, client = channel_with(layer), client_with(layer)
    assert next(turns) == 1, "the connector's probe is a call too"
    assert headers_on_grpc(channel)["x-turn"] == ["2"]
    assert headers_on_grpc(channel)["x-turn"] == ["3"]
    assert headers_on_pyarrow(client)["x-turn"] == ["4"]


def test_headers_of_the_call_itself_stay(channel_with):
    channel = channel_with(RequestHeaders({"x-layer": "1"}))
    metadata = (("x-call", "2"), ("x-call-bin", b"3"))
    seen = act(channel, b"headers", metadata=metadata)[0]
    assert b'"x-layer": ["1"]' in seen
    assert b'"x-call": ["2"]' in seen
    assert b'"x-call-bin"' in seen


def test_a_callable_that_fails_refuses_the_call(channel_with, client_with, caplog):
    secret = "hunter2-token"
    failing = []

    def provide():
        if failing:
            raise OSError(f"vault said {secret}")
        return {"authorization": f"Bearer {secret}"}

    layer = RequestHeaders(provide)
    channel, client = channel_with(layer), client_with(layer)
    failing.append(True)
    with pytest.raises(OSError, match="vault"):
        act(channel, b"pid")
    with pytest.raises(flight.FlightInternalError) as caught:
        list(client.do_action("pid"))
    failing.clear()
    assert headers_on_pyarrow(client)["authorization"] == [f"Bearer {secret}"]
    assert secret not in caplog.text + str(caught.value) + repr(layer)


def test_a_proxy_that_echoes_a_header_gets_it_into_no_error():
    class Echoing(grpc.GenericRpcHandler):
        def service(self, details):
            def refuse(request, context):
                sent = dict(context.invocation_metadata())["authorization"]
                context.abort(grpc.StatusCode.UNAVAILABLE, f"no backend for {sent}")

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Echoing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    layers = [RequestHeaders(lambda: {"authorization": "Bearer hunter2"})]
    with pytest.raises(WorkerConnectError, match=r"no backend for \*\*\*") as caught:
        FlightConnector(layers=layers).connect(f"http://127.0.0.1:{port}")
    server.stop(0).wait(10)
    assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize("headers", [{"grpc-timeout": "1S"}, {"a b": "c"}, {"x": "line\n"}])
def test_headers_that_grpc_would_not_send_are_refused_at_once(headers):
    with pytest.raises(ValueError, match="header"):
        RequestHeaders(headers)


def test_a_repr_shows_names_and_no_values():
    shown = repr(RequestHeaders({"authorization": "Bearer hunter2"}))
    assert "authorization" in shown
    assert "hunter2" not in shown


def test_connectors_show_layers_of_others_by_name_only():
    def with_token(channel, token):
        return channel

    foreign = functools.partial(with_token, token="hunter2")
    own = RequestHeaders({"x-a": "hunter2"})
    for connector in (
        GrpcConnector(layers=[own, foreign, with_token]),
        resolver.aio.GrpcConnector(layers=[own, foreign, with_token], interceptors=[foreign]),
    ):
        shown = repr(connector)
        assert "RequestHeaders(['x-a']), <partial>, <" in shown
        assert "with_token>" in shown
        assert "hunter2" not in shown
    with pytest.raises(TypeError, match="<partial> is no layer") as caught:
        FlightConnector(layers=[foreign])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("kind", [GrpcConnector, resolver.aio.GrpcConnector])
def test_a_layer_that_returns_no_channel_is_named(kind, worker):
    def forgetful(channel):
        grpc.intercept_channel(channel)

    with pytest.raises(TypeError, match=r"forgetful> returned NoneType, not a channel"):
        connected = kind(layers=[forgetful]).connect(worker.url)
        asyncio.run(connected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RequestHeaders({"X-A": "1"}),
        lambda: Deadline(5, methods=["DoGet"]),
        lambda: FlightConnector(layers=[RequestHeaders([("x-a", "1")])]),
    ],
)
def test_layers_without_a_state_are_values(make):
    assert make() == make()
    assert hash(make()) == hash(make())
    assert pickle.loads(pickle.dumps(make())) == make()


# -- deadline ----------------------------------------------------------------------------------


def test_a_call_without_a_timeout_gets_one(channel_with):
    channel = channel_with(Deadline(0.2))
    with pytest.raises(grpc.RpcError) as caught:
        act(channel, b"sleep", b"30")
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_calls_own_timeout_wins(channel_with):
    assert act(channel_with(Deadline(0.001)), b"echo", b"hi", timeout=30) == [b"hi"]


def test_only_methods_that_are_named_get_it(channel_with):
    channel = channel_with(Deadline(0.001, methods=("GetFlightInfo",)))
    assert act(channel, b"echo", b"hi") == [b"hi"]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e9, True, "5"])
def test_a_deadline_that_makes_no_sense_is_refused(seconds):
    with pytest.raises((TypeError, ValueError), match="seconds"):
        Deadline(seconds)


# -- in-flight limit ---------------------------------------------------------------------------


def test_no_more_calls_are_under_way_than_the_limit(channel_with):
    limit = InFlightLimit(2, shared=True)
    metrics = CallMetrics()
    seen = []
    channel = channel_with(limit, metrics)

    def work():
        for _ in range(10):
            act(channel, b"echo", b"x")
            seen.append(limit.in_flight)

    run_concurrently([work] * 6)
    assert max(seen) <= 2
    assert metrics.snapshot()["DoAction"].statuses == {"OK": 60}
    wait_until(lambda: limit.in_flight == 0)


@pytest.mark.parametrize("end", ["read", "cancel", "drop", "error"])
def test_a_place_is_given_back_however_a_grpcio_stream_ends(channel_with, end):
    limit = InFlightLimit(1, wait=0)
    channel = channel_with(limit)
    tickets = {"read": message(1, b"2"), "error": message(1, b"no number")}
    reading = stream(channel, "DoGet")(tickets.get(end, ENDLESS))
    if end in ("cancel", "drop"):
        next(reading)
        with pytest.raises(TooManyCallsError, match=r"DoAction.*1 calls"):
            act(channel, b"pid")
    if end == "read":
        assert len(list(reading)) == 3
    elif end == "cancel":
        reading.cancel()
    elif end == "error":
        with pytest.raises(grpc.RpcError):
            list(reading)
    del reading
    gc.collect()
    wait_until(lambda: limit.in_flight == 0)
    act(channel, b"pid")


@pytest.mark.parametrize("end", ["read", "cancel", "drop", "error"])
def test_a_place_is_given_back_however_a_pyarrow_stream_ends(client_with, end):
    limit = InFlightLimit(1, wait=0)
    client = client_with(limit)
    tickets = {"read": b"2", "error": b"no number"}
    if end == "error":
        with pytest.raises(Exception, match="invalid literal"):
            client.do_get(flight.Ticket(tickets[end])).read_all()
    else:
        reader = client.do_get(flight.Ticket(tickets.get(end, b"endless")))
        reader.read_chunk()
        assert limit.in_flight == 1
        with pytest.raises(flight.FlightInternalError):
            list(client.do_action("pid"))
        if end == "read":
            reader.read_all()
        elif end == "cancel":
            reader.cancel()
        del reader
        gc.collect()
    wait_until(lambda: limit.in_flight == 0)
    list(client.do_action("pid"))


def test_a_dropped_stream_gives_back_its_places_in_every_layer(channel_with):
    outer, inner = InFlightLimit(1, wait=0), InFlightLimit(1, wait=0)
    channel = channel_with(outer, inner)
    reading = stream(channel, "DoGet")(ENDLESS)
    next(reading)
    assert (outer.in_flight, inner.in_flight) == (1, 1)
    del reading
    wait_until(lambda: (gc.collect(), outer.in_flight, inner.in_flight)[1:] == (0, 0))


def test_those_who_wait_are_served_in_turn(channel_with):
    limit = InFlightLimit(1, wait=30, shared=True)
    channel = channel_with(limit)
    reading = stream(channel, "DoGet")(ENDLESS)
    next(reading)
    served = []
    waiting = []
    for number in range(3):
        waiting.append(
            Background(lambda number=number: served.append((act(channel, b"pid"), number)))
        )
        wait_until(lambda: len(bound_gate(limit)._queue) == len(waiting))
    reading.cancel()
    for each in waiting:
        each.result()
    assert [number for _, number in served] == [0, 1, 2]
    wait_until(lambda: limit.in_flight == 0)


def bound_gate(limit):
    return limit._gate


def test_a_limit_is_per_channel_unless_it_is_shared(channel_with):
    limit = InFlightLimit(1, wait=0)
    one, other = channel_with(limit), channel_with(limit)
    reading = stream(one, "DoGet")(ENDLESS)
    next(reading)
    assert act(other, b"echo", b"x") == [b"x"]
    wait_until(lambda: limit.in_flight == 1)
    shared = InFlightLimit(1, wait=0, shared=True)
    one, other = channel_with(shared), channel_with(shared)
    again = stream(one, "DoGet")(ENDLESS)
    next(again)
    with pytest.raises(TooManyCallsError):
        act(other, b"echo", b"x")
    reading.cancel()
    again.cancel()


def test_calls_are_counted_while_channels_are_made():
    limit, bound, is_over = InFlightLimit(1), [], threading.Event()

    def make():
        try:
            bound.extend(limit.bind() for _ in range(3_000))
        finally:
            is_over.set()

    def count():
        while not is_over.is_set():
            assert limit.in_flight == 0

    run_concurrently([make, count, count])


def test_the_refusal_is_an_error_of_this_package():
    assert issubclass(TooManyCallsError, (ResolverError, TimeoutError))


async def until(condition):
    """Return once `condition()` is true; what runs this has a deadline."""
    while not condition():  # noqa: ASYNC110 -- nothing tells when
        await asyncio.sleep(0)


def test_waiting_in_asyncio_does_not_block_the_loop_and_survives_cancelling(worker):
    limit = InFlightLimit(1, wait=30, shared=True)

    async def main():
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{worker.port}", interceptors=limit.aio_interceptors()
        ) as channel:
            do_action = channel.unary_stream(SERVICE + "DoAction")

            async def ask():
                return [each async for each in do_action(action(b"echo", b"x"))]

            reading = channel.unary_stream(SERVICE + "DoGet")(ENDLESS)
            await reading.read()
            impatient, patient = asyncio.create_task(ask()), asyncio.create_task(ask())
            await until(lambda: len(limit._gate._queue) == 2)
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            await until(lambda: len(limit._gate._queue) == 1)
            assert not patient.done()
            reading.cancel()
            assert await patient == [message(1, b"x")]
            await until(lambda: limit.in_flight == 0)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_waiting_in_asyncio_ends_after_wait(worker):
    limit = InFlightLimit(1, wait=0.05, shared=True)

    async def main():
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{worker.port}", interceptors=limit.aio_interceptors()
        ) as channel:
            reading = channel.unary_stream(SERVICE + "DoGet")(ENDLESS)
            await reading.read()
            with pytest.raises(TooManyCallsError):
                await channel.unary_stream(SERVICE + "DoAction")(action(b"pid")).read()
            reading.cancel()

    asyncio.run(asyncio.wait_for(main(), 60))


def connect_blocking(connector, url):
    return connector.connect(url)


def connect_in_asyncio(connector, url):
    return asyncio.run(connector.connect(url))


@pytest.mark.parametrize(
    ("connector", "connect"),
    [
        (FlightConnector, connect_blocking),
        (GrpcConnector, connect_blocking),
        (resolver.aio.GrpcConnector, connect_in_asyncio),
    ],
)
def test_a_connect_waits_for_a_shared_place_no_longer_than_its_deadline(connector, connect, worker):
    limit = InFlightLimit(1, wait=None, shared=True)
    end = limit.begin(Call("/s/m"))
    connecting = Background(
        lambda: connect(connector(layers=[limit], connect_timeout=0.2), worker.url)
    )
    try:
        with pytest.raises(WorkerConnectError, match=r"InFlightLimit|TooManyCallsError"):
            connecting.result(10)
    finally:
        end("OK")


def test_a_call_waits_for_a_place_no_longer_than_its_timeout():
    limit = InFlightLimit(1, wait=None)
    limit.begin(Call("/s/m"))
    with pytest.raises(TooManyCallsError, match=r"waited 0.05 s"):
        Background(lambda: limit.begin(Call("/s/m", timeout=0.05))).result(10)
    with pytest.raises(TooManyCallsError):
        asyncio.run(asyncio.wait_for(limit.begin_async(Call("/s/m", timeout=0.05)), 10))
    assert limit.in_flight == 1


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"limit": 1.0},
        {"limit": True},
        {"limit": 1, "wait": -1},
        {"limit": 1, "wait": "x"},
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(options):
    with pytest.raises((TypeError, ValueError), match=r"limit|wait"):
        InFlightLimit(**options)


# -- metrics -----------------------------------------------------------------------------------


def test_calls_are_counted_by_method_and_status(channel_with, client_with):
    ended = []
    metrics = CallMetrics(lambda method, status, seconds: ended.append((method, status, seconds)))
    channel, client = channel_with(metrics), client_with(metrics)
    act(channel, b"pid")
    list(client.do_action("pid"))
    with pytest.raises(grpc.RpcError):
        act(channel, b"nope")
    reading = stream(channel, "DoGet")(ENDLESS)
    next(reading)
    wait_until(lambda: len(ended) == 4)
    got = metrics.snapshot()
    assert set(got) == {"DoAction", "DoGet", "ListActions"}
    actions = got["DoAction"]
    assert isinstance(actions, MethodMetrics)
    assert (actions.started, actions.in_flight) == (3, 0)
    assert actions.statuses == {"OK": 2, "UNKNOWN": 1}
    assert actions.seconds >= actions.longest > 0
    assert got["DoGet"] == MethodMetrics(1, 1, {}, 0.0, 0.0)
    reading.cancel()
    wait_until(lambda: len(ended) == 5)
    assert metrics.snapshot()["DoGet"].statuses == {"CANCELLED": 1}
    assert {(method, status) for method, status, _ in ended} == {
        ("ListActions", "OK"), ("DoAction", "OK"), ("DoAction", "UNKNOWN"), ("DoGet", "CANCELLED"),
    }  # fmt: skip


def test_metrics_outside_a_limit_see_what_it_refuses(channel_with):
    metrics = CallMetrics()
    channel = channel_with(metrics, InFlightLimit(1, wait=0))
    reading = stream(channel, "DoGet")(ENDLESS)
    next(reading)
    with pytest.raises(TooManyCallsError):
        act(channel, b"pid")
    assert metrics.snapshot()["DoAction"].statuses == {"INTERNAL": 1}
    reading.cancel()


# -- tracing -----------------------------------------------------------------------------------


@pytest.fixture
def spans():
    """A tracer provider, and the list of spans that ended."""
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    class Keep(SpanProcessor):
        def __init__(self):
            self.ended = []

        def on_end(self, span):
            self.ended.append(span)

    keep = Keep()
    provider = TracerProvider()
    provider.add_span_processor(keep)
    return provider, keep.ended


@pytest.mark.parametrize("kind", ["grpcio", "pyarrow"])
def test_a_call_is_a_span_whose_context_reaches_the_worker(channel_with, client_with, spans, kind):
    provider, ended = spans
    layer = Tracing(tracer_provider=provider)
    with provider.get_tracer("test").start_as_current_span("caller") as caller:
        if kind == "grpcio":
            seen = headers_on_grpc(channel_with(layer))
        else:
            seen = headers_on_pyarrow(client_with(layer))
    wait_until(lambda: any(span.name.endswith("DoAction") for span in ended))
    (span,) = (span for span in ended if span.name.endswith("DoAction"))
    assert span.name == "arrow.flight.protocol.FlightService/DoAction"
    assert span.parent.span_id == caller.get_span_context().span_id
    assert dict(span.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "arrow.flight.protocol.FlightService",
        "rpc.method": "DoAction",
        "rpc.grpc.status_code": 0,
    }
    trace_id, span_id = f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"
    (traceparent,) = seen["traceparent"]
    assert traceparent.startswith(f"00-{trace_id}-{span_id}-")


def test_a_failed_call_is_an_error_span(channel_with, client_with, spans):
    provider, ended = spans
    layer = Tracing(tracer_provider=provider)
    with pytest.raises(grpc.RpcError):
        list(stream(channel_with(layer), "DoGet")(message(1, b"no number")))
    with pytest.raises(Exception, match="invalid literal"):
        client_with(layer).do_get(flight.Ticket(b"no number")).read_all()
    wait_until(lambda: len(ended) == 3)
    failed = [span for span in ended if span.name.endswith("DoGet")]
    assert len(failed) == 2
    for span in failed:
        assert not span.status.is_ok
        assert span.attributes["rpc.grpc.status_code"] == 3
        assert span.attributes["error.type"] == "INVALID_ARGUMENT"
        assert "literal" not in str(span.to_json()), "an answer's text became part of a span"


def test_a_propagator_that_fails_refuses_the_call_and_ends_its_span(channel_with, spans):
    class Failing:
        def inject(self, carrier, context):
            raise RuntimeError("no")

    provider, ended = spans
    layer = Tracing(tracer_provider=provider, propagator=Failing())
    with pytest.raises(RuntimeError, match="no"):
        act(channel_with(layer), b"echo", b"x")
    (span,) = ended
    assert not span.status.is_ok


def test_without_opentelemetry_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from resolver.layers import Tracing\n"
        "try: Tracing()\n"
        "except ImportError as error: sys.exit(0 if 'resolver[tracing]' in str(error) else 1)\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- all of them -------------------------------------------------------------------------------


def test_all_layers_together(channel_with, worker, spans, caplog):
    provider, ended = spans
    metrics, limit = CallMetrics(), InFlightLimit(4)
    layers = [Tracing(tracer_provider=provider), metrics, limit, RequestHeaders({"x-a": "1"})]
    channel = channel_with(*layers, Deadline(30))
    client = FlightConnector(layers=layers).connect(worker.url)
    stop = threading.Event()
    with caplog.at_level(logging.DEBUG, "resolver"):

        def on_grpc():
            while not stop.is_set():
                assert headers_on_grpc(channel)["x-a"] == ["1"]

        def on_pyarrow():
            for _ in range(20):
                assert headers_on_pyarrow(client)["x-a"] == ["1"]
            stop.set()

        run_concurrently([on_grpc, on_pyarrow])
    wait_until(lambda: limit.in_flight == 0)
    figures = metrics.snapshot()["DoAction"]
    assert figures.statuses == {"OK": figures.started}
    wait_until(lambda: len(ended) == figures.started + 1)
    assert caplog.records == []
