"""Which client do I use for this worker URL? Connects once, reuses, stays right."""

from ._errors import (
    ForkedProcessError,
    InvalidWorkerUrlError,
    ResolverClosedError,
    ResolverError,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)
from ._flight import Connector, FlightConnector
from ._flight_calls import CHANNEL_OPTIONS
from ._grpc import GrpcConnector, create_flight_client
from ._presets import Keepalive, LoadBalancing, Retry
from ._read import FlightBatches, read, read_batches
from ._resolver import (
    ChannelResolver,
    DefaultChannelResolver,
    ResolverStats,
    default_channel_resolver,
)

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
    "WorkerConnectError",
    "WorkerConnectTimeoutError",
    "create_flight_client",
    "default_channel_resolver",
    "read",
    "read_batches",
]
