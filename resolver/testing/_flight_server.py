"""The Flight server that `FlightServerProcess` runs; the main of that process.

It answers with figures a test can check: rows numbered from 0, the headers it was
sent, how many calls and connections it saw.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from pyarrow import flight

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA: Final = pa.schema([("i", pa.int64())])
ENDLESS: Final = b"endless"
ACTIONS: Final = ("calls", "connections", "echo", "headers", "identity", "pid", "sleep")


class NumbersServer(flight.FlightServerBase):  # type: ignore[misc]  # pyarrow is untyped
    """Serves batches of ascending int64 numbers; ``do_get`` of ``b"3"`` gives three."""

    def __init__(self, location: str, *, batch_rows: int = 1_024, **options: Any) -> None:
        self._batch_rows = batch_rows
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._peers: set[str] = set()
        super().__init__(location, **options)

    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        """Name the actions; also what a connector's probe asks for."""
        self._count(context, "list_actions")
        return [(name, "for tests") for name in ACTIONS]

    def do_get(
        self, context: flight.ServerCallContext, ticket: flight.Ticket
    ) -> flight.GeneratorStream:
        """Stream as many batches as the ticket says, or without end."""
        self._count(context, "do_get")
        count = None if ticket.ticket == ENDLESS else int(ticket.ticket)
        return flight.GeneratorStream(SCHEMA, self._batches(count))

    def do_put(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,  # noqa: ARG002 -- pyarrow's signature
        reader: flight.MetadataRecordBatchReader,
        writer: flight.FlightMetadataWriter,
    ) -> None:
        """Read everything and answer with the number of rows."""
        self._count(context, "do_put")
        rows = sum(chunk.data.num_rows for chunk in reader)
        writer.write(pa.py_buffer(str(rows).encode()))

    def do_action(  # noqa: PLR0911 -- one for each
        self, context: flight.ServerCallContext, action: flight.Action
    ) -> Iterator[bytes]:
        """Answer one of `ACTIONS`."""
        self._count(context, "do_action")
        body = action.body.to_pybytes()
        if action.type == "echo":
            return iter([body])
        if action.type == "pid":
            return iter([str(os.getpid()).encode()])
        if action.type == "sleep":
            time.sleep(float(body))
            return iter([b"slept"])
        if action.type == "identity":
            return iter([context.peer_identity()])
        if action.type == "headers":
            return iter([_as_json(context.get_middleware("headers").headers)])
        if action.type == "calls":
            with self._lock:
                return iter([_as_json(dict(self._calls))])
        if action.type == "connections":
            with self._lock:
                return iter([str(len(self._peers)).encode()])
        raise flight.FlightServerError(f"no action {action.type!r}")

    def _batches(self, count: int | None) -> Iterator[pa.RecordBatch]:
        rows = self._batch_rows
        number = 0
        while count is None or number < count:
            first = number * rows
            yield pa.record_batch([pa.array(range(first, first + rows), pa.int64())], schema=SCHEMA)
            number += 1

    def _count(self, context: flight.ServerCallContext, method: str) -> None:
        with self._lock:
            self._calls[method] += 1
            self._peers.add(context.peer())


class _HeadersFactory(flight.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow is untyped
    """Keeps each call's headers and, where a token is set, lets only its bearer in."""

    def __init__(self, token: str | None) -> None:
        super().__init__()
        self._authorization = None if token is None else f"Bearer {token}"

    def start_call(
        self,
        info: flight.CallInfo,  # noqa: ARG002 -- pyarrow's signature
        headers: dict[str, list[Any]],
    ) -> _Headers:
        if self._authorization is not None:
            given = headers.get("authorization", [])
            if given != [self._authorization]:
                raise flight.FlightUnauthenticatedError("a bearer token is needed")
        return _Headers(headers)


class _Headers(flight.ServerMiddleware):  # type: ignore[misc]  # pyarrow is untyped
    def __init__(self, headers: dict[str, list[Any]]) -> None:
        super().__init__()
        self.headers = headers


def _as_json(value: Any) -> bytes:
    def default(item: Any) -> str:
        return base64.b64encode(item).decode("ascii")

    return json.dumps(value, default=default).encode()


def make_server(options: dict[str, Any]) -> NumbersServer:
    """Build the server from what `FlightServerProcess` sends as JSON."""
    tls: dict[str, Any] = {}
    if options["tls_certificate"] is not None:
        tls["tls_certificates"] = [(options["tls_certificate"], options["tls_key"])]
    if options["client_authority"] is not None:
        tls["verify_client"] = True
        tls["root_certificates"] = options["client_authority"]
    return NumbersServer(
        options["location"],
        batch_rows=options["batch_rows"],
        middleware={"headers": _HeadersFactory(options["token"])},
        **tls,
    )


def main() -> None:
    """Serve until standard input ends: when the parent says so, and when it dies."""
    server = make_server(json.loads(sys.stdin.readline()))
    sys.stdout.write(json.dumps({"port": server.port}) + "\n")
    sys.stdout.flush()
    threading.Thread(target=server.serve, name="flight-server", daemon=True).start()
    sys.stdin.read()
    # Calls under way may never end; a test server owes them nothing.
    os._exit(0)
