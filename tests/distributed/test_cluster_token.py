"""A cluster with a token: who has it gets in, workers included, and nobody reads it anywhere."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow.flight as flight
import pytest

from resolver import DefaultChannelResolver, FlightConnector
from resolver.distributed import DistributedError, LocalCluster, SessionStateBuilder
from resolver.distributed._calls import worker_info
from tests.support.distributed import DirectResolver, rows

JOIN = "SELECT o_orderkey, o_comment, c_comment FROM orders JOIN customer ON o_custkey = c_custkey"


@pytest.fixture(scope="module")
def guarded():
    with LocalCluster(workers=2, token=True) as cluster:
        yield cluster


def connector(token):
    return FlightConnector(headers={"authorization": f"Bearer {token}"})


def test_workers_show_one_another_the_token(guarded, register, single):
    builder = SessionStateBuilder()
    for name in (
        "broadcast_threshold",
        "bytes_per_task",
        "scan_bytes_per_task",
        "coordinator_threshold",
    ):
        builder.with_distributed_option(name, 0)
    session = guarded.session(builder=builder)
    register(session)
    head = session._start(session.sql(JOIN))
    batches = [batch.to_pyarrow() for batch in head.stream()]
    head.close()
    found = sorted(repr(list(row.values())) for batch in batches for row in batch.to_pylist())
    assert found == rows(single.sql(JOIN).to_arrow_table())
    assert sum(stage.fetched_bytes for stage in head.report.stages.values()) > 0
    with DefaultChannelResolver(connector(guarded.token)) as mine:
        infos = [worker_info(mine, url) for url in guarded.get_urls()]
    assert all(info["resolver_stats"]["connects"] >= 1 for info in infos)


@pytest.mark.parametrize("token", [None, "", "wrong", "x" * 43])
def test_without_the_token_every_call_is_refused(guarded, token):
    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    options = flight.FlightCallOptions(headers=headers, timeout=10)
    for url in guarded.get_urls():
        with flight.connect(url.replace("http", "grpc")) as client:
            for call in (
                lambda: client.list_actions(options),
                lambda: list(client.list_flights(options=options)),
                lambda: list(client.do_action(flight.Action("resolver.health", b""), options)),
                lambda: client.do_get(flight.Ticket(b"ticket"), options).read_all(),
            ):
                with pytest.raises(flight.FlightUnauthenticatedError) as refused:
                    call()
                assert guarded.token not in str(refused.value)


@pytest.mark.parametrize(
    "resolver", [DirectResolver, lambda: DefaultChannelResolver(connector("x"))]
)
def test_a_session_without_the_token_is_told_what_to_check(guarded, register, resolver):
    session = guarded.session(resolver())
    register(session)
    with pytest.raises(DistributedError, match="did not let us in") as refused:
        session.sql("SELECT * FROM orders").collect()
    assert "token" in str(refused.value)
    assert refused.value.url in guarded.get_urls()


def test_the_token_is_in_no_log_repr_error_or_command_line(guarded, register, caplog, capfd):
    token = guarded.token
    assert len(token) >= 32
    caplog.set_level(logging.DEBUG)
    session = guarded.session()
    register(session)
    frame = session.sql(JOIN)
    frame.collect()
    errors = []
    for attempt in (
        lambda: session.sql("SELECT CAST(o_comment AS INT) FROM orders").collect(),
        lambda: guarded.session(DirectResolver()).sql("SELECT 1").explain(format="no such"),
        lambda: FlightConnector(headers={"authorization": f"Bearer {token}\n"}),
        lambda: DefaultChannelResolver(connector(token)).get_flight_client_for_url("http://"),
    ):
        with pytest.raises(Exception) as raised:  # whatever it is
            attempt()
        errors += [str(raised.value), repr(raised.value)]
    assert len(errors) == 8
    state = session.state
    shown = [
        repr(x) for x in (guarded, session, state, state.channel_resolver, frame, connector(token))
    ]
    printed = "".join(capfd.readouterr())
    logs = [path.read_text() for path in guarded._directory.path.glob("worker-*.log")]
    assert len(logs) == 2
    lines = [Path(f"/proc/{p.pid}/cmdline").read_bytes().decode() for p in guarded.processes]
    assert all("worker" in line for line in lines)
    for text in (*errors, *shown, *logs, *lines, printed, caplog.text):
        assert token not in text
