"""The names that users import: those promised, all of them, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import types

import pytest

import resolver
import resolver.aio

PROMISED = {
    "CHANNEL_OPTIONS",
    "GrpcConnector",
    "create_flight_client",
    "ChannelResolver",
    "Connector",
    "DefaultChannelResolver",
    "FlightBatches",
    "FlightConnector",
    "ForkedProcessError",
    "InvalidWorkerUrlError",
    "Keepalive",
    "LoadBalancing",
    "ResolverClosedError",
    "ResolverError",
    "ResolverStats",
    "Retry",
    "TlsConfig",
    "WorkerConnectError",
    "WorkerConnectTimeoutError",
    "default_channel_resolver",
    "read",
    "read_batches",
}
MODULES = ["resolver", "resolver.aio", "resolver.layers", "resolver.testing"]


def public(thing: object) -> set[str]:
    """Names without an underscore that are not modules."""
    return {
        name
        for name, value in vars(thing).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_what_is_promised_is_exported():
    assert set(resolver.__all__) == PROMISED


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_equals_what_is_there(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    # Some are there only once somebody asks for them.
    found = {name for name in module.__all__ if getattr(module, name) is not None}
    assert public(module) | found == set(module.__all__)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_a_public_name_is_documented(name):
    assert inspect.getdoc(getattr(resolver, name))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{kind.__module__}:{name}")
        for kind in (resolver.DefaultChannelResolver, resolver.aio.DefaultChannelResolver)
        for name in sorted(public(kind))
    ],
)
def test_a_public_method_is_documented(kind, name):
    member = inspect.getattr_static(kind, name)
    if isinstance(member, types.MemberDescriptorType):
        # An option: the class's own docstring explains it.
        assert name in inspect.getdoc(kind)
    else:
        assert inspect.getdoc(member)


def test_the_promised_members_are_there():
    members = {
        "clear", "close", "get_flight_client_for_url", "invalidate", "prefetch", "stats", "urls",
        "__contains__", "__enter__", "__exit__", "__len__",
    }  # fmt: skip
    assert members <= set(dir(resolver.DefaultChannelResolver))
    of_asyncio = {"aclose", "__aenter__", "__aexit__"}
    members = members - {"__enter__", "__exit__"} | of_asyncio
    assert members <= set(dir(resolver.aio.DefaultChannelResolver))


def test_both_resolvers_have_the_same_options():
    blocking, asyncio = (
        {
            name: option.default
            for name, option in inspect.signature(kind).parameters.items()
            if name != "connector"
        }
        for kind in (resolver.DefaultChannelResolver, resolver.aio.DefaultChannelResolver)
    )
    assert asyncio == blocking


def test_the_stats_are_those_promised():
    assert tuple(resolver.ResolverStats.__dataclass_fields__) == (
        "hits", "misses", "waits", "connects", "connect_failures", "evicted_idle",
        "evicted_capacity", "invalidated", "clients",
    )  # fmt: skip


def test_the_default_resolver_satisfies_the_protocol():
    assert issubclass(resolver.DefaultChannelResolver, resolver.ChannelResolver)
