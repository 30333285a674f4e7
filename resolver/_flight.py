"""How a client for a worker is made: the ``Connector`` protocol and pyarrow's own.

A ``FlightClient`` is lazy, so constructing one says nothing about the worker. Here a
client is handed out only after the worker has answered a call on it, and every way of
not answering ends within the connect deadline. Nothing is cached here, and no client
is closed that somebody else may hold.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Final, NoReturn, Protocol, TypeAlias, runtime_checkable

import pyarrow as pa
from pyarrow import flight

from ._diagnosis import (
    explain_unavailable,
    is_attempt_timeout,
    is_workers_answer,
    transport_detail,
    why_no_channel,
)
from ._errors import WorkerConnectError, WorkerConnectTimeoutError
from ._fork import refuse_in_forked_child
from ._handshake import look_at_tls
from ._headers import CallHeadersFactory, Headers, normalize_headers, until
from ._pem import Credentials, UnusableCredentialsError
from ._presets import (
    LONG_ERRORS,
    Keepalive,
    LoadBalancing,
    Retry,
    channel_arguments,
    check_preset,
)
from ._retrying import RetryingFlightClient
from ._tls import TlsConfig, config_of
from ._urls import WorkerUrl, parse_worker_url

GenericOptions: TypeAlias = Mapping[str, int | str] | Iterable[tuple[str, int | str]]

MAX_CONNECT_TIMEOUT: Final = 86_400.0
"""Seconds. gRPC holds times in 32-bit milliseconds; a day is far from their end."""

_INITIAL_BACKOFF_MS: Final = 100
# A worker that came back is dialled again after at most this, plus gRPC's 20 % jitter.
_MAX_BACKOFF_MS: Final = 500
# gRPC gives up one connection attempt after this "minimum backoff"; a little longer than
# the call that waits for it, so that it is always the deadline that speaks.
_ATTEMPT_GRACE_MS: Final = 250
# gRPC's deadlines are in milliseconds of another clock.
_CLOCK_STEP: Final = 0.02
_SHORTEST_CALL: Final = 0.001
_INT32: Final = range(-(2**31), 2**31)


@runtime_checkable
class Connector(Protocol):
    """Makes the client of one worker.

    An optional attribute ``connect_timeout`` (seconds) tells the resolver how long
    callers that wait for another thread's connect may have to wait.
    """

    def connect(self, url: str) -> Any:
        """Return a new client for a canonical worker URL.

        May block up to the connector's own deadline and is called from any thread, for
        one URL by one thread at a time. Raises on failure; what is no ``ResolverError``
        reaches the caller as the cause of a ``WorkerConnectError``.
        """


class ClientLayer(Protocol):
    """What a connector needs of a layer; see ``resolver.layers``."""

    def middleware(self) -> flight.ClientMiddlewareFactory:
        """A factory for one client, or a TypeError where pyarrow cannot do it."""
        ...


@dataclass(frozen=True, kw_only=True, repr=False)
class FlightConnector:
    """Makes ``pyarrow.flight.FlightClient`` objects that are known to work.

    Immutable, comparable, and safe to share between threads; hashable and picklable
    when what it holds is. No secret appears in its ``repr``.

    - ``connect_timeout``: seconds from the call of ``connect`` until it returns or
      raises, whatever the peer does; at most a day.
    - ``headers``: sent with every call. A mapping or pairs (``bytes`` values under names
      that end in ``-bin``), or a callable that returns one. The callable is asked for
      every call, in the calling thread, and must bound its own time; when it fails, the
      call is refused with ``FlightInternalError`` instead of leaving without headers.
    - ``tls``: a `TlsConfig`: certificates and keys from files or callables, which may change
      while the process runs. Instead of it, where they never change:
    - ``tls_root_certificates``: PEM of the authorities trusted for ``https`` workers;
      ``None`` means those of the system.
    - ``client_certificate``, ``client_key``: PEM, shown to workers that ask for them.
    - ``tls_override_hostname``: the name expected in the worker's certificate.
    - ``disable_server_verification``: accept any certificate. For experiments only.
    - ``layers``: of ``resolver.layers``, around every call; the first is outermost. What
      pyarrow cannot do is a ``TypeError`` here.
    - ``middleware``: pyarrow ``ClientMiddlewareFactory`` objects, run after ``headers``
      and ``layers``.
    - ``write_size_limit_bytes``: soft limit of one written batch, in bytes; pyarrow
      raises ``FlightWriteSizeExceededError`` beyond it.
    - ``keepalive``, ``retry``, ``load_balancing``: presets, see `Keepalive`, `Retry` and
      `LoadBalancing`; ``None`` leaves the matter to gRPC's defaults.
    - ``generic_options``: gRPC channel arguments by name. They override presets and defaults
      here, which dial a lost worker again after 0.1 s and then at least every 0.6 s.

    TLS options are ignored for plaintext URLs, so one connector serves a mixed fleet.
    """

    connect_timeout: float = 5.0
    headers: Headers | None = None
    tls: TlsConfig | None = None
    tls_root_certificates: bytes | None = None
    client_certificate: bytes | None = None
    client_key: bytes | None = None
    tls_override_hostname: str | None = None
    disable_server_verification: bool = False
    layers: Sequence[ClientLayer] = ()
    middleware: Sequence[flight.ClientMiddlewareFactory] = ()
    write_size_limit_bytes: int | None = None
    keepalive: Keepalive | None = None
    retry: Retry | None = None
    load_balancing: LoadBalancing | None = None
    generic_options: GenericOptions = ()
    _tls: TlsConfig = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Normalise what may be given in several forms and refuse what cannot work."""
        settle = object.__setattr__  # the class is frozen from here on
        settle(self, "connect_timeout", checked_timeout(self.connect_timeout))
        if self.headers is not None and not callable(self.headers):
            settle(self, "headers", normalize_headers(self.headers))
        settle(self, "_tls", config_of(self))
        self._check_verification()
        settle(self, "layers", _checked_layers(self.layers))
        settle(self, "middleware", _checked_middleware(self.middleware))
        _check_write_limit(self.write_size_limit_bytes)
        settle(self, "generic_options", checked_options(self.generic_options))
        check_presets(self.keepalive, self.retry, self.load_balancing, self.generic_options)

    def connect(self, url: str) -> flight.FlightClient:
        """Return a new client on which the worker has just answered a call.

        Any answer of a Flight server counts, a refusal of the call included: it proves that
        the worker is reachable, and what it thinks of the caller is for the caller's own
        call to find out. (``UNAVAILABLE`` counts only with Arrow's own code on it; without,
        a proxy may have said it, and it is an error that quotes it.) The call is
        ``ListActions``, which every Flight server may be asked and which changes nothing.

        Raises ``InvalidWorkerUrlError``, ``WorkerConnectError``, its subclass
        ``WorkerConnectTimeoutError``, or ``ForkedProcessError``. Thread-safe; blocks
        without the GIL for up to ``connect_timeout`` seconds.
        """
        deadline = time.monotonic() + self.connect_timeout
        worker = parse_worker_url(url)
        refuse_in_forked_child(worker.key, deadline)
        check_worker(self.layers, worker)
        attempt = _Attempt(
            worker,
            deadline,
            load_credentials(self._tls, worker, deadline),
            None if self.headers is None else CallHeadersFactory(self.headers),  # type: ignore[arg-type]  # normalised above
            [layer.middleware() for layer in self.layers],
        )
        client = self._client(attempt)
        try:
            self._probe(client, attempt)
        except BaseException:
            # Nobody else has it; left open, gRPC would go on dialling a dead worker for
            # as long as the exception's traceback keeps the client alive.
            client.close()
            raise
        return client

    def __repr__(self) -> str:
        """Show what differs from the default, secrets masked."""
        return shown_options(self)

    def _client(self, attempt: _Attempt) -> flight.FlightClient:
        options = {
            **LONG_ERRORS,
            **reconnect_options(self.connect_timeout),
            **channel_arguments(self.keepalive, self.retry, self.load_balancing),
            **dict(self.generic_options),
        }
        tls: dict[str, Any] = {}
        credentials = attempt.credentials
        if credentials is not None:
            tls = {
                "tls_root_certs": credentials.root_certificates,
                "cert_chain": credentials.client_certificate,
                "private_key": credentials.client_key,
                "override_hostname": self._tls.override_hostname,
                "disable_server_verification": self.disable_server_verification,
            }
        headers = [] if attempt.headers is None else [attempt.headers]
        remedies = [each for each in attempt.layers if getattr(each, "has_remedy", False)]
        kind = partial(RetryingFlightClient, remedies=remedies) if remedies else flight.FlightClient
        try:
            return kind(
                attempt.worker.location,
                middleware=[*headers, *attempt.layers, *self.middleware],
                write_size_limit_bytes=self.write_size_limit_bytes,
                generic_options=list(options.items()),
                **tls,
            )
        except Exception as error:
            raise WorkerConnectError(
                f"No client could be made for worker {attempt.worker.key}: pyarrow refused the "
                f"options ({type(error).__name__}); check those given to FlightConnector",
                url=attempt.worker.key,
            ) from error

    def _probe(self, client: flight.FlightClient, attempt: _Attempt) -> None:
        worker = attempt.worker
        # wait_for_available() overshoots its timeout tenfold; the deadline of a call holds.
        remaining = max(attempt.deadline - time.monotonic(), _SHORTEST_CALL)
        unreachable = None
        try:
            with until(attempt.deadline):
                # Made once whoever the client is: a refusal is an answer, and there is no time.
                flight.FlightClient.list_actions(
                    client, flight.FlightCallOptions(timeout=remaining)
                )
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            failure = None if attempt.headers is None else attempt.headers.failure
            if failure is not None:
                _raise_headers_failed(worker, failure)
            for layer, factory in zip(self.layers, attempt.layers, strict=True):
                _check_refusal(worker, layer, getattr(factory, "failure", None))
            if isinstance(error, (flight.FlightTimedOutError, flight.FlightUnavailableError)):
                unreachable = None if is_workers_answer(str(error)) else error
            refused = why_no_channel(str(error))
            if refused is not None:
                raise WorkerConnectError(
                    f"No channel could be made for worker {worker.key}: gRPC refused the channel "
                    f"arguments ({refused}); check generic_options",
                    url=worker.key,
                ) from error
            if _never_left(error):
                raise WorkerConnectError(
                    f"No call to worker {worker.key} could be sent: gRPC found a header illegal; "
                    "check what the connector's middleware adds",
                    url=worker.key,
                ) from error
        if unreachable is not None:
            # Out here, so that words not yet masked are no context of what is raised.
            self._raise_unreachable(attempt, unreachable)

    def _raise_unreachable(self, attempt: _Attempt, error: Exception) -> NoReturn:
        worker, deadline = attempt.worker, attempt.deadline
        passed = time.monotonic() >= deadline - _CLOCK_STEP
        message = str(error)
        # What is known is recognised in the words as they came, the rest is shown masked.
        redact = _Redactor(attempt.headers, *attempt.layers).redact
        cause = error if redact(message) == message else type(error)(redact(message))
        if isinstance(error, flight.FlightTimedOutError) and not passed:
            raise WorkerConnectError(
                f"Could not connect to worker {worker.key}: the call was answered "
                f"DEADLINE_EXCEEDED before its deadline: {transport_detail(redact(message))}; "
                "check the worker and any proxy in front of it",
                url=worker.key,
            ) from cause
        # An attempt limited by the user's own generic_options ends as unavailable.
        if isinstance(error, flight.FlightTimedOutError) or is_attempt_timeout(message):
            within = f"{self.connect_timeout:g} s"
            if not passed:
                within = "one connection attempt as generic_options limit it"
            raise WorkerConnectTimeoutError(
                f"Worker {worker.key} did not answer within {within}; check that "
                "it is not stopped or overloaded and that no firewall drops its packets, or raise "
                "connect_timeout",
                url=worker.key,
            ) from cause
        left = deadline - time.monotonic()
        reason, remedy = look_at_tls(
            worker,
            message,
            attempt.credentials,
            self._tls.override_hostname,
            left,
            verify=not self.disable_server_verification,
        ) or explain_unavailable(message, tls=worker.is_tls, redact=redact)
        raise WorkerConnectError(
            f"Could not connect to worker {worker.key}: {reason}; {remedy}", url=worker.key
        ) from cause

    def _check_verification(self) -> None:
        if not isinstance(self.disable_server_verification, bool):
            raise TypeError("disable_server_verification must be a bool")
        if self.disable_server_verification and self._tls.verifies_by_own_roots:
            raise ValueError(
                "tls_root_certificates would be ignored with disable_server_verification; "
                "give one of them"
            )


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One connect: to whom, until when, and what was made for it alone."""

    worker: WorkerUrl
    deadline: float
    credentials: Credentials | None
    headers: CallHeadersFactory | None
    layers: list[flight.ClientMiddlewareFactory]


class _Redactor:
    """Masks what the connector's own headers and layers sent."""

    def __init__(self, *factories: Any) -> None:
        self._factories = [each for each in factories if hasattr(each, "redact")]

    def redact(self, text: str) -> str:
        for factory in self._factories:
            text = factory.redact(text)
        return text


