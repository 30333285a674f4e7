"""What a layer is: something that sees each call begin and end, whatever the client.

A layer says once what it does to a call; this package's adapters put it around calls of
grpcio channels (`_blocking`), of ``grpc.aio`` channels (`_aio`) and of pyarrow clients
(`_pyarrow`). Imports none of the three, and knows no message types: bodies are opaque.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyarrow import flight

    from ._call import Call, End


class Layer:
    """Base of all layers; a subclass defines `begin` and works with every client.

    ``layer(channel)`` puts it around a ``grpc.Channel``, as ``grpc.intercept_channel`` does;
    `middleware` makes it a pyarrow client middleware; `aio_interceptors` are for a
    ``grpc.aio`` channel, at its creation. Thread-safe, as its `begin` must be.
    """

    sets_timeout: ClassVar[bool] = False
    """Whether `begin` sets ``timeout``, which pyarrow's middleware cannot do."""

    def begin(self, call: Call) -> End | None:
        """See a call before it is sent, on the thread that makes it.

        Returns what to do when it ends: once, on any thread, and never before; what that
        raises is only logged. What this raises refuses the call. A grpcio call raises it to
        its caller (that of a stream when it is first read); pyarrow cannot, and raises
        ``FlightInternalError``.
        """
        raise NotImplementedError

    async def begin_async(self, call: Call) -> End | None:
        """As `begin`, for asyncio. Override it where `begin` may block."""
        return self.begin(call)

    def bind(self) -> Layer:
        """The layer for one more channel or client: itself, unless it counts per channel."""
        return self

    def __call__(self, channel: Any) -> Any:
        """A ``grpc.Channel`` whose calls go through this layer and then `channel`.

        Raises TypeError for what is no blocking channel, ImportError without grpcio.
        """
        from ._blocking import intercept  # noqa: PLC0415 -- grpc only when it is used

        return intercept(channel, self.bind())

    def middleware(self) -> flight.ClientMiddlewareFactory:
        """A pyarrow middleware factory for one client; TypeError where pyarrow cannot."""
        if self.sets_timeout:
            raise TypeError(
                f"pyarrow has no way for a {type(self).__name__} layer to give calls a timeout; "
                "pass FlightCallOptions(timeout=...) with each call, or use a grpcio channel"
            )
        from ._pyarrow import LayerFactory  # noqa: PLC0415 -- pyarrow only when it is used

        return LayerFactory(self.bind())

    def aio_interceptors(self) -> list[Any]:
        """Interceptors for ``grpc.aio.insecure_channel(..., interceptors=...)``, one channel's.

        Of several layers, pass the outermost's first. ImportError without grpcio.
        """
        from ._aio import interceptors  # noqa: PLC0415 -- grpc only when it is used

        return interceptors(self.bind())


def apply_layers(channel: Any, layers: Iterable[Callable[[Any], Any]]) -> Any:
    """Put `layers` around a blocking channel; the first is outermost, seen first by a call.

    A layer is any callable from channel to channel.
    """
    for layer in reversed(list(layers)):
        channel = layer(channel)
    return channel
