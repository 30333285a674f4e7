"""Which client do I use for this worker URL? The asyncio twin of `resolver`."""
