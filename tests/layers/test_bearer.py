"""BearerToken: asked for rarely, renewed in time, once more when refused, and never shown."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pyarrow as pa
import pytest
from pyarrow import flight

import resolver.aio
from resolver import FlightConnector, GrpcConnector, WorkerConnectError, _retrying
from resolver.layers import BearerToken, CallMetrics, Token, TokenUnavailableError, _tokens
from resolver.layers._call import Call
from tests.support.aio import until
from tests.support.threads import DEADLINE, Background, run_concurrently, wait_until

SCHEMA = pa.schema([("i", pa.int64())])
DESCRIPTOR = flight.FlightDescriptor.for_path("t")


class Door(flight.ServerMiddlewareFactory):
    """Lets in who has one of the accepted tokens, and counts both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted: set[str] = {"first"}
        self.let_in = 0
        self.refused = 0
        self.tenants: list[str] = []

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:
        self.tenants += headers.get("x-tenant", [])
        given = headers.get("authorization", [""])[-1]
        if given.removeprefix("Bearer ") not in self.accepted:
            self.refused += 1
            raise flight.FlightUnauthenticatedError(f"{given} is not valid here")
        self.let_in += 1


class Server(flight.FlightServerBase):
    """Answers every method with little."""

    def list_actions(self, context):
        return [("echo", "")]

    def list_flights(self, context, criteria):
        yield self.get_flight_info(context, DESCRIPTOR)

    def get_flight_info(self, context, descriptor):
        return flight.FlightInfo(SCHEMA, descriptor, [], 2, -1)

    def get_schema(self, context, descriptor):
        return flight.SchemaResult(SCHEMA)

    def do_get(self, context, ticket):
        batch = pa.record_batch([pa.array([1, 2])], schema=SCHEMA)
        return flight.RecordBatchStream(pa.Table.from_batches([batch]))

    def do_action(self, context, action):
        return iter([action.body.to_pybytes(), b"end"])

    def do_put(self, context, descriptor, reader, writer):
        reader.read_all()


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def url(door: Door) -> Iterator[str]:
    with Server("grpc://127.0.0.1:0", middleware={"door": door}) as server:
        yield f"http://127.0.0.1:{server.port}"


class Issuer:
    """A provider that tests can look into, fail and hold back."""

    def __init__(self, *tokens: str | Token) -> None:
        self.tokens = list(tokens)
        self.asked = 0
        self.threads: set[int] = set()
        self.error: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self) -> str | Token:
        self.asked += 1
        self.threads.add(threading.get_ident())
        assert self.may_answer.wait(30)
        if self.error is not None:
            raise self.error
        return self.tokens.pop(0) if len(self.tokens) > 1 else self.tokens[0]


# -- the source: no server needed -----------------------------------------------------------


def sent(layer: BearerToken, timeout: float | None = None) -> str:
    call = Call("/s/m", timeout=timeout)
    layer.begin(call)
    ((name, value),) = call.headers
    assert name == "authorization"
    return str(value).removeprefix("Bearer ")


def test_many_threads_ask_once() -> None:
    issuer = Issuer("first")
    issuer.may_answer.clear()
    layer = BearerToken(issuer)
    threads = [Background(lambda: sent(layer)) for _ in range(32)]
    wait_until(lambda: issuer.asked)
    issuer.may_answer.set()
    assert {thread.result() for thread in threads} == {"first"}
    assert issuer.asked == 1
    assert threading.get_ident() not in issuer.threads


def test_it_is_renewed_ahead_of_its_end_and_nobody_waits() -> None:
    soon = time.time() + 30
    issuer = Issuer(Token("first", soon), Token("second", soon + 3_600))
    layer = BearerToken(issuer, refresh_before=60)
    assert sent(layer) == "first"
    issuer.may_answer.clear()
    assert {sent(layer) for _ in range(20)} == {"first"}  # and none of them waited
    issuer.may_answer.set()
    wait_until(lambda: sent(layer) == "second")
    assert issuer.asked == 2
    assert {sent(layer) for _ in range(20)} == {"second"}
    assert issuer.asked == 2


def test_one_that_has_ended_is_not_sent() -> None:
    issuer = Issuer(Token("first", time.time() + 0.2), "second")
    layer = BearerToken(issuer, refresh_before=0)
    assert sent(layer) == "first"
    wait_until(lambda: sent(layer) == "second")


