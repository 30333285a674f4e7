"""What the grpcio connectors, blocking and asyncio, have in common: options and errors.

Where a channel leads, with which arguments and credentials, and what a failed probe
means. No channel is made here. grpc is imported only once a channel is wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import unquote

from ._diagnosis import (
    Diagnosis,
    explain_unavailable,
    is_attempt_timeout,
    is_workers_answer,
    transport_detail,
    why_no_channel,
)
from ._errors import WorkerConnectError, WorkerConnectTimeoutError
from ._flight import (
    GenericOptions,
    check_presets,
    checked_options,
    checked_timeout,
    load_credentials,
    reconnect_options,
    shown_layer,
    shown_options,
)
from ._flight_calls import CHANNEL_OPTIONS, flight_error
from ._handshake import look_at_tls
from ._headers import redact
from ._presets import Keepalive, LoadBalancing, Retry, channel_arguments
from ._tls import TlsConfig, config_of

if TYPE_CHECKING:
    from ._headers import HeaderValue
    from ._pem import Credentials
    from ._urls import WorkerUrl

Layer = Callable[[Any], Any]
"""From channel to channel: an interceptor put around one, such as by ``grpc.intercept_channel``."""

_SHORTEST_CALL: Final = 0.001
_CLOCK_STEP: Final = 0.02
_UNREACHABLE: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})


def import_grpc() -> Any:
    """The ``grpc`` package. Raises ``ImportError`` that says what to install."""
    try:
        import grpc  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise ImportError(
            "this needs grpcio: install it with pip install 'resolver[grpc]' "
            "(it has no wheels for free-threaded Python; there, use FlightConnector)"
        ) from error
    return grpc


@dataclass(frozen=True, kw_only=True, repr=False)
class GrpcOptions:
    """How a channel to a worker is made. Immutable, comparable, safe to share.

    - ``connect_timeout``: seconds within which a connect returns or raises; at most a day.
    - ``tls``: a `TlsConfig`: certificates and keys from files or callables, which may change
      while the process runs. Instead of it, where they never change:
    - ``tls_root_certificates``: PEM of the authorities trusted for ``https`` workers;
      ``None`` means those of the system.
    - ``client_certificate``, ``client_key``: PEM, shown to workers that ask for them.
    - ``tls_override_hostname``: the name expected in the worker's certificate.
    - ``layers``: callables from channel to channel, put around it outermost first.
    - ``keepalive``, ``retry``, ``load_balancing``: presets; see docs/load-balancers.md.
    - ``generic_options``: gRPC channel arguments by name. They override the defaults
      here, which lift the limit of a message's size, give every client a connection of
      its own, and dial a lost worker again after 0.1 s and then at least every 0.6 s.

    TLS options are ignored for plaintext URLs, so one connector serves a mixed fleet.
    """

    connect_timeout: float = 5.0
    tls: TlsConfig | None = None
    tls_root_certificates: bytes | None = None
    client_certificate: bytes | None = None
    client_key: bytes | None = None
    tls_override_hostname: str | None = None
    layers: Sequence[Layer] = ()
    keepalive: Keepalive | None = None
    retry: Retry | None = None
    load_balancing: LoadBalancing | None = None
    generic_options: GenericOptions = ()
    _tls: TlsConfig = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Normalise what may be given in several forms and refuse what cannot work."""
        settle = object.__setattr__  # the class is frozen from here on
        settle(self, "connect_timeout", checked_timeout(self.connect_timeout))
        settle(self, "_tls", config_of(self))
        given: object = self.layers
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise TypeError("layers is a sequence of callables from channel to channel")
        settle(self, "layers", tuple(self.layers))
        for layer in self.layers:
            if not callable(layer):
                raise TypeError(f"a layer is a callable, not {type(layer).__name__}")
        settle(self, "generic_options", checked_options(self.generic_options))
        check_presets(self.keepalive, self.retry, self.load_balancing, self.generic_options)

    def __repr__(self) -> str:
        """Show what differs from the default, secrets masked."""
        return shown_options(self)

    def channel_options(self) -> list[tuple[str, int | str]]:
        """The arguments of a channel."""
        options: dict[str, int | str] = dict(CHANNEL_OPTIONS)
        options["grpc.use_local_subchannel_pool"] = 1
        options.update(reconnect_options(self.connect_timeout))
        options.update(channel_arguments(self.keepalive, self.retry, self.load_balancing))
        if self._tls.override_hostname is not None:
            options["grpc.ssl_target_name_override"] = self._tls.override_hostname
        options.update(dict(self.generic_options))
        return list(options.items())

    def credentials(self, worker: WorkerUrl, deadline: Deadline) -> Credentials | None:
        """What a TLS channel shows and trusts; ``None`` for a plaintext one."""
        return load_credentials(self._tls, worker, deadline.end)

    def look_at_tls(
        self, worker: WorkerUrl, credentials: Credentials | None, error: Any, deadline: Deadline
    ) -> Diagnosis | None:
        """What a failed probe has to do with TLS, if anything. Blocks until the deadline."""
        if error.code().name != "UNAVAILABLE" or is_workers_answer(error.details() or ""):
            return None
        left = deadline.end - time.monotonic()
        return look_at_tls(
            worker, error.details() or "", credentials, self._tls.override_hostname, left
        )

    def layered(self, channel: Any) -> Any:
        """``channel`` with the layers around it."""
        for layer in reversed(self.layers):
            channel = within(layer, channel)
        return channel


