"""Arrow IPC in pieces: batches out of Flight messages, and messages out of batches.

pyarrow reads and writes streams; Flight sends a stream's messages one by one, metadata and
buffers apart. What is read here is handed to pyarrow's own stream reader piece by piece, as
views: schemas, dictionaries, deltas, compression are its business, and nothing is copied.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa

from ._flight_wire import FlightData

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTINUATION: Final = b"\xff\xff\xff\xff"
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_NOTHING: Final = memoryview(b"")


class FlightStreamChunk(NamedTuple):
    """A batch with what was sent along; either may be ``None``."""

    data: pa.RecordBatch | None
    app_metadata: pa.Buffer | None


class BatchDecoder:
    """Turns the messages of one stream into batches. For one thread at a time.

    ``schema`` is ``None`` until a message has brought it.
    """

    def __init__(self, options: pa.ipc.IpcReadOptions | None = None) -> None:
        self._pieces = _Pieces()
        self._options = options
        self._reader: pa.RecordBatchStreamReader | None = None
        self.schema: pa.Schema | None = None

    def decode(self, data: FlightData) -> FlightStreamChunk | None:
        """The chunk that ``data`` completes, if it does.

        Raises ``pyarrow.ArrowInvalid`` for what is no message, or not in its place.
        """
        metadata = pa.py_buffer(data.app_metadata) if len(data.app_metadata) else None
        if not len(data.header):
            return None if metadata is None else FlightStreamChunk(None, metadata)
        kind = _message_kind(data.header)
        self._pieces.add(data.header, data.body)
        if kind == _SCHEMA:
            if self._reader is not None:
                raise pa.ArrowInvalid("the stream has a second schema")
            self._reader = pa.ipc.open_stream(
                pa.PythonFile(self._pieces, mode="r"), options=self._options
            )
            self.schema = self._reader.schema
            # A server may tell something before the first batch.
            return None if metadata is None else FlightStreamChunk(None, metadata)
        if self._reader is None:
            raise pa.ArrowInvalid("the stream does not begin with a schema")
        if kind == _DICTIONARY:
            return None
        if kind != _BATCH:
            raise pa.ArrowInvalid(f"the stream has a message of the unknown kind {kind}")
        return FlightStreamChunk(self._reader.read_next_batch(), metadata)


class BatchEncoder:
    """Turns batches of one schema into messages. For one thread at a time."""

    def __init__(self, schema: pa.Schema, options: pa.ipc.IpcWriteOptions | None = None) -> None:
        self._sink = _Sink()
        self._writer = pa.ipc.new_stream(
            pa.PythonFile(self._sink, mode="w"), schema, options=options
        )
        self._schema = schema

    def begin(self, descriptor: bytes = b"") -> FlightData:
        """The message that opens the stream."""
        (message,) = _messages(memoryview(self._schema.serialize()))
        return message._replace(descriptor=memoryview(descriptor))

    def encode(self, batch: pa.RecordBatch, app_metadata: bytes = b"") -> list[FlightData]:
        """The messages of ``batch``: new dictionaries, then itself with ``app_metadata``."""
        self._writer.write_batch(batch)
        # pyarrow writes the schema with the first batch.
        written = (m for m in _messages(self._sink.take()) if _message_kind(m.header) != _SCHEMA)
        *dictionaries, last = written
        return [*dictionaries, last._replace(app_metadata=memoryview(app_metadata))]


def metadata_only(app_metadata: bytes, descriptor: bytes = b"") -> FlightData:
    """A message without a batch."""
    return FlightData(memoryview(descriptor), _NOTHING, memoryview(app_metadata), _NOTHING)


def _message_kind(header: memoryview) -> int:
    """The kind of an IPC message: a field of the flatbuffer that its metadata is."""
    try:
        (root,) = struct.unpack_from("<I", header)
        (back,) = struct.unpack_from("<i", header, root)
        (size,) = struct.unpack_from("<H", header, root - back)
        # The second field of the table; its place in the vtable is after two lengths.
        offset = struct.unpack_from("<H", header, root - back + 6)[0] if size > 6 else 0  # noqa: PLR2004
        return header[root + offset] if offset else 0
    except (struct.error, IndexError) as error:
        raise pa.ArrowInvalid("the stream has a message whose metadata cannot be read") from error


def _body_size(header: memoryview) -> int:
    """The fourth field, the length of a message's buffers."""
    (root,) = struct.unpack_from("<I", header)
    (back,) = struct.unpack_from("<i", header, root)
    (size,) = struct.unpack_from("<H", header, root - back)
    offset = struct.unpack_from("<H", header, root - back + 10)[0] if size > 10 else 0  # noqa: PLR2004
    return int(struct.unpack_from("<q", header, root + offset)[0]) if offset else 0


class _Pieces:
    """A file that is read in the pieces in which it was given, each as it is."""

    closed = False

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()

    def add(self, header: memoryview, body: memoryview) -> None:
        self._pieces.append(memoryview(_CONTINUATION + struct.pack("<i", len(header))))
        self._pieces += (header, body)

    def read(self, count: int) -> memoryview:
        while self._pieces:
            piece = self._pieces.popleft()
            if not len(piece):
                continue
            if len(piece) > count:
                self._pieces.appendleft(piece[count:])
                piece = piece[:count]
            return piece
        return _NOTHING

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._pieces.clear()


class _Sink:
    """A file that gives back what was written as messages."""

    closed = False

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, data: Any) -> int:
        self._written.append(bytes(data))
        return len(self._written[-1])

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def take(self) -> memoryview:
        """What was written since the last call."""
        view = memoryview(b"".join(self._written))
        self._written.clear()
        return view


def _messages(view: memoryview) -> Iterator[FlightData]:
    """The messages of a piece of an IPC stream, which holds whole ones."""
    at = 0
    while at < len(view):
        (size,) = struct.unpack_from("<i", view, at + 4)
        header = view[at + 8 : at + 8 + size]
        at += 8 + size
        body = view[at : at + _body_size(header)]
        at += len(body)
        yield FlightData(_NOTHING, header, _NOTHING, body)
