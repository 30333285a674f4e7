"""Flight and worker URLs in asyncio."""
