"""A small Flight SQL server over DuckDB: statements only, messages decoded by hand."""

from __future__ import annotations

import threading
from typing import Any, Self

import duckdb
import pyarrow as pa
from pyarrow import flight

_COMMAND = "type.googleapis.com/arrow.flight.protocol.sql.CommandStatementQuery"
_LENGTH_DELIMITED = 2
_ROWS_PER_ENDPOINT = 1_000


class FlightSqlServer(flight.FlightServerBase):
    """Answers ``CommandStatementQuery``; a result is cut into endpoints without locations."""

    def __init__(self, *setup: str) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.url = f"http://127.0.0.1:{self.port}"
        self.endpoints_given = 0
        self._database = duckdb.connect()
        self._lock = threading.Lock()
        self._results: dict[bytes, pa.Table] = {}
        for statement in setup:
            self._database.execute(statement)

    def get_flight_info(
        self, context: Any, descriptor: flight.FlightDescriptor
    ) -> flight.FlightInfo:
        with self._lock:
            table = self._database.execute(_query_of(descriptor.command)).to_arrow_table()
            tickets = []
            for start in range(0, max(table.num_rows, 1), _ROWS_PER_ENDPOINT):
                ticket = f"{len(self._results)}".encode()
                self._results[ticket] = table.slice(start, _ROWS_PER_ENDPOINT)
                tickets.append(ticket)
            self.endpoints_given += len(tickets)
        endpoints = [flight.FlightEndpoint(ticket, []) for ticket in tickets]
        return flight.FlightInfo(table.schema, descriptor, endpoints, table.num_rows, -1, True)

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.RecordBatchStream:
        with self._lock:
            return flight.RecordBatchStream(self._results[ticket.ticket])

    def do_action(self, context: Any, action: flight.Action) -> Any:
        raise NotImplementedError(action.type)  # no prepared statements, no transactions

    def __exit__(self, *_exception: object) -> None:
        self.shutdown()
        self._database.close()

    def __enter__(self) -> Self:
        return self


def statement(query: str) -> flight.FlightDescriptor:
    """The descriptor by which a Flight SQL client asks for a query's result."""
    command = _field(1, query.encode())
    return flight.FlightDescriptor.for_command(_field(1, _COMMAND.encode()) + _field(2, command))


def _query_of(command: bytes) -> str:
    wrapped = _fields(command)
    if wrapped.get(1) != _COMMAND.encode():
        raise NotImplementedError(str(wrapped.get(1)))
    return _fields(wrapped[2])[1].decode()


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | _LENGTH_DELIMITED]) + _varint(len(value)) + value


def _fields(message: bytes) -> dict[int, bytes]:
    """The length-delimited fields of a message that has no others."""
    found = {}
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        assert tag & 7 == _LENGTH_DELIMITED, tag
        length, at = _read_varint(message, at)
        found[tag >> 3] = message[at : at + length]
        at += length
    return found


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
        shift += 7
