"""What to do with the endpoints of a `FlightInfo`: pure decisions, no call and no thread.

Which locations an endpoint has and in which order they are tried, whether it must be
renewed and how that is asked, whether its schema is the promised one, what an error says
about a location. The blocking reader (`_read.py`) and its asyncio twin both decide here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pyarrow import flight

from ._diagnosis import is_workers_answer
from ._errors import InvalidWorkerUrlError, ResolverError, WorkerConnectError
from ._urls import mask_url, parse_worker_url

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    import pyarrow as pa

Place: TypeAlias = str | None
"""A canonical worker URL, or None for the connection that the info came from."""

RENEW_ACTION: Final = "RenewFlightEndpoint"
_REUSE_SCHEME: Final = "arrow-flight-reuse-connection:"
_ENDPOINT_FIELD: Final = b"\x0a"  # RenewFlightEndpointRequest.endpoint = 1, length-delimited
_VARINT_MORE: Final = 0x80


class SchemaMismatchError(ResolverError, ValueError):
    """An endpoint streams another schema than its `FlightInfo` promised."""


def endpoint_name(index: int, count: int) -> str:
    """How messages call an endpoint; counted from 1, its ticket may be a secret."""
    return f"endpoint {index + 1} of {count}"


def places_of(
    endpoint: flight.FlightEndpoint,
    *,
    name: str,
    origin: str | None,
    allow: Callable[[str], bool] | None,
) -> list[Place]:
    """Where `endpoint` can be read, in the server's order and each place once.

    No location, or ``arrow-flight-reuse-connection://?``, means `origin`, the URL that the
    info came from. `allow` is asked for every other location. What is no worker URL, is not
    allowed, or means an origin that is not known, is left out. Raises ResolverError, with
    the reason for each, when nothing is left.
    """
    usable: list[Place] = []
    refused = []
    for uri in [location.uri for location in endpoint.locations] or [_REUSE_SCHEME.encode()]:
        text = uri.decode("utf-8", "backslashreplace")
        place: Place = None
        if text.lower().startswith(_REUSE_SCHEME):
            if origin is None:
                refused.append("it is where the info came from; pass that server's url=")
                continue
        else:
            try:
                place = parse_worker_url(text).key
            except InvalidWorkerUrlError as error:
                refused.append(str(error))
                continue
            if allow is not None and not allow(place):
                refused.append(f"allow= refused {mask_url(place)}")
                continue
        if place not in usable:
            usable.append(place)
    if not usable:
        raise ResolverError(f"No location of {name} can be used: {'; '.join(refused)}")
    return usable


def in_order_of_trial(places: Iterable[Place], failed: Collection[Place]) -> list[Place]:
    """`places` as they stand, those known to have failed last."""
    return sorted(places, key=lambda place: place in failed)


def has_expired(endpoint: flight.FlightEndpoint, now: int) -> bool:
    """Whether `endpoint` is not valid any more at `now`, in nanoseconds since 1970 (UTC)."""
    expires = endpoint.expiration_time
    return expires is not None and int(expires.value) <= now


def renewal_of(endpoint: flight.FlightEndpoint) -> flight.Action:
    """The action that asks for more time. pyarrow has no type for its request."""
    message = endpoint.serialize()
    length = bytearray()
    left = len(message)
    while left >= _VARINT_MORE:
        length.append(left & 0x7F | _VARINT_MORE)
        left >>= 7
    length.append(left)
    return flight.Action(RENEW_ACTION, _ENDPOINT_FIELD + bytes(length) + message)


def renewed_endpoint(results: Iterable[flight.Result]) -> flight.FlightEndpoint:
    """The endpoint in the answer to `renewal_of`. Raises ResolverError without one."""
    for result in results:
        return flight.FlightEndpoint.deserialize(result.body.to_pybytes())
    raise ResolverError(f"The server answered {RENEW_ACTION} without an endpoint")


def check_schema(expected: pa.Schema, actual: pa.Schema, *, name: str, url: str) -> None:
    """Raise SchemaMismatchError unless both are equal, metadata aside."""
    if not actual.equals(expected, check_metadata=False):
        raise SchemaMismatchError(
            f"The schema of {name}, read from {url}, is not that of its FlightInfo: expected "
            f"[{_columns(expected)}], got [{_columns(actual)}]; ask the server for a new info",
            url=url,
        )


def is_connection_failure(error: BaseException) -> bool:
    """Whether it was the connection that failed, and not the server that said no."""
    return isinstance(error, flight.FlightUnavailableError) and not is_workers_answer(str(error))


def most_telling(errors: list[Exception]) -> Exception:
    """Of what each location of an endpoint said, what the caller is told.

    A server's own answer says more than a connection that failed. The others are notes.
    """
    first = next(
        (e for e in errors if not (is_connection_failure(e) or isinstance(e, WorkerConnectError))),
        errors[-1],
    )
    for error in errors:
        if error is not first:
            first.add_note(f"another location before or after it: {described(error)}")
    return first


def described(error: BaseException) -> str:
    """Class, message and notes of `error`, in one text."""
    notes: list[Any] = getattr(error, "__notes__", [])
    return "; ".join([f"{type(error).__name__}: {error}", *map(str, notes)])


def _columns(schema: pa.Schema) -> str:
    return ", ".join(
        f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in schema
    )
