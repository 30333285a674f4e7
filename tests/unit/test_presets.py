"""Presets as values: what they mean to gRPC, what they refuse, how they are joined."""

from __future__ import annotations

import json
import pickle

import pytest

from resolver import FlightConnector, Keepalive, LoadBalancing, Retry
from resolver._presets import READS, Preset, channel_arguments

ALL = [
    Keepalive.off(), Keepalive.cloud(), Keepalive.cloud(while_idle=True), Keepalive.vigilant(),
    Retry(), LoadBalancing.pick_first(), LoadBalancing.pick_first(shuffle=True),
    LoadBalancing.round_robin(),
]  # fmt: skip


def service_config(arguments):
    return json.loads(arguments["grpc.service_config"])


@pytest.mark.parametrize("preset", ALL, ids=repr)
def test_a_preset_is_a_value(preset):
    assert pickle.loads(pickle.dumps(preset)) == preset
    assert isinstance(preset, Preset)
    assert hash(preset) == hash(pickle.loads(pickle.dumps(preset)))
    with pytest.raises(AttributeError):
        preset.policy = "other"


def test_cloud_pings_are_slower_than_servers_limit_and_faster_than_balancers():
    arguments = Keepalive.cloud().channel_arguments()
    assert 300_000 < arguments["grpc.keepalive_time_ms"] < 350_000
    assert arguments["grpc.keepalive_permit_without_calls"] == 0
    assert arguments["grpc.http2.max_pings_without_data"] == 0
    idle = Keepalive.cloud(while_idle=True).channel_arguments()
    assert idle["grpc.keepalive_permit_without_calls"] == 1


def test_off_means_never():
    assert Keepalive.off().channel_arguments() == {"grpc.keepalive_time_ms": 2**31 - 1}


def test_retry_names_only_methods_that_change_nothing():
    (method_config,) = service_config(Retry().channel_arguments())["methodConfig"]
    named = {name["method"] for name in method_config["name"]}
    assert named == set(READS)
    assert not named & {"DoPut", "DoExchange", "DoAction", "Handshake"}
    assert {name["service"] for name in method_config["name"]} == {
        "arrow.flight.protocol.FlightService"
    }


def test_retry_writes_seconds_as_grpc_reads_them():
    policy = Retry(initial_backoff=0.05, max_backoff=3, max_attempts=5).service_config()
    policy = policy["methodConfig"][0]["retryPolicy"]
    assert policy["initialBackoff"] == "0.05s"
    assert policy["maxBackoff"] == "3s"
    assert policy["maxAttempts"] == 5


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(1 / 30, "0.033333333s"), (0.0012345678912, "0.001234568s"), (10, "10s"), (86_400, "86400s")],
)
def test_seconds_have_no_more_digits_than_grpc_reads(seconds, written):
    policy = Retry(initial_backoff=seconds).service_config()["methodConfig"][0]["retryPolicy"]
    assert policy["initialBackoff"] == written


def test_joined_presets_share_one_service_config():
    arguments = channel_arguments(Keepalive.cloud(), Retry(), None, LoadBalancing.round_robin())
    assert set(service_config(arguments)) == {
        "loadBalancingConfig",
        "methodConfig",
        "retryThrottling",
    }
    assert arguments["grpc.enable_retries"] == 1
    assert arguments["grpc.keepalive_time_ms"] == 320_000


def test_no_presets_are_no_arguments():
    assert channel_arguments() == {}
    assert channel_arguments(None, None) == {}
    assert channel_arguments(Keepalive.off()) == Keepalive.off().channel_arguments()


def test_presets_that_disagree_are_refused():
    with pytest.raises(ValueError, match="keepalive_time_ms"):
        channel_arguments(Keepalive.off(), Keepalive.cloud())
    with pytest.raises(ValueError, match="loadBalancingConfig"):
        channel_arguments(LoadBalancing.pick_first(), LoadBalancing.round_robin())


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: Keepalive(ping_every=0.5), ValueError, "ping_every"),
        (lambda: Keepalive(ping_every=float("nan")), ValueError, "ping_every"),
        (lambda: Keepalive(ping_every=True), TypeError, "ping_every"),
        (lambda: Keepalive(ping_every=30, ping_timeout=0), ValueError, "ping_timeout"),
        (lambda: Keepalive(while_idle=True), ValueError, "while_idle"),
        (lambda: Keepalive(ping_every=30, while_idle=1), TypeError, "while_idle"),
        (lambda: Retry(max_attempts=1), ValueError, "max_attempts"),
        (lambda: Retry(max_attempts=6), ValueError, "max_attempts"),
        (lambda: Retry(max_attempts=2.0), TypeError, "max_attempts"),
        (lambda: Retry(initial_backoff=0), ValueError, "initial_backoff"),
        (lambda: Retry(max_backoff="1"), TypeError, "max_backoff"),
        (lambda: Retry(multiplier=0), ValueError, "multiplier"),
        (lambda: Retry(codes="UNAVAILABLE"), TypeError, "codes"),
        (lambda: Retry(codes=()), ValueError, "codes"),
        (lambda: Retry(codes=("OK",)), ValueError, "OK"),
        (lambda: Retry(methods=("",)), ValueError, "methods"),
        (lambda: LoadBalancing(policy="least_request"), ValueError, "policy"),
        (lambda: LoadBalancing(shuffle=1), TypeError, "shuffle"),
        (lambda: LoadBalancing(policy="round_robin", shuffle=True), ValueError, "shuffle"),
        (lambda: FlightConnector(keepalive=Retry()), TypeError, "keepalive"),
        (lambda: FlightConnector(retry=Retry), TypeError, r"retry.*call it: Retry\(\)"),
        (lambda: FlightConnector(load_balancing="round_robin"), TypeError, "load_balancing"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make, error, named):
    with pytest.raises(error, match=named):
        make()


def test_a_service_config_of_ones_own_excludes_presets_that_need_one():
    own = {"grpc.service_config": "{}"}
    FlightConnector(keepalive=Keepalive.cloud(), generic_options=own)
    for preset in ({"retry": Retry()}, {"load_balancing": LoadBalancing.round_robin()}):
        with pytest.raises(ValueError, match="service_config"):
            FlightConnector(generic_options=own, **preset)


def test_a_connector_with_presets_stays_a_value():
    connector = FlightConnector(retry=Retry(), keepalive=Keepalive.cloud())
    assert pickle.loads(pickle.dumps(connector)) == connector
    assert connector != FlightConnector()
    assert "Retry(max_attempts=4" in repr(connector)