def within(layer: Layer, channel: Any) -> Any:
    """``channel`` with ``layer`` around it. Raises ``TypeError`` if that makes no channel."""
    layered = layer(channel)
    if not hasattr(layered, "unary_stream"):
        raise TypeError(
            f"the layer {shown_layer(layer)} returned {type(layered).__name__}, not a channel"
        )
    return layered


def channel_credentials(grpc: Any, credentials: Credentials) -> Any:
    """``credentials`` as a channel takes them."""
    return grpc.ssl_channel_credentials(
        credentials.root_certificates, credentials.client_key, credentials.client_certificate
    )


def target_of(worker: WorkerUrl) -> str:
    """The worker's address as a channel wants it."""
    address = worker.location.partition("://")[2]
    return f"unix:{unquote(address)}" if worker.scheme == "grpc+unix" else address


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a connect has to be over."""

    seconds: float
    end: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        return cls(seconds, time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds, a little more than none."""
        return max(self.end - time.monotonic(), _SHORTEST_CALL)

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.end - _CLOCK_STEP


def unreachable(
    worker: WorkerUrl,
    error: Any,
    deadline: Deadline,
    sent: Iterable[tuple[str, HeaderValue]] = (),
    finding: Diagnosis | None = None,
) -> WorkerConnectError | None:
    """What a probe that ended with this ``grpc.RpcError`` means; ``None``: a worker answered.

    ``finding`` is what a look at TLS found. The error has its cause.
    Neither holds what layers ``sent``, which a peer may repeat.
    """
    said = error.details() or ""
    explained = _explained(worker, error, deadline, lambda text: redact(text, sent), finding)
    if explained is None:
        return None
    explained.__cause__ = error
    if redact(said, sent) != said:
        made = type(flight_error(error))
        explained.__cause__ = made(redact(said, sent))
    return explained


def failed_in_layer(worker: WorkerUrl, failure: Exception) -> WorkerConnectError:
    """What a probe means that ended with an error which is none of grpc's."""
    if isinstance(failure, WorkerConnectError):
        return failure
    error = WorkerConnectError(
        f"Could not connect to worker {worker.key}: a layer refused the first call "
        f"({type(failure).__name__})",
        url=worker.key,
    )
    error.__cause__ = failure
    return error


def _explained(
    worker: WorkerUrl,
    error: Any,
    deadline: Deadline,
    mask: Callable[[str], str],
    finding: Diagnosis | None,
) -> WorkerConnectError | None:
    code, said = error.code().name, error.details() or ""
    refused = why_no_channel(said)
    if refused is not None:
        return WorkerConnectError(
            f"No channel could be made for worker {worker.key}: gRPC refused the channel arguments "
            f"({refused}); check generic_options",
            url=worker.key,
        )
    if code not in _UNREACHABLE or is_workers_answer(said):
        return None
    if code == "DEADLINE_EXCEEDED" and not deadline.passed:
        return WorkerConnectError(
            f"Could not connect to worker {worker.key}: the call was answered "
            f"DEADLINE_EXCEEDED before its deadline: {transport_detail(mask(said))}; "
            "check the worker and any proxy in front of it",
            url=worker.key,
        )
    if code == "DEADLINE_EXCEEDED" or is_attempt_timeout(said):
        return WorkerConnectTimeoutError(
            f"Worker {worker.key} did not answer within {deadline.seconds:g} s; check that it is "
            "not stopped or overloaded and that no firewall drops its packets, or raise "
            "connect_timeout",
            url=worker.key,
        )
    reason, remedy = finding or explain_unavailable(said, tls=worker.is_tls, redact=mask)
    return WorkerConnectError(
        f"Could not connect to worker {worker.key}: {reason}; {remedy}", url=worker.key
    )
