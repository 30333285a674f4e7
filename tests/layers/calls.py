"""Calls of the Flight service on a raw grpcio channel: names and bytes, no generated code."""

from __future__ import annotations

import json
from typing import Any

SERVICE = "/arrow.flight.protocol.FlightService/"


def message(number: int, body: bytes) -> bytes:
    """A protobuf message with one short field of bytes."""
    assert len(body) < 128
    return bytes([number << 3 | 2, len(body)]) + body


def body(answer: bytes) -> bytes:
    """The bytes of a message's first field, of any length."""
    length, shift, at = 0, 0, 1
    while True:
        length |= (answer[at] & 127) << shift
        at += 1
        if answer[at - 1] < 128:
            return answer[at : at + length]
        shift += 7


def action(kind: bytes, argument: bytes = b"") -> bytes:
    return message(1, kind) + message(2, argument)


def stream(channel: Any, method: str) -> Any:
    return channel.unary_stream(SERVICE + method)


def act(channel: Any, kind: bytes, argument: bytes = b"", **options: Any) -> list[bytes]:
    """The bodies that a DoAction answers."""
    return [body(each) for each in stream(channel, "DoAction")(action(kind, argument), **options)]


def headers_on_grpc(channel: Any) -> dict[str, list[str]]:
    (seen,) = act(channel, b"headers")
    return json.loads(seen)


def headers_on_pyarrow(client: Any) -> dict[str, list[str]]:
    (result,) = client.do_action("headers")
    return json.loads(result.body.to_pybytes())