def _raise_headers_failed(worker: WorkerUrl, failure: BaseException) -> NoReturn:
    if not isinstance(failure, Exception):
        raise failure
    raise WorkerConnectError(
        f"Could not connect to worker {worker.key}: the connector's headers callable failed "
        f"({type(failure).__name__}); no call is sent without its headers",
        url=worker.key,
    ) from failure


def _check_refusal(worker: WorkerUrl, layer: ClientLayer, refusal: BaseException | None) -> None:
    if refusal is None:
        return
    if not isinstance(refusal, Exception):
        raise refusal
    raise WorkerConnectError(
        f"Could not connect to worker {worker.key}: the connector's {type(layer).__name__} layer "
        f"refused the first call ({type(refusal).__name__})",
        url=worker.key,
    ) from refusal


def _never_left(error: Exception) -> bool:
    """Whether gRPC refused the call on this side, so that nobody can have answered."""
    return isinstance(error, flight.FlightInternalError) and str(error).endswith("Invalid metadata")


def check_worker(layers: Iterable[Any], worker: WorkerUrl) -> None:
    """Let each layer that cares refuse a worker, before anything is sent to it."""
    for layer in layers:
        check = getattr(layer, "check_worker", None)
        if check is not None:
            check(worker)


def load_credentials(tls: TlsConfig, worker: WorkerUrl, deadline: float) -> Credentials | None:
    """What a TLS connection to ``worker`` shows and trusts; ``None`` for a plaintext one."""
    if not worker.is_tls:
        return None
    try:
        return tls.credentials(max(deadline - time.monotonic(), 0))
    except TimeoutError as error:
        raise WorkerConnectTimeoutError(
            f"Could not connect to worker {worker.key} in time: {error}", url=worker.key
        ) from error
    except (OSError, UnusableCredentialsError) as error:
        raise WorkerConnectError(
            f"Could not connect to worker {worker.key}: the TLS credentials could not be "
            f"loaded: {error}",
            url=worker.key,
        ) from error


