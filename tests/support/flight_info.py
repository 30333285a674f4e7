"""A Flight server in this process whose endpoints a test describes; it counts its streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import pyarrow as pa
from pyarrow import flight

SCHEMA = pa.schema([("endpoint", pa.int64()), ("i", pa.int64())])
REUSE = "arrow-flight-reuse-connection://?"


def batch(endpoint: int, number: int, schema: pa.Schema = SCHEMA) -> pa.RecordBatch:
    return pa.record_batch([pa.array([endpoint]), pa.array([number])], schema=schema)


class EndpointServer(flight.FlightServerBase):
    """Endpoint k streams `batches` batches of one row; ``streams[k]`` replaces that.

    The ticket is the endpoint's number. ``renew`` answers ``RenewFlightEndpoint``. Where it
    ``hangs``, it says nothing of a stream, ``"before"`` its schema or ``"after"`` it, until
    ``go_on`` is set.
    """

    def __init__(self, batches: int = 3) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.url = f"http://127.0.0.1:{self.port}"
        self.batches = batches
        self.streams: dict[int, Callable[[], Iterator[pa.RecordBatch]]] = {}
        self.schemas: dict[int, pa.Schema] = {}
        self.info: flight.FlightInfo | None = None
        self.renew: Callable[[flight.FlightEndpoint], flight.FlightEndpoint] | None = None
        self.hangs = ""
        self.go_on = threading.Event()
        self.lock = threading.Lock()
        self.tickets: list[bytes] = []
        self.active = 0
        self.peak = 0
        self.sent = 0

    def get_flight_info(self, context: Any, descriptor: Any) -> flight.FlightInfo:
        assert self.info is not None
        return self.info

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.GeneratorStream:
        with self.lock:
            self.tickets.append(ticket.ticket)
        if self.hangs == "before":
            self.go_on.wait(60)
        number = int(ticket.ticket.split(b"-")[0])
        stream = self.streams.get(number, lambda: self._numbers(number))
        schema = self.schemas.get(number, SCHEMA)
        return flight.GeneratorStream(schema, self._counted(stream()))

    def do_action(self, context: Any, action: flight.Action) -> Iterator[bytes]:
        if action.type != "RenewFlightEndpoint" or self.renew is None:
            raise NotImplementedError(action.type)
        request = action.body.to_pybytes()
        length, start = _varint(request, 1)
        assert request[0] == 0x0A
        assert len(request) == start + length
        yield self.renew(flight.FlightEndpoint.deserialize(request[start:])).serialize()
        while not context.is_cancelled():  # one answer is enough
            time.sleep(0.001)

    def _numbers(self, endpoint: int) -> Iterator[pa.RecordBatch]:
        for number in range(self.batches):
            yield batch(endpoint, number, self.schemas.get(endpoint, SCHEMA))

    def _counted(self, stream: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with self.lock:
            self.active += 1
            self.peak = max(self.peak, self.active)
        try:
            if self.hangs == "after":
                self.go_on.wait(60)
            for each in stream:
                with self.lock:
                    self.sent += 1
                yield each
        finally:
            with self.lock:
                self.active -= 1

    def __exit__(self, *_exception: object) -> None:
        self.go_on.set()
        self.shutdown()

    def __enter__(self) -> Self:
        return self


def make_info(
    endpoints: list[flight.FlightEndpoint],
    *,
    ordered: bool = False,
    schema: pa.Schema | None = SCHEMA,
) -> flight.FlightInfo:
    descriptor = flight.FlightDescriptor.for_command(b"x")
    return flight.FlightInfo(schema, descriptor, endpoints, -1, -1, ordered)


def endpoints_at(count: int, *locations: str) -> list[flight.FlightEndpoint]:
    return [endpoint(str(number).encode(), *locations) for number in range(count)]


def endpoint(
    ticket: bytes, *locations: str, expires_in: float | None = None
) -> flight.FlightEndpoint:
    """``expires_in`` seconds; a negative number has expired."""
    time_left = None
    if expires_in is not None:
        at = time.time_ns() + int(expires_in * 1e9)
        time_left = pa.scalar(at, pa.timestamp("ns", "UTC"))
    where = [flight.Location(location) for location in map(_located, locations)]
    return flight.FlightEndpoint(ticket, where, time_left)


def _located(location: str) -> str:
    return location.replace("http://", "grpc://")


def _varint(data: bytes, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[start] & 0x7F) << shift
        shift += 7
        start += 1
        if data[start - 1] < 0x80:
            return value, start
