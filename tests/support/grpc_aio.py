"""A small asyncio connector over grpc.aio, for tests of the resolver beneath it.

It knows one Flight method, enough to tell which connection serves which loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

_METHOD = "/arrow.flight.protocol.FlightService/DoAction"


class ActionClient:
    """Calls Flight actions on one channel, as raw protobuf; opaque to the resolver."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._call = channel.unary_stream(_METHOD)

    def stream(self, action: bytes, body: bytes = b"") -> AsyncIterator[bytes]:
        """The bodies of an action's results."""
        request = b"\x0a" + bytes([len(action)]) + action + b"\x12" + bytes([len(body)]) + body
        return self._bodies(self._call(request))

    async def action(self, action: bytes, body: bytes = b"") -> bytes:
        """The body of an action's only result."""
        (result,) = [each async for each in self.stream(action, body)]
        return result

    async def _bodies(self, call: grpc.aio.UnaryStreamCall) -> AsyncIterator[bytes]:
        async for result in call:
            assert result[0] == 0x0A  # field 1, and shorter than 128 bytes
            yield result[2 : 2 + result[1]]


class ActionConnector:
    """Connects to ``http://`` workers within ``connect_timeout`` seconds."""

    def __init__(self, connect_timeout: float = 5.0) -> None:
        self.connect_timeout = connect_timeout

    async def connect(self, url: str) -> ActionClient:
        channel = grpc.aio.insecure_channel(
            url.removeprefix("http://"), options=[("grpc.use_local_subchannel_pool", 1)]
        )
        try:
            async with asyncio.timeout(self.connect_timeout):
                await channel.channel_ready()
        except BaseException:
            await channel.close()
            raise
        return ActionClient(channel)
