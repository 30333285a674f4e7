"""The messages of the Flight service as they travel in gRPC, to and from pyarrow's types.

A few small protobuf messages, written out here so that no client needs a protobuf
library, and so that the body of a batch is copied no more than gRPC needs: what is decoded
is a view of the bytes that gRPC gave, what is encoded goes straight into the bytes for it.
Pure functions; nothing here knows a channel or a client.

Decoding raises ``ValueError`` for bytes that are no such message.
"""

from __future__ import annotations

import datetime as dt
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyarrow import flight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SERVICE: Final = "/arrow.flight.protocol.FlightService/"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BODY: Final = 1000  # the field of a FlightData that holds a batch's buffers


class FlightData(NamedTuple):
    """One message of a stream of batches. What it lacks is empty.

    ``descriptor`` is an encoded FlightDescriptor; ``header`` an encapsulated message's
    metadata, as of Arrow IPC, and ``body`` its buffers.
    """

    descriptor: memoryview
    header: memoryview
    app_metadata: memoryview
    body: memoryview


class PollInfo(NamedTuple):
    """How a long-running query is coming along: the answer of ``poll_flight_info``.

    ``info`` is what there is so far. ``descriptor`` is what to poll with next, ``None`` once
    the query is complete. ``progress`` is from 0 to 1, ``None`` where the server does not
    tell; after ``expiration_time`` the descriptor may mean nothing any more.
    """

    info: flight.FlightInfo | None
    descriptor: flight.FlightDescriptor | None
    progress: float | None
    expiration_time: dt.datetime | None


_NOTHING: Final = memoryview(b"")


def encode_data(
    *,
    descriptor: bytes = b"",
    header: bytes | memoryview = b"",
    app_metadata: bytes = b"",
    body: Sequence[bytes | memoryview] = (),
) -> bytes:
    """A FlightData message; the pieces of its body are copied once, into it.

    The body is the last field, as Flight asks for.
    """
    parts: list[bytes | memoryview] = []
    for number, value in (1, descriptor), (2, header), (3, app_metadata):
        if len(value):
            parts += (_head(number, len(value)), value)
    if len(header):
        parts += (_head(_BODY, sum(map(len, body))), *body)
    return b"".join(parts)


def decode_data(message: bytes) -> FlightData:
    """A FlightData message; its parts are views of ``message``."""
    found = {1: _NOTHING, 2: _NOTHING, 3: _NOTHING, _BODY: _NOTHING}
    for number, value in _fields(message):
        if number in found:
            found[number] = _view(value)
    return FlightData(found[1], found[2], found[3], found[_BODY])


def encode_action(action: flight.Action | str | tuple[str, Any]) -> bytes:
    """An Action, or one given by its type, or by type and body."""
    if isinstance(action, str):
        action = flight.Action(action, b"")
    elif not isinstance(action, flight.Action):
        action = flight.Action(*action)
    data: bytes = action.serialize()
    return data


def decode_action_type(message: bytes) -> flight.ActionType:
    found = {number: bytes(_view(value)).decode() for number, value in _fields(message)}
    return flight.ActionType(found.get(1, ""), found.get(2, ""))


def encode_criteria(expression: bytes) -> bytes:
    return _bytes(1, expression)


def encode_handshake(payload: bytes) -> bytes:
    return _bytes(2, payload)


def decode_handshake(message: bytes) -> bytes:
    return bytes(_one(message, 2))


def decode_put_result(message: bytes) -> bytes:
    """What a server said about what was put so far."""
    return bytes(_one(message, 1))


def decode_poll_info(message: bytes) -> PollInfo:
    info = descriptor = progress = expires = None
    for number, value in _fields(message):
        if number == 1:
            info = flight.FlightInfo.deserialize(bytes(_view(value)))
        elif number == 2:  # noqa: PLR2004  # as numbered in Flight.proto
            descriptor = flight.FlightDescriptor.deserialize(bytes(_view(value)))
        elif number == 3:  # noqa: PLR2004
            (progress,) = struct.unpack("<d", _view(value))
        elif number == 4:  # noqa: PLR2004
            expires = _timestamp(_view(value))
    return PollInfo(info, descriptor, progress, expires)


def _timestamp(message: memoryview) -> dt.datetime:
    found = {number: value for number, value in _fields(message) if isinstance(value, int)}
    seconds, nanos = found.get(1, 0), found.get(2, 0)
    if seconds >> 63:  # before 1970: two's complement of 64 bits
        seconds -= 1 << 64
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    return epoch + dt.timedelta(seconds=seconds, microseconds=nanos // 1000)


def _one(message: bytes, wanted: int) -> memoryview:
    """The field ``wanted``, empty where it is missing."""
    found = _NOTHING
    for number, value in _fields(message):
        if number == wanted:
            found = _view(value)
    return found


def _view(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a message of Flight has a number where bytes belong")  # noqa: TRY004
    return value


def _bytes(number: int, value: bytes) -> bytes:
    return _head(number, len(value)) + value if value else b""


def _head(number: int, size: int) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(size)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004  # seven bits at a time
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _fields(message: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of every field; the values of nested ones are views."""
    view = memoryview(message)
    at, end = 0, len(view)
    while at < end:
        tag, at = _read_varint(view, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _read_varint(view, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _read_varint(view, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a message of Flight has a field of the unknown kind {kind}")
        if at + size > end:
            raise ValueError("a message of Flight ends in the middle of a field")
        yield number, view[at : at + size]
        at += size


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(view) or shift > 63:  # noqa: PLR2004  # 64 bits at most
            raise ValueError("a message of Flight has a number without an end")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004
            return value, at
        shift += 7
