"""Which client do I use for this worker URL? The asyncio twin of `resolver`."""

from ._client import FlightServiceClient
from ._connector import GrpcConnector, create_flight_client
from ._read import FlightBatches, read
from ._resolver import ChannelResolver, Connector, DefaultChannelResolver

__all__ = [
    "ChannelResolver",
    "Connector",
    "DefaultChannelResolver",
    "FlightBatches",
    "FlightServiceClient",
    "GrpcConnector",
    "create_flight_client",
    "read",
]
