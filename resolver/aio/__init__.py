"""Which client do I use for this worker URL? The asyncio twin of `resolver`."""

from ._resolver import ChannelResolver, Connector, DefaultChannelResolver

__all__ = ["ChannelResolver", "Connector", "DefaultChannelResolver"]