def shown_options(connector: Any) -> str:
    """The ``repr`` of a connector: what differs from the defaults, secrets masked."""
    shown = []
    for option in fields(connector):
        value = getattr(connector, option.name)
        if option.init and (option.name == "connect_timeout" or value != option.default):
            shown.append(f"{option.name}={masked(option.name, value)}")
    return f"{type(connector).__name__}({', '.join(shown)})"


def check_presets(
    keepalive: object, retry: object, load_balancing: object, options: GenericOptions
) -> None:
    """Refuse what is no preset, and presets that ``options`` would hide."""
    check_preset("keepalive", keepalive, Keepalive)
    check_preset("retry", retry, Retry)
    check_preset("load_balancing", load_balancing, LoadBalancing)
    if "grpc.service_config" in dict(options) and (retry is not None or load_balancing is not None):
        raise ValueError(
            "generic_options hold a grpc.service_config, which would hide retry and "
            "load_balancing; put their service_config() into it, or leave it out"
        )


def reconnect_options(connect_timeout: float) -> dict[str, int]:
    """The channel arguments that say how often a lost worker is dialled."""
    return {
        "grpc.initial_reconnect_backoff_ms": _INITIAL_BACKOFF_MS,
        "grpc.min_reconnect_backoff_ms": int(connect_timeout * 1_000) + _ATTEMPT_GRACE_MS,
        "grpc.max_reconnect_backoff_ms": _MAX_BACKOFF_MS,
    }


