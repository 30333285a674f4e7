"""Which client do I use for this worker URL? The asyncio twin of `resolver`."""

from ._client import FlightServiceClient
from ._connector import GrpcConnector, create_flight_client
from ._resolver import ChannelResolver, Connector, DefaultChannelResolver

__all__ = [
    "ChannelResolver",
    "Connector",
    "DefaultChannelResolver",
    "FlightServiceClient",
    "GrpcConnector",
    "create_flight_client",
]
