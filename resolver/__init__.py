"""Which client do I use for this worker URL? Connects once, reuses, stays right."""

import typing as _typing

from ._errors import (
    ForkedProcessError,
    InvalidWorkerUrlError,
    ResolverClosedError,
    ResolverError,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)
from ._flight import Connector, FlightConnector
from ._presets import Keepalive, LoadBalancing, Retry
from ._read import FlightBatches, read, read_batches
from ._resolver import (
    ChannelResolver,
    DefaultChannelResolver,
    ResolverStats,
    default_channel_resolver,
)
from ._tls import TlsConfig

if _typing.TYPE_CHECKING:
    from ._flight_calls import CHANNEL_OPTIONS
    from ._grpc import GrpcConnector, create_flight_client

__version__ = "0.1.0"

__all__ = [
    "CHANNEL_OPTIONS",
    "ChannelResolver",
    "Connector",
    "DefaultChannelResolver",
    "FlightBatches",
    "FlightConnector",
    "ForkedProcessError",
    "GrpcConnector",
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
    "create_flight_client",
    "default_channel_resolver",
    "read",
    "read_batches",
]


def __getattr__(name: str) -> _typing.Any:
    """What only users of grpcio need is imported when they ask for it."""
    if name == "CHANNEL_OPTIONS":
        from ._flight_calls import CHANNEL_OPTIONS  # noqa: PLC0415

        return CHANNEL_OPTIONS
    if name in {"GrpcConnector", "create_flight_client"}:
        from . import _grpc  # noqa: PLC0415

        return getattr(_grpc, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
