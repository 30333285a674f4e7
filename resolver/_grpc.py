"""Blocking Flight clients over grpcio channels, for users of interceptors and the like.

``GrpcConnector`` is to a resolver what ``FlightConnector`` is; ``create_flight_client``
wraps a channel that somebody else made. What such a client does is ``_grpc_client.py``'s
business. grpc is imported when the first client is made, and not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._flight import check_worker
from ._flight_calls import stub
from ._fork import refuse_in_forked_child
from ._grpc_options import (
    Deadline,
    GrpcOptions,
    channel_credentials,
    failed_in_layer,
    import_grpc,
    target_of,
    unreachable,
)
from ._headers import listen_to_headers, until
from ._urls import WorkerUrl, parse_worker_url

if TYPE_CHECKING:
    from ._grpc_client import FlightServiceClient
    from ._pem import Credentials

__all__ = ["GrpcConnector", "create_flight_client"]


def create_flight_client(channel: Any) -> FlightServiceClient:
    """A Flight client over a ``grpc.Channel``, which stays yours to close.

    Make the channel with ``resolver.CHANNEL_OPTIONS`` among its options: they lift gRPC's
    limit of 4 MB per message, which a batch soon passes.
    """
    from ._grpc_client import FlightServiceClient  # noqa: PLC0415 -- see above

    return FlightServiceClient(channel)


@dataclass(frozen=True, kw_only=True, repr=False)
class GrpcConnector(GrpcOptions):
    """Makes ``FlightServiceClient`` objects that are known to work. Thread-safe."""

    def connect(self, url: str) -> FlightServiceClient:
        """A new client on which the worker has just answered a call.

        Any answer of a Flight server counts, a refusal included. Raises
        ``InvalidWorkerUrlError``, ``WorkerConnectError``, its subclass
        ``WorkerConnectTimeoutError``, ``ForkedProcessError``, or ``ImportError`` without
        grpcio. Blocks for up to ``connect_timeout`` seconds.
        """
        from ._grpc_client import FlightServiceClient  # noqa: PLC0415 -- see above

        deadline = Deadline.after(self.connect_timeout)
        worker = parse_worker_url(url)
        refuse_in_forked_child(worker.key, deadline.end)
        check_worker(self.layers, worker)
        grpc = import_grpc()
        credentials = self.credentials(worker, deadline)
        channel = self._channel(grpc, worker, credentials)
        try:
            layered = self.layered(channel)
            self._probe(grpc, layered, worker, credentials, deadline)
        except BaseException:
            channel.close()
            raise
        return FlightServiceClient(layered, close=channel.close)

    def _channel(self, grpc: Any, worker: WorkerUrl, credentials: Credentials | None) -> Any:
        target, options = target_of(worker), self.channel_options()
        if credentials is None:
            return grpc.insecure_channel(target, options)
        return grpc.secure_channel(target, channel_credentials(grpc, credentials), options)

    def _probe(
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
                for _ in stub(channel, "list_actions")(b"", timeout=deadline.left):
                    pass
            except grpc.RpcError as refusal:
                finding = self.look_at_tls(worker, credentials, refusal, deadline)
                error = unreachable(worker, refusal, deadline, sent, finding)
            except Exception as failure:  # noqa: BLE001 -- a layer may raise anything
                error = failed_in_layer(worker, failure)
        if error is not None:
            raise error  # out here, so that words not masked are no context of it
