"""The calls of the Flight service as gRPC has them, and what their errors mean.

Shared by the blocking client and the asyncio one. grpc itself is not imported: channels
and errors are taken for what they can do.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa
from pyarrow import flight

from . import _flight_wire as wire
from ._presets import LONG_ERRORS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CHANNEL_OPTIONS: Final = (
    # Flight's own clients and servers have no limit either; gRPC's default is 4 MB.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    *LONG_ERRORS.items(),
)


class Method(NamedTuple):
    """One call: its name, whether requests and answers are streams, and their encodings."""

    name: str
    streams: tuple[bool, bool]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def _same(data: bytes) -> bytes:
    return data


def _serialize(value: Any) -> bytes:
    data: bytes = value.serialize()
    return data


METHODS: Final = {
    "handshake": Method("Handshake", (True, True), wire.encode_handshake, wire.decode_handshake),
    "list_flights": Method(
        "ListFlights", (False, True), wire.encode_criteria, flight.FlightInfo.deserialize
    ),
    "get_flight_info": Method(
        "GetFlightInfo", (False, False), _serialize, flight.FlightInfo.deserialize
    ),
    "poll_flight_info": Method("PollFlightInfo", (False, False), _serialize, wire.decode_poll_info),
    "get_schema": Method("GetSchema", (False, False), _serialize, flight.SchemaResult.deserialize),
    "do_get": Method("DoGet", (False, True), _serialize, wire.decode_data),
    "do_put": Method("DoPut", (True, True), _same, wire.decode_put_result),
    "do_exchange": Method("DoExchange", (True, True), _same, wire.decode_data),
    "do_action": Method("DoAction", (False, True), wire.encode_action, flight.Result.deserialize),
    "list_actions": Method("ListActions", (False, True), _same, wire.decode_action_type),
}


def stub(channel: Any, name: str, *, decode: bool = True) -> Any:
    """The callable of ``channel``, a grpcio one of either kind, for one method.

    Not to ``decode`` gives answers as bytes, for `decoded`.
    """
    method = METHODS[name]
    kind = "_".join("stream" if streams else "unary" for streams in method.streams)
    return getattr(channel, kind)(
        wire.SERVICE + method.name,
        request_serializer=method.encode,
        response_deserializer=method.decode if decode else None,
    )


def decoded(method: Method, message: bytes) -> Any:
    """An answer of ``method``. Raises ``FlightInternalError`` for what is none."""
    try:
        return method.decode(message)
    except Exception as error:
        raise flight.FlightInternalError(
            f"the server's answer to {method.name} cannot be read ({type(error).__name__})"
        ) from error


def as_metadata(headers: Any) -> tuple[tuple[str, str | bytes], ...] | None:
    """Headers as gRPC wants them, names in lower case; pyarrow's are bytes."""
    if headers is None:
        return None
    pairs = headers.items() if hasattr(headers, "items") else headers
    return tuple(
        ((name.decode() if isinstance(name, bytes) else str(name)).lower(), value)
        for name, value in pairs
    )


def with_basic_authorization(
    headers: Any, username: str, password: str
) -> list[tuple[str, str | bytes]]:
    """``headers``, and the one that HTTP's basic authentication sends."""
    encoded = base64.b64encode(f"{username}:{password}".encode()).decode()
    return [*(as_metadata(headers) or ()), ("authorization", f"Basic {encoded}")]


def bearer_of(*metadata: Any) -> tuple[bytes, bytes]:
    """The header with a bearer token among what a server answered.

    Raises ``FlightUnauthenticatedError`` when there is none.
    """
    for name, value in (pair for pairs in metadata for pair in pairs or ()):
        text = value if isinstance(value, bytes) else str(value).encode()
        if name.lower() == "authorization" and text[:7].lower() == b"bearer ":
            return b"authorization", text
    raise flight.FlightUnauthenticatedError("the server answered the handshake without a token")


# As pyarrow's own client has them; what is missing is a FlightServerError there too.
_ERRORS: Final[Mapping[str, Any]] = {
    "CANCELLED": flight.FlightCancelledError,
    "INVALID_ARGUMENT": pa.ArrowInvalid,
    "DEADLINE_EXCEEDED": flight.FlightTimedOutError,
    "NOT_FOUND": pa.ArrowKeyError,
    "ALREADY_EXISTS": pa.ArrowException,
    "PERMISSION_DENIED": flight.FlightUnauthorizedError,
    "RESOURCE_EXHAUSTED": pa.ArrowInvalid,
    "FAILED_PRECONDITION": pa.ArrowInvalid,
    "ABORTED": flight.FlightInternalError,
    "OUT_OF_RANGE": pa.ArrowInvalid,
    "UNIMPLEMENTED": pa.ArrowNotImplementedError,
    "INTERNAL": flight.FlightInternalError,
    "UNAVAILABLE": flight.FlightUnavailableError,
    "DATA_LOSS": flight.FlightInternalError,
    "UNAUTHENTICATED": flight.FlightUnauthenticatedError,
}


def flight_error(error: Any) -> Exception:
    """The exception that pyarrow's client raises for this ``grpc.RpcError``.

    Of the same class, with the server's words and, where pyarrow keeps it, its
    ``extra_info``.
    """
    name = error.code().name
    made: Any = _ERRORS.get(name, flight.FlightServerError)
    said = error.details() or f"the call ended with {name}"
    if issubclass(made, flight.FlightError):
        return made(said, _extra_info(error))  # type: ignore[no-any-return]
    return made(said)  # type: ignore[no-any-return]


def _extra_info(error: Any) -> bytes:
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            return bytes(value)
    return b""


def as_flight_error(error: Exception) -> Exception:
    """What pyarrow would have raised for an error of grpc; any other as it is."""
    return flight_error(error) if callable(getattr(error, "code", None)) else error