def checked_timeout(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"connect_timeout is a number of seconds, not {type(value).__name__}")
    # Comparing is exact for any int and false for a NaN; no conversion can overflow.
    if not 0 < value <= MAX_CONNECT_TIMEOUT:
        raise ValueError(f"connect_timeout must be above 0 and at most {MAX_CONNECT_TIMEOUT:g} s")
    return float(value)


def _checked_middleware(value: object) -> tuple[flight.ClientMiddlewareFactory, ...]:
    if not isinstance(value, Iterable):
        raise TypeError("middleware is a sequence of ClientMiddlewareFactory objects")
    factories = tuple(value)
    for factory in factories:
        if not isinstance(factory, flight.ClientMiddlewareFactory):
            raise TypeError(
                f"middleware needs ClientMiddlewareFactory objects, not {type(factory).__name__}"
            )
    return factories


def _checked_layers(value: object) -> tuple[ClientLayer, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError("layers is a sequence of layers, as of resolver.layers")
    layers = tuple(value)
    for layer in layers:
        if isinstance(layer, type) or not callable(getattr(layer, "middleware", None)):
            raise TypeError(
                f"{shown_layer(layer)} is no layer that pyarrow can use: it needs a method "
                "middleware(); a callable from channel to channel is for grpcio channels"
            )
        layer.middleware()  # says now what pyarrow cannot do
    return layers


def _check_write_limit(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("write_size_limit_bytes is a number of bytes or None")
    if value <= 0:
        raise ValueError("write_size_limit_bytes must be above 0; None means no limit")


def checked_options(value: GenericOptions) -> tuple[tuple[str, int | str], ...]:
    options: dict[str, int | str] = {}
    given: object = value
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError("generic_options is a mapping or (name, value) pairs")
    for pair in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:  # noqa: PLR2004 -- a pair
            raise TypeError("generic_options is a mapping or (name, value) pairs")
        name, option = pair
        if not isinstance(name, str):
            raise TypeError("generic_options are named by str")
        if not isinstance(option, (int, str)):
            raise TypeError(f"generic option {name!r} needs an int or a str")
        if isinstance(option, int) and option not in _INT32:
            raise ValueError(f"generic option {name!r} does not fit into 32 bits")
        options[name] = int(option) if isinstance(option, int) else option
    return tuple(sorted(options.items()))


def shown_layer(layer: object) -> str:
    """The ``repr`` of a layer of this package; of others, which may hold anything, the name."""
    kind = type(layer)
    if kind.__module__.startswith(f"{__package__}.layers."):
        return repr(layer)
    return f"<{getattr(layer, '__qualname__', kind.__qualname__)}>"


def masked(name: str, value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if name == "headers" and isinstance(value, tuple):
        return "{" + ", ".join(f"{header!r}: ***" for header, _ in value) + "}"
    if name == "headers":
        return f"<callable {getattr(value, '__qualname__', type(value).__qualname__)}>"
    if name == "generic_options" and isinstance(value, tuple):
        # A textual channel argument may be a proxy's URL with a password in it.
        shown = (f"{key!r}: {arg if isinstance(arg, int) else '***'}" for key, arg in value)
        return "{" + ", ".join(shown) + "}"
    if name in ("layers", "interceptors", "middleware") and isinstance(value, Sequence):
        return "(" + ", ".join(map(shown_layer, value)) + ")"
    return repr(value)
