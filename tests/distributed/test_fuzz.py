"""Ten thousand messages that nobody should send: clear errors, and a worker that stays up.

Most are small changes of messages that were right, which get further than noise does.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resolver.distributed import Worker, _wire
from resolver.distributed._wire import OutputKey, PartitionTicket, StageInput, TaskRequest
from tests.support.distributed import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]

SECRET = "what lies beside the exchange"
KEY = OutputKey("f" * 32, 1, 0, 0)  # no number below 1 << 100 is written so
EACH = settings(
    max_examples=3_500, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
CLEAN = (flight.FlightError, pa.ArrowInvalid, pa.ArrowKeyError)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 65), 1 << 65)
    | st.floats()
    | st.sampled_from(["../../secret", "/etc/passwd", "0" * 32, "\x00", "file:///", ""])
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory, planning):
    """A worker with the output of one finished task, and what it was asked."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "secret").write_text(SECRET)
    plan = planning.sql("SELECT l_orderkey, l_tax FROM lineitem WHERE l_tax > 0.07")
    request = TaskRequest(
        KEY, plan.execution_plan().to_bytes(planning), {}, wait=20.0, lease=3_600.0
    )
    with (
        Worker().into_flight_server(exchange_dir=folder / "exchange") as server,
        flight.connect(server.location) as client,
    ):
        act(client, _wire.EXECUTE_TASK, request.to_bytes())
        yield SimpleNamespace(client=client, request=request)
        # After all of it: the worker answers, still holds the output, and runs nothing.
        info = json.loads(act(client, _wire.WORKER_INFO, b""))
        assert client.do_get(flight.Ticket(PartitionTicket(KEY, 0).to_bytes())).read_all().num_rows
        assert info["pid"]
        eventually(lambda: json.loads(act(client, _wire.WORKER_INFO, b""))["running"] == 0)


def act(client, name, body):
    options = flight.FlightCallOptions(timeout=30)
    return b"".join(
        r.body.to_pybytes() for r in client.do_action(flight.Action(name, body), options)
    )


def refused_or_harmless(call):
    """Whatever comes back is an answer or a clean error, and tells no secret."""
    kind: type[BaseException] | None = None
    try:
        told = repr(call())
    except CLEAN as error:
        told, kind = str(error), type(error)
    assert kind not in (flight.FlightInternalError, flight.FlightTimedOutError), told
    assert "Traceback" not in told.partition("Detail:")[0]
    assert SECRET not in told


def mutated(data, draw):
    """``data`` with a few bytes changed, cut off, doubled or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[at:]
            case 2:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case _:
                data[at:at] = draw(st.binary(max_size=8))
    return bytes(data)


@EACH
@given(st.data())
def test_tickets(served, data):
    ticket = PartitionTicket(KEY, 0).to_bytes()
    if data.draw(st.booleans()):
        change = data.draw(st.dictionaries(st.sampled_from([*json.loads(ticket), "path"]), JSON))
        ticket = json.dumps({**json.loads(ticket), **change}).encode()
    else:
        ticket = mutated(ticket, data.draw)
    refused_or_harmless(lambda: served.client.do_get(flight.Ticket(ticket)).read_all().num_rows)


@EACH
@given(st.data())
def test_actions(served, data):
    """Any action but for running plans, with a body meant for some action, or for none."""
    bodies = [
        KEY.query.encode(),
        _wire.AwaitRequest(OutputKey("1" * 32, 1, 0, 0), 0.0).to_bytes(),
        _wire.ReleaseRequest((OutputKey("1" * 32, 1, 0, 0),)).to_bytes(),
        served.request.to_bytes()[:200],
        b"",
    ]
    name = data.draw(
        st.sampled_from(
            [
                _wire.AWAIT_TASK,
                _wire.RELEASE_OUTPUTS,
                _wire.RENEW_LEASE,
                _wire.WORKER_INFO,
                _wire.HEALTH,
            ]
        )
        | st.text(max_size=8)
    )
    body = mutated(data.draw(st.sampled_from(bodies)), data.draw)
    refused_or_harmless(lambda: act(served.client, name, body))


@EACH
@given(st.data())
def test_tasks(served, data):
    """Requests with other fields, other inputs and other plan bytes."""
    number = data.draw(st.integers(0, 1 << 100))
    key = OutputKey(f"{number:032x}"[-32:], 1, 0, 0)
    inputs = ()
    if data.draw(st.booleans()):
        inputs = (
            StageInput(data.draw(st.integers(0, 3)), data.draw(st.binary(max_size=4)), ((),)),
        )
    plan = served.request.plan
    if data.draw(st.booleans()):
        plan = mutated(plan, data.draw)
    request = TaskRequest(key, plan, {}, inputs, wait=20.0).to_bytes()
    if data.draw(st.booleans()):
        line, _, body = request.partition(b"\n")
        change = data.draw(st.dictionaries(st.sampled_from(sorted(json.loads(line))), JSON))
        change.pop("query", None)
        request = json.dumps({**json.loads(line), **change}).encode() + b"\n" + body
    refused_or_harmless(lambda: act(served.client, _wire.EXECUTE_TASK, request))
    refused_or_harmless(lambda: act(served.client, _wire.RELEASE_QUERY, key.query.encode()))


def test_a_replayed_task_is_refused(served):
    with pytest.raises(CLEAN):
        act(served.client, _wire.EXECUTE_TASK, served.request.to_bytes())


@pytest.mark.parametrize("size", [1 << 21, (1 << 26) + 1])
def test_huge_messages_are_refused(served, size):
    for body in (b"x" * size, b'{"query":"' + b"0" * size + b'"}\n'):
        with pytest.raises(CLEAN):
            act(served.client, _wire.EXECUTE_TASK, body)
    with pytest.raises(CLEAN):
        served.client.do_get(flight.Ticket(b"[" * size)).read_all()
