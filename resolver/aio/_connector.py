"""How an asyncio Flight client for a worker is made, over ``grpc.aio``.

A client is handed out only after the worker has answered a call on it, within the connect
deadline. grpc is imported when the first client is made, and not before.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resolver._flight import check_worker
from resolver._flight_calls import stub
from resolver._fork import refuse_in_forked_child
from resolver._grpc_options import (
    Deadline,
    GrpcOptions,
    channel_credentials,
    failed_in_layer,
    import_grpc,
    target_of,
    unreachable,
    within,
)
from resolver._headers import listen_to_headers, until
from resolver._urls import WorkerUrl, parse_worker_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resolver._pem import Credentials

    from ._client import FlightServiceClient

__all__ = ["GrpcConnector", "create_flight_client"]


def create_flight_client(channel: Any) -> FlightServiceClient:
    """A Flight client over a ``grpc.aio.Channel``, which stays yours to close."""
    from ._client import FlightServiceClient  # noqa: PLC0415 -- see above

    return FlightServiceClient(channel)


@dataclass(frozen=True, kw_only=True, repr=False)
class GrpcConnector(GrpcOptions):
    """Makes asyncio ``FlightServiceClient`` objects that are known to work.

    Besides the options of the blocking one:

    - ``interceptors``: those of ``grpc.aio``, which a channel can be given only at first.
    """

    interceptors: Sequence[Any] = ()

    async def connect(self, url: str) -> FlightServiceClient:
        """A new client, of the running event loop, on which the worker has just answered.

        Any answer of a Flight server counts, a refusal included. Raises
        ``InvalidWorkerUrlError``, ``WorkerConnectError``, its subclass
        ``WorkerConnectTimeoutError``, ``ForkedProcessError``, or ``ImportError`` without
        grpcio. Takes up to ``connect_timeout`` seconds.
        """
        from ._client import FlightServiceClient  # noqa: PLC0415 -- see above

        deadline = Deadline.after(self.connect_timeout)
        worker = parse_worker_url(url)
        refuse_in_forked_child(worker.key, deadline.end)
        check_worker(self.layers, worker)
        grpc = import_grpc()
        credentials = None
        if worker.is_tls:  # files may be slow, and callables block
            credentials = await asyncio.to_thread(self.credentials, worker, deadline)
        channel = self._channel(grpc, worker, credentials)
        try:
            layered = self._layered(channel)
            await self._probe(grpc, layered, worker, credentials, deadline)
        except BaseException:
            await channel.close()
            raise
        return FlightServiceClient(layered)

    def _channel(self, grpc: Any, worker: WorkerUrl, credentials: Credentials | None) -> Any:
        target, options = target_of(worker), self.channel_options()
        interceptors = [
            interceptor
            for layer in self.layers
            if hasattr(layer, "aio_interceptors")
            for interceptor in layer.aio_interceptors()
        ]
        interceptors += self.interceptors
        if interceptors:
            from ._refusals import KeepsStatus  # noqa: PLC0415 -- grpc only when it is used

            interceptors.append(KeepsStatus())
        if credentials is None:
            return grpc.aio.insecure_channel(target, options, interceptors=interceptors)
        own = channel_credentials(grpc, credentials)
        return grpc.aio.secure_channel(target, own, options, interceptors=interceptors)

    def _layered(self, channel: Any) -> Any:
        for layer in reversed(self.layers):
            if not hasattr(layer, "aio_interceptors"):  # else it is in the channel already
                channel = within(layer, channel)
        return channel

    async def _probe(
        self,
        grpc: Any,
        channel: Any,
        worker: WorkerUrl,
        credentials: Credentials | None,
        deadline: Deadline,
    ) -> None:
        error = None
        with until(deadline.end), listen_to_headers() as sent:
            try:
                async for _ in stub(channel, "list_actions")(b"", timeout=deadline.left):
                    pass
            except grpc.RpcError as refusal:
                finding = await asyncio.to_thread(
                    self.look_at_tls, worker, credentials, refusal, deadline
                )
                error = unreachable(worker, refusal, deadline, sent, finding)
            except Exception as failure:  # noqa: BLE001 -- a layer may raise anything
                error = failed_in_layer(worker, failure)
        if error is not None:
            raise error  # out here, so that words not masked are no context of it