def test_a_provider_that_fails_is_not_asked_by_every_call(caplog) -> None:
    issuer = Issuer("first")
    issuer.error = RuntimeError("s3cret")
    layer = BearerToken(issuer)
    for _ in range(20):
        with pytest.raises(TokenUnavailableError, match="RuntimeError") as caught:
            sent(layer)
        assert "s3cret" not in str(caught.value)
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert issuer.asked <= 3  # of twenty; it rests for half a second, then one
    issuer.error = None
    wait_until(lambda: issuer.asked and _given(layer) == "first")
    wait_until(lambda: "RuntimeError" in caplog.text)
    assert "s3cret" not in caplog.text
    assert caplog.text.count("RuntimeError") == 1


def frames_of(error: BaseException | None) -> list[Any]:
    """What the tracebacks of an error and of its causes keep alive."""
    found = []
    while error is not None:
        found += [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize("through", ["layer", "pyarrow", "headers"])
def test_no_frame_that_may_hold_a_token_hangs_on_an_error(through, url) -> None:
    def provide() -> str:
        secret = "s3cret"
        try:
            raise OSError("refused")
        except OSError as error:
            raise RuntimeError(f"no token for a secret of {len(secret)}") from error

    options: dict[str, Any] = {"layers": [BearerToken(provide)]}
    if through == "headers":
        options = {"headers": provide}
    with pytest.raises((TokenUnavailableError, WorkerConnectError)) as caught:
        if through == "layer":
            sent(BearerToken(provide))
        FlightConnector(**options).connect(url)
    assert all("secret" not in frame.f_locals for frame in frames_of(caught.value))


def test_nobody_waits_for_the_log_of_a_failure() -> None:
    class Slow(logging.Handler):
        may_end = threading.Event()

        def emit(self, record: logging.LogRecord) -> None:
            self.may_end.wait(DEADLINE)

    issuer, handler = Issuer("first"), Slow()
    issuer.error = RuntimeError("down")
    logger = logging.getLogger("resolver")
    logger.addHandler(handler)
    try:
        with pytest.raises(TokenUnavailableError, match="RuntimeError"):
            sent(BearerToken(issuer, timeout=1))
    finally:
        handler.may_end.set()
        logger.removeHandler(handler)


def _given(layer: BearerToken) -> str | None:
    try:
        return sent(layer)
    except TokenUnavailableError:
        return None


def test_a_valid_token_outlives_its_providers_failure() -> None:
    issuer = Issuer(Token("first", time.time() + 3_600))
    layer = BearerToken(issuer, refresh_before=7_200)
    assert sent(layer) == "first"
    issuer.error = RuntimeError("down")
    asked = issuer.asked
    assert sent(layer) == "first"
    wait_until(lambda: issuer.asked > asked)
    assert sent(layer) == "first"


def test_a_slow_provider_holds_nobody_up_longer_than_he_said() -> None:
    issuer = Issuer("first")
    issuer.may_answer.clear()
    layer = BearerToken(issuer, timeout=3_600)
    try:
        with pytest.raises(TokenUnavailableError, match=r"within 0\.05 s"):
            sent(layer, timeout=0.05)
    finally:
        issuer.may_answer.set()
    wait_until(lambda: sent(layer) == "first")
    assert issuer.asked == 1


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (None, "TypeError"),
        (b"first", "TypeError"),
        ("", "ValueError"),
        ("Bearer first", "ValueError"),
        ("a\nb", "ValueError"),
        (Token("first", time.time() - 1), "ValueError"),
        (Token("first", "soon"), "TypeError"),
    ],
)
def test_what_is_no_token_is_never_sent(given, error) -> None:
    with pytest.raises(TokenUnavailableError, match=error) as caught:
        sent(BearerToken(lambda: given))
    assert "first" not in str(caught.value) + str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("text",), TypeError),
        ((str, {"refresh_before": -1}), ValueError),
        ((str, {"timeout": "5"}), TypeError),
        ((str, {"timeout": float("nan")}), ValueError),
    ],
)
def test_options_that_make_no_sense(arguments, error) -> None:
    provider, *options = arguments
    with pytest.raises(error):
        BearerToken(provider, **(options[0] if options else {}))


