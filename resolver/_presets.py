"""Keepalive, retry and load balancing by name, as gRPC's own channel arguments.

Values without behaviour: each preset says which channel arguments and which part of a
service config it means, and `channel_arguments` joins them. Both gRPC clients take the
result: pyarrow as ``generic_options``, grpcio as channel options. Nothing here imports
or talks to either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

ChannelArguments: TypeAlias = dict[str, int | str]

FLIGHT_SERVICE: Final = "arrow.flight.protocol.FlightService"

READS: Final = ("DoGet", "GetFlightInfo", "GetSchema", "ListFlights", "PollFlightInfo")
"""Flight methods that change nothing, so that asking twice is safe.

Not ``ListActions``, which is no less safe: a connector asks it to find out whether a worker
is there, and should hear a refusal at once.
"""

LONG_ERRORS: Final[ChannelArguments] = {"grpc.max_metadata_size": 1 << 20}
"""Lets errors through whatever their length. They come as headers, several times over and often
with a traceback; of those above 8 KB gRPC drops some and above 16 KB all, and says that a stream
was removed."""

_MAX_ATTEMPTS: Final = 5  # gRPC takes no more, whatever it is given
_NEVER_MS: Final = 2**31 - 1  # gRPC's own word for it
_MAX_SECONDS: Final = 86_400.0
# What gRPC's documentation suggests: five failures in a row stop retries, and ten successes
# give one failure back.
_THROTTLING: Final = {"maxTokens": 10, "tokenRatio": 0.1}
_CODES: Final = frozenset(
    {
        "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
        "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
        "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
        "UNAUTHENTICATED",
    }
)  # fmt: skip


@runtime_checkable
class Preset(Protocol):
    """What `channel_arguments` joins."""

    def channel_arguments(self) -> ChannelArguments:
        """Channel arguments of gRPC by name, the service config included."""
        ...

    def service_config(self) -> dict[str, Any]:
        """Its part of a gRPC service config, as JSON types; may be empty."""
        ...


@dataclass(frozen=True, kw_only=True)
class Keepalive:
    """HTTP/2 pings that find a dead connection, or keep a quiet one open.

    - ``ping_every``: seconds without anything received before a ping; ``None``: never.
    - ``ping_timeout``: seconds until an unanswered ping ends the connection, and with it
      the calls on it (``UNAVAILABLE``).
    - ``while_idle``: ping also while no call is under way.

    A ping costs 17 bytes each way and an interrupt of the worker's network thread. What it
    may cost is the connection: a gRPC server takes pings faster than its limit for an attack
    and ends the connection with ``too_many_pings``, calls under way included. The
    limit is 300 s during a call and two hours while idle, unless the server was told
    otherwise (``grpc.http2.min_ping_interval_without_data_ms``, and
    ``grpc.keepalive_permit_without_calls`` for idle pings). So anything faster than
    `cloud` is for servers that are known to permit it.
    """

    ping_every: float | None = None
    ping_timeout: float = 20.0
    while_idle: bool = False

    def __post_init__(self) -> None:
        """Refuse what gRPC would round or ignore."""
        if self.ping_every is not None:
            _check_seconds("ping_every", self.ping_every, at_least=1.0)
        _check_seconds("ping_timeout", self.ping_timeout, at_least=0.001)
        if not isinstance(self.while_idle, bool):
            raise TypeError("while_idle must be a bool")
        if self.ping_every is None and self.while_idle:
            raise ValueError("while_idle needs ping_every: there is nothing to send")

    @classmethod
    def off(cls) -> Keepalive:
        """No pings; gRPC's default, said explicitly."""
        return cls()

    @classmethod
    def cloud(cls, *, while_idle: bool = False) -> Keepalive:
        """A ping every 320 s: under the 350 s of load balancers, over the 300 s of servers.

        Keeps a long quiet call alive behind a balancer that forgets connections after 350 s.
        Safe with every gRPC server, unless ``while_idle``, which the server must permit.
        """
        return cls(ping_every=320.0, while_idle=while_idle)

    @classmethod
    def vigilant(cls) -> Keepalive:
        """A ping every 10 s during calls, 5 s to answer: a dead peer is noticed in 15 s.

        Only for servers that permit it (``grpc.http2.min_ping_interval_without_data_ms``
        of 10,000 or less); others end the call with ``too_many_pings`` within a minute.
        """
        return cls(ping_every=10.0, ping_timeout=5.0)

    def channel_arguments(self) -> ChannelArguments:
        """Channel arguments of gRPC by name."""
        if self.ping_every is None:
            return {"grpc.keepalive_time_ms": _NEVER_MS}
        return {
            "grpc.keepalive_time_ms": round(self.ping_every * 1_000),
            "grpc.keepalive_timeout_ms": round(self.ping_timeout * 1_000),
            # Newer gRPC takes the answer's time from here, and 60 s if it is not said.
            "grpc.http2.ping_timeout_ms": round(self.ping_timeout * 1_000),
            "grpc.keepalive_permit_without_calls": int(self.while_idle),
            # By default gRPC stops after two pings without data in between.
            "grpc.http2.max_pings_without_data": 0,
        }

    def service_config(self) -> dict[str, Any]:
        """Nothing: keepalive is no business of a service config."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Retry:
    """gRPC repeats a call that failed before the worker's answer began.

    - ``max_attempts``: the first one included; 2 to 5.
    - ``initial_backoff``, ``max_backoff``, ``multiplier``: seconds before the second
      attempt, at most, and growth; gRPC takes a fifth more or less at random.
    - ``codes``: names of the status codes that are tried again.
    - ``methods``: of the Flight service; by default those that change nothing. ``DoPut``,
      ``DoExchange`` and ``DoAction`` may have run before they failed: name them only if
      running twice is the same as once.

    Costs: a failure is heard after up to all backoffs, within the call's deadline; the
    request is kept until the answer begins (up to ``grpc.per_rpc_retry_buffer_size``, 256 KiB);
    a worker in trouble gets more calls. Against that, a channel stops retrying after five
    failures in a row until calls succeed again. A stream that has delivered a first message
    is never retried, and a worker that is gone is not replaced: for that, ``invalidate`` it.
    """

    max_attempts: int = 4
    initial_backoff: float = 0.1
    max_backoff: float = 1.0
    multiplier: float = 2.0
    codes: tuple[str, ...] = ("UNAVAILABLE",)
    methods: tuple[str, ...] = READS

    def __post_init__(self) -> None:
        """Refuse what gRPC would refuse when the first channel is made, or cap silently."""
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int):
            raise TypeError("max_attempts is a whole number")
        if not 2 <= self.max_attempts <= _MAX_ATTEMPTS:  # noqa: PLR2004 -- one is no retry
            raise ValueError(f"max_attempts is 2 to {_MAX_ATTEMPTS}, the first one included")
        _check_seconds("initial_backoff", self.initial_backoff, at_least=0.001)
        _check_seconds("max_backoff", self.max_backoff, at_least=0.001)
        _check_seconds("multiplier", self.multiplier, at_least=0.001)
        object.__setattr__(self, "codes", _names("codes", self.codes))
        object.__setattr__(self, "methods", _names("methods", self.methods))
        if not _CODES.issuperset(self.codes):
            unknown = ", ".join(sorted(set(self.codes) - _CODES))
            raise ValueError(f"no gRPC status that can be retried: {unknown}")

    def channel_arguments(self) -> ChannelArguments:
        """Channel arguments of gRPC by name."""
        return {"grpc.enable_retries": 1, **_as_argument(self.service_config())}

    def service_config(self) -> dict[str, Any]:
        """The retry policy of the methods, and the throttling of the channel."""
        policy = {
            "maxAttempts": self.max_attempts,
            "initialBackoff": _duration(self.initial_backoff),
            "maxBackoff": _duration(self.max_backoff),
            "backoffMultiplier": self.multiplier,
            "retryableStatusCodes": list(self.codes),
        }
        names = [{"service": FLIGHT_SERVICE, "method": method} for method in self.methods]
        return {
            "methodConfig": [{"name": names, "retryPolicy": policy}],
            "retryThrottling": dict(_THROTTLING),
        }


@dataclass(frozen=True, kw_only=True)
class LoadBalancing:
    """Which of the addresses that a worker's name resolves to get the calls.

    Means something where one URL stands for several servers by DNS; behind a balancer with
    one address of its own, ``connections_per_url`` does. A worker that holds partitions
    of a query has an address of its own, and no balancing at all.
    """

    policy: str = "pick_first"
    shuffle: bool = False

    def __post_init__(self) -> None:
        """Refuse a policy that gRPC does not have built in."""
        if self.policy not in ("pick_first", "round_robin"):
            raise ValueError(f"policy is 'pick_first' or 'round_robin', not {self.policy!r}")
        if not isinstance(self.shuffle, bool):
            raise TypeError("shuffle must be a bool")
        if self.shuffle and self.policy != "pick_first":
            raise ValueError("shuffle is for 'pick_first'; 'round_robin' uses every address")

    @classmethod
    def pick_first(cls, *, shuffle: bool = False) -> LoadBalancing:
        """One connection to the first address that answers; gRPC's default.

        With ``shuffle`` each channel takes the addresses in an order of its own.
        """
        return cls(shuffle=shuffle)

    @classmethod
    def round_robin(cls) -> LoadBalancing:
        """A connection to every address, calls in turn. Costs a connection per address."""
        return cls(policy="round_robin")

    def channel_arguments(self) -> ChannelArguments:
        """Channel arguments of gRPC by name."""
        return _as_argument(self.service_config())

    def service_config(self) -> dict[str, Any]:
        """The policy as a service config says it."""
        options = {"shuffleAddressList": True} if self.shuffle else {}
        return {"loadBalancingConfig": [{self.policy: options}]}


def channel_arguments(*presets: Preset | None) -> ChannelArguments:
    """Join presets, their service configs included; None is no preset.

    Raises ValueError when two of them say different things about the same.
    """
    arguments: ChannelArguments = {}
    config: dict[str, Any] = {}
    for preset in presets:
        if preset is not None:
            own = preset.channel_arguments()
            own.pop("grpc.service_config", None)
            _join(arguments, own)
            _join(config, preset.service_config())
    return {**arguments, **(_as_argument(config) if config else {})}


def check_preset(name: str, value: object, kind: type) -> None:
    """Refuse an option that is no preset of that kind."""
    if value is not None and not isinstance(value, kind):
        hint = f" (call it: {kind.__name__}())" if value is kind else ""
        raise TypeError(f"{name} is a {kind.__name__} or None, not {type(value).__name__}{hint}")


def _join(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if into.setdefault(key, value) != value:
            raise ValueError(f"two presets disagree about {key}")


def _as_argument(config: dict[str, Any]) -> ChannelArguments:
    return {"grpc.service_config": json.dumps(config, sort_keys=True)}


def _duration(seconds: float) -> str:
    """As JSON has it for protobuf, with the nine digits that gRPC takes after the point."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def _names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (tuple, list, set, frozenset)):
        raise TypeError(f"{name} is several names, as in {name}=('...',)")
    names = tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
    if not names or not all(isinstance(each, str) and each for each in names):
        raise ValueError(f"{name} needs at least one name, and names are not empty")
    return names


def _check_seconds(name: str, value: object, *, at_least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number, not {type(value).__name__}")
    if not at_least <= value <= _MAX_SECONDS:
        raise ValueError(f"{name} is from {at_least:g} to {_MAX_SECONDS:g}, not {value!r}")