def test_one_that_never_returns_is_asked_once_more_beside(monkeypatch) -> None:
    monkeypatch.setattr(_tokens, "_HANGING", 0.5)
    release, asked = threading.Event(), []

    def provider() -> str:
        asked.append(threading.current_thread())
        if len(asked) == 1:
            release.wait(60)
            return "late"
        return "second"

    source = BearerToken(provider, timeout=0.01)._source
    try:
        wait_until(lambda: _has(source, "second"))
        assert len(asked) == 2  # everybody before waited for the first
    finally:
        release.set()
    asked[0].join(60)
    assert source.get(0.01) == "second", "what came late replaced what is newer"
    assert source._hanging == 0


def test_a_provider_that_hangs_each_time_is_asked_less_and_less_often(monkeypatch) -> None:
    monkeypatch.setattr(_tokens, "_HANGING", 1.0)
    now, release, asked = [0.0], threading.Event(), []

    def provider() -> str:
        asked.append(now[0])
        release.wait(60)
        return "late"

    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr(_tokens, "time", clock)
    source = BearerToken(provider)._source
    try:
        for second in range(16):
            now[0] = float(second)
            source._ask(None)
            wait_until(lambda: bool(asked))
        wait_until(lambda: len(asked) == 5)
        assert asked == [0.0, 1.0, 3.0, 7.0, 15.0]
    finally:
        release.set()
    wait_until(lambda: _has(source, "late"))


def _has(source: _tokens.TokenSource, token: str) -> bool:
    try:
        return source.get(0.01) == token
    except TokenUnavailableError:
        return False


def test_threads_refused_together_ask_once() -> None:
    issuer = Issuer("first", "second")
    layer = BearerToken(issuer)
    calls = []
    for _ in range(16):
        call = Call("/s/m")
        layer.begin(call)
        calls.append(call)
    assert (
        run_concurrently([lambda call=call: layer.refused(call) for call in calls]) == [True] * 16
    )
    assert issuer.asked == 2
    assert sent(layer) == "second"


def test_a_provider_without_another_token_is_left_alone() -> None:
    issuer = Issuer("first")
    layer = BearerToken(issuer)
    call = Call("/s/m")
    layer.begin(call)
    assert not layer.refused(call)
    asked = issuer.asked
    for _ in range(10):  # each call of a client that is not let in
        assert not layer.refused(call)
    assert issuer.asked == asked


def test_an_async_provider_serves_both_worlds() -> None:
    async def provider() -> Token:
        await asyncio.sleep(0)
        return Token("first", time.time() + 60)

    layer = BearerToken(provider)
    assert sent(layer) == "first"

    async def main() -> str:
        call = Call("/s/m")
        await BearerToken(provider).begin_async(call)
        return str(call.headers[0][1])

    assert asyncio.run(main()) == "Bearer first"


def test_cancelling_one_task_leaves_the_others_their_token() -> None:
    issuer = Issuer("first")
    issuer.may_answer.clear()
    layer = BearerToken(issuer)

    async def token() -> str:
        call = Call("/s/m")
        await layer.begin_async(call)
        return str(call.headers[0][1])

    async def main() -> list[str]:
        tasks = [asyncio.create_task(token()) for _ in range(4)]
        await until(lambda: issuer.asked)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        issuer.may_answer.set()
        return await asyncio.gather(*tasks[1:])

    assert asyncio.run(main()) == ["Bearer first"] * 3
    assert issuer.asked == 1


def test_a_loop_that_ends_while_it_waits_is_no_trouble(recwarn) -> None:
    issuer = Issuer("first")
    issuer.may_answer.clear()
    layer = BearerToken(issuer, timeout=0.01)

    async def main() -> None:
        with pytest.raises(TokenUnavailableError):
            await layer.begin_async(Call("/s/m"))

    asyncio.run(main())
    issuer.may_answer.set()
    wait_until(lambda: sent(layer) == "first")
    assert not recwarn.list


def test_it_is_shown_and_travels_without_its_token() -> None:
    layer = BearerToken(_provide_the_secret, refresh_before=5, insecure=True)
    sent(layer)
    assert "s3cret" not in repr(layer) + repr(FlightConnector(layers=[layer]))
    assert "s3cret" not in repr(Token("s3cret"))
    assert b"s3cret" not in pickle.dumps(layer)
    copy = pickle.loads(pickle.dumps(layer))
    assert (copy.refresh_before, copy.timeout, copy.insecure) == (5, 5, True)
    assert sent(copy) == "s3cret"


def _provide_the_secret() -> str:
    return "s3cret"


# -- with a server, through every client ------------------------------------------------------


def by_pyarrow(url: str, layer: BearerToken, use: Callable[[Any], Any]) -> Any:
    return use(FlightConnector(layers=[layer]).connect(url))


def by_grpcio(url: str, layer: BearerToken, use: Callable[[Any], Any]) -> Any:
    with GrpcConnector(layers=[layer]).connect(url) as client:
        return use(client)


def by_asyncio(url: str, layer: BearerToken, use: Callable[[Any], Any]) -> Any:
    async def main() -> Any:
        async with await resolver.aio.GrpcConnector(layers=[layer]).connect(url) as client:
            return await use(_Sync(client))

    return asyncio.run(main())


class _Sync:
    """The asyncio client, its answers read to their end, so that both can share `METHODS`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            answer = getattr(self._client, name)(*arguments)
            if hasattr(answer, "__aiter__"):
                return [each async for each in answer]
            answer = await answer
            if name == "do_get":
                return pa.Table.from_batches([chunk.data async for chunk in answer])
            return answer

        return call


def _of(answer: Any, work: Callable[[Any], Any]) -> Any:
    if not inspect.iscoroutine(answer):
        return work(answer)

    async def later() -> Any:
        return work(await answer)

    return later()


def _rows(answer: Any) -> int:
    table = answer if isinstance(answer, pa.Table) else answer.read_all()
    return int(table.num_rows)


METHODS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "list_actions": (lambda c: _of(c.list_actions(), lambda a: len(list(a))), 1),
    "list_flights": (lambda c: _of(c.list_flights(), lambda a: len(list(a))), 1),
    "get_flight_info": (
        lambda c: _of(c.get_flight_info(DESCRIPTOR), lambda a: a.total_records),
        2,
    ),
    "get_schema": (lambda c: _of(c.get_schema(DESCRIPTOR), lambda a: a.schema), SCHEMA),
    "do_get": (lambda c: _of(c.do_get(flight.Ticket(b"")), _rows), 2),
    "do_action": (
        lambda c: _of(
            c.do_action(flight.Action("echo", b"hello")),
            lambda a: [each.body.to_pybytes() for each in a],
        ),
        [b"hello", b"end"],
    ),
}
clients = pytest.mark.parametrize("through", [by_pyarrow, by_grpcio, by_asyncio])


@clients
@pytest.mark.parametrize("method", METHODS)
def test_a_refused_call_is_made_once_more(method, through, url, door) -> None:
    use, expected = METHODS[method]
    issuer = Issuer("first", "second")
    layer = BearerToken(issuer)
    sent(layer)

    def expire_then_use(client: Any) -> Any:
        door.accepted = {"second"}
        door.refused = 0
        return use(client)

    assert through(url, layer, expire_then_use) == expected
    assert door.refused == 1
    assert issuer.asked == 2


@clients
@pytest.mark.parametrize("method", METHODS)
def test_the_second_refusal_is_the_callers(method, through, url, door) -> None:
    use, _ = METHODS[method]
    issuer = Issuer("first", "second", "third")
    layer = BearerToken(issuer)
    sent(layer)

    def close_then_use(client: Any) -> Any:
        door.accepted = set()
        door.refused = 0
        return use(client)

    # Of get_schema, pyarrow itself makes it an OSError.
    with pytest.raises((flight.FlightUnauthenticatedError, OSError)):
        through(url, layer, close_then_use)
    assert door.refused == 2
    assert issuer.asked == 2


class Slow(BearerToken):
    """Takes its time over a refusal, by a clock of its own."""

    took = 0.0

    def refused(self, call: Call) -> bool:
        self.took += 20.0
        return super().refused(call)


@pytest.mark.parametrize("method", ["do_get", "do_action", "list_flights"])
@pytest.mark.parametrize(("timeout", "is_enough"), [(30.0, True), (15.0, False), (None, True)])
def test_both_attempts_share_one_timeout(method, timeout, is_enough, url, door, monkeypatch):
    layer = Slow(Issuer("first", "second"))
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + layer.took)
    monkeypatch.setattr(_retrying, "time", clock)
    client = FlightConnector(layers=[layer]).connect(url)
    door.accepted = {"second"}
    headers = [(b"x-tenant", b"blue")]
    options = flight.FlightCallOptions(timeout=timeout, headers=headers)
    argument = {"do_get": flight.Ticket(b""), "do_action": ("echo", b"")}.get(method, b"")
    with contextlib.nullcontext() if is_enough else pytest.raises(flight.FlightTimedOutError):
        list(getattr(client, method)(argument, options=options))
        assert door.tenants == ["blue", "blue"]


@pytest.mark.parametrize("method", ["do_get", "do_put"])
def test_a_call_of_pyarrows_waits_for_a_token_no_longer_than_its_timeout(method, url, door):
    go_on, ended = threading.Event(), threading.Event()

    def provide() -> str:
        if door.let_in:  # after the connect
            go_on.wait(30)
            ended.set()
        return "first"

    client = FlightConnector(layers=[BearerToken(provide, timeout=3_600.0)]).connect(url)
    door.accepted = {"second"}
    options = flight.FlightCallOptions(timeout=0.5)
    with pytest.raises(flight.FlightError):
        client.do_get(flight.Ticket(b""), options)
    if method == "do_put":  # which needs another token than the one that was refused
        with pytest.raises(flight.FlightError):
            client.do_put(DESCRIPTOR, SCHEMA, options)[0].close()
    assert not ended.is_set()
    go_on.set()


def put(client: Any) -> Any:
    if isinstance(client, _Sync):

        async def put_async() -> None:
            writer, reader = await client._client.do_put(DESCRIPTOR, SCHEMA)
            await writer.write_batch(pa.record_batch([pa.array([1])], schema=SCHEMA))
            await writer.done_writing()
            await reader.read()
            await writer.close()

        return put_async()
    writer, _ = client.do_put(DESCRIPTOR, SCHEMA)
    writer.write_batch(pa.record_batch([pa.array([1])], schema=SCHEMA))
    writer.close()
    return None


@clients
def test_a_stream_that_sends_is_made_once_and_the_next_has_another_token(
    through, url, door
) -> None:
    issuer = Issuer("first", "second")
    layer = BearerToken(issuer)

    def expire_then_put(client: Any) -> Any:
        door.accepted = {"second"}
        door.refused = 0
        return put(client)

    with pytest.raises(flight.FlightUnauthenticatedError):
        through(url, layer, expire_then_put)
    assert door.refused == 1
    wait_until(lambda: sent(layer) == "second")
    through(url, layer, put)
    assert (door.refused, issuer.asked) == (1, 2)


def test_a_call_begun_with_future_renews_the_token(url, door) -> None:
    issuer = Issuer("first", "second")
    layer = BearerToken(issuer)
    sent(layer)
    door.accepted = {"second"}
    with grpc.insecure_channel(url.removeprefix("http://")) as channel:
        ask = layer(channel).unary_unary("/arrow.flight.protocol.FlightService/GetFlightInfo")
        with contextlib.suppress(grpc.RpcError):  # if it is refused before we have it, none
            ask.future(DESCRIPTOR.serialize()).result(30)
        wait_until(lambda: sent(layer) == "second")
        assert ask.future(DESCRIPTOR.serialize()).result(30)


def test_only_a_call_that_is_made_once_waits_for_another_token_than_the_refused_one() -> None:
    issuer = Issuer("first", "second")
    layer = BearerToken(issuer, timeout=DEADLINE)
    sent(layer)
    issuer.may_answer.clear()
    layer.begin(Call("/s/DoPut"))("UNAUTHENTICATED")
    assert sent(layer) == "first"
    put, put_async = Call("/s/DoPut"), Call("/s/DoPut")
    putting = [
        Background(lambda: layer.begin(put)),
        Background(lambda: asyncio.run(layer.begin_async(put_async))),
    ]
    hasty = Call("/s/DoPut", timeout=0.01)
    layer.begin(hasty)
    assert hasty.headers == [("authorization", "Bearer first")]
    assert not any(each.ended for each in putting)
    issuer.may_answer.set()
    for each in putting:
        each.result()
    assert put.headers == put_async.headers == [("authorization", "Bearer second")]
    assert issuer.asked == 2


@clients
def test_the_token_is_in_no_error_of_a_connect(through, url, caplog) -> None:
    layer = BearerToken(lambda: "s3cret-token")
    with pytest.raises(flight.FlightUnauthenticatedError):
        # Connecting succeeds: what the worker thinks of a caller is for his call to find out.
        through(url, layer, METHODS["do_get"][0])
    with pytest.raises(WorkerConnectError) as caught:
        through("http://127.0.0.1:1", layer, METHODS["do_get"][0])
    assert "s3cret" not in str(caught.value) + repr(caught.value) + str(caught.value.__cause__)
    assert "s3cret" not in caplog.text


@clients
def test_no_token_leaves_this_machine_in_plaintext(through) -> None:
    issuer = Issuer("first")
    with pytest.raises(WorkerConnectError, match="insecure=True") as caught:
        through("http://192.0.2.1:50051", BearerToken(issuer), METHODS["do_get"][0])
    assert caught.value.url == "http://192.0.2.1:50051"
    assert issuer.asked == 0


@clients
def test_a_connect_waits_for_a_provider_no_longer_than_its_deadline(through, url) -> None:
    issuer = Issuer("first")
    issuer.may_answer.clear()
    connectors = {
        by_pyarrow: FlightConnector,
        by_grpcio: GrpcConnector,
        by_asyncio: resolver.aio.GrpcConnector,
    }
    connector = connectors[through](
        layers=[BearerToken(issuer, timeout=3_600)], connect_timeout=0.2
    )
    try:
        with pytest.raises((WorkerConnectError, TokenUnavailableError)):
            connected = connector.connect(url)
            if inspect.iscoroutine(connected):
                asyncio.run(connected)
    finally:
        issuer.may_answer.set()


def test_a_connect_of_pyarrows_takes_a_refusal_for_the_answer_it_is(url, door) -> None:
    door.accepted = set()
    FlightConnector(layers=[BearerToken(Issuer("first", "second"))]).connect(url)
    assert door.refused == 1  # a second call would have the time of the first once more


def test_a_provider_that_fails_refuses_the_call(url) -> None:
    issuer = Issuer("first")
    issuer.error = RuntimeError("down")
    with pytest.raises(WorkerConnectError, match="BearerToken layer refused"):
        FlightConnector(layers=[BearerToken(issuer)]).connect(url)


def test_an_outer_layer_sees_one_call_that_ends_well(url, door) -> None:
    metrics = CallMetrics()
    issuer = Issuer("first", "second")
    with GrpcConnector(layers=[metrics, BearerToken(issuer)]).connect(url) as client:
        door.accepted = {"second"}
        assert METHODS["do_get"][0](client) == 2
        assert METHODS["do_action"][0](client) == [b"hello", b"end"]
    seen = metrics.snapshot()
    assert {"DoGet", "DoAction"} <= {name.rpartition("/")[2] for name in seen}
    assert "UNAUTHENTICATED" not in str(seen)


def test_a_stream_that_nobody_reads_ends_once(url, door) -> None:
    metrics = CallMetrics()
    layers = [metrics, BearerToken(lambda: "first")]
    with GrpcConnector(layers=layers).connect(url) as client:
        door.accepted = set()
        stream = client.do_action(flight.Action("echo", b""))
        wait_until(lambda: door.refused)
        del stream
        wait_until(lambda: not any(figures.in_flight for figures in metrics.snapshot().values()))
        door.accepted = {"first"}
        assert METHODS["do_get"][0](client) == 2


def test_a_forked_child_asks_anew() -> None:
    import os

    issuer = Issuer("first")
    layer = BearerToken(issuer)
    assert sent(layer) == "first"
    layer._source._pid = os.getpid() + 1  # as a child finds it
    assert sent(layer) == "first"
    assert issuer.asked == 2


@pytest.mark.parametrize("same", [True, False])
def test_a_token_shorter_lived_than_refresh_before_is_not_renewed_by_every_call(same) -> None:
    asked = []

    def provider() -> Token:
        asked.append(1)
        return Token("same" if same else f"t{len(asked)}", time.time() + 3_600)

    layer = BearerToken(provider, refresh_before=7_200)
    for _ in range(50):
        sent(layer)
        wait_until(lambda: layer._source._asking is None)
    assert len(asked) == 2  # at first, and once ahead of its end


@pytest.mark.parametrize("method", ["list_flights", "do_action", "do_get"])
def test_a_call_refused_on_another_thread_than_the_connects_is_made_once_more(
    method, url, door
) -> None:
    use, expected = METHODS[method]
    layer = BearerToken(Issuer("first", "second"))
    client = FlightConnector(layers=[layer]).connect(url)
    door.accepted = {"second"}
    assert run_concurrently([lambda: use(client)]) == [expected]


def test_insecure_is_said_with_a_bool() -> None:
    with pytest.raises(TypeError, match="insecure"):
        BearerToken(lambda: "token", insecure="no")
