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

from ._flight_wire import encode_data

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._flight_wire import FlightData

_CONTINUATION: Final = b"\xff\xff\xff\xff"
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_U16, _U32, _I32, _I64 = (struct.Struct(form).unpack_from for form in ("<H", "<I", "<i", "<q"))
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
        kind, size = _kind_and_size(data.header)
        # What a server pads the body with would be taken for the next message.
        self._pieces.add(data.header, data.body[:size] if size >= 0 else data.body)
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
        try:
            batch = self._reader.read_next_batch()
        except StopIteration:
            # To a caller this would be the end of the stream, with batches missing.
            raise pa.ArrowInvalid("a message with a batch holds none") from None
        return FlightStreamChunk(batch, metadata)


class BatchEncoder:
    """Turns batches of one schema into messages. For one thread at a time."""

    def __init__(self, schema: pa.Schema, options: pa.ipc.IpcWriteOptions | None = None) -> None:
        self._written = _Pieces()
        self._writer = pa.ipc.new_stream(
            pa.PythonFile(self._written, mode="w"), schema, options=options
        )
        self._schema = schema
        self._options = options
        self._is_torn = False

    def begin(self, descriptor: bytes = b"") -> bytes:
        """The message that opens the stream."""
        sink = pa.BufferOutputStream()
        # Not serialize(), which knows no options.
        pa.ipc.new_stream(sink, self._schema, options=self._options).close()
        written = _Pieces()
        written.write(sink.getvalue())
        header, body = next(_messages(written))
        return encode_data(descriptor=descriptor, header=header, body=body)

    def encode(self, batch: pa.RecordBatch, app_metadata: bytes = b"") -> Iterator[bytes]:
        """The messages of ``batch``: new dictionaries, then itself with ``app_metadata``.

        Each is a copy: the batch may change once it is there. Raises ``pyarrow.ArrowInvalid``
        if a batch before this one was left with dictionaries that were not taken.
        """
        if self._is_torn:
            raise pa.ArrowInvalid(
                "an earlier batch was sent in part, and this one would be read with its "
                "dictionaries; begin a new stream"
            )
        self._is_torn = True
        try:
            self._writer.write_batch(batch)
        except pa.ArrowInvalid:
            self._is_torn = not self._written.is_empty()  # it may have another schema
            raise
        # pyarrow writes the schema with the first batch.
        *dictionaries, (header, body) = (
            each for each in _messages(self._written) if _kind_and_size(each[0])[0] != _SCHEMA
        )
        for dictionary_header, dictionary_body in dictionaries:
            yield encode_data(header=dictionary_header, body=dictionary_body)
        self._is_torn = False
        yield encode_data(header=header, app_metadata=app_metadata, body=body)


def metadata_only(app_metadata: bytes, descriptor: bytes = b"") -> bytes:
    """A message without a batch."""
    return encode_data(descriptor=descriptor, app_metadata=app_metadata)


def _kind_and_size(header: memoryview) -> tuple[int, int]:
    """The kind of an IPC message and the length of its buffers.

    They are the second and the fourth field of the flatbuffer that its metadata is; what is
    left out is 0.
    """
    try:
        (root,) = _U32(header)
        vtable = root - _I32(header, root)[0]
        (size,) = _U16(header, vtable)
        # Behind two lengths, two bytes for each field.
        kind_at = _U16(header, vtable + 6)[0] if size > 6 else 0  # noqa: PLR2004
        size_at = _U16(header, vtable + 10)[0] if size > 10 else 0  # noqa: PLR2004
        return (
            header[root + kind_at] if kind_at else 0,
            _I64(header, root + size_at)[0] if size_at else 0,
        )
    except (struct.error, IndexError) as error:
        raise pa.ArrowInvalid("the stream has a message whose metadata cannot be read") from error


class _Pieces:
    """A file that is read in the pieces in which it was written, each as it is."""

    closed = False

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()

    def add(self, header: memoryview, body: memoryview) -> None:
        self._pieces.append(memoryview(_CONTINUATION + struct.pack("<i", len(header))))
        self._pieces += (header, body)

    def write(self, data: Any) -> int:
        self._pieces.append(memoryview(data))
        return len(data)

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

    def take(self, count: int) -> list[memoryview]:
        """The next ``count`` bytes, as far as they were written."""
        taken = []
        while count and len(piece := self.read(count)):
            taken.append(piece)
            count -= len(piece)
        return taken

    def is_empty(self) -> bool:
        return not self._pieces

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._pieces.clear()


def _messages(written: _Pieces) -> Iterator[tuple[memoryview, list[memoryview]]]:
    """Header and body of the messages of an IPC stream, of which whole ones are written."""
    while start := b"".join(written.take(4)):
        # Always, but in the format of before Arrow 0.15.
        if start == _CONTINUATION:
            start = b"".join(written.take(4))
        header = memoryview(b"".join(written.take(*_I32(start))))
        yield header, written.take(_kind_and_size(header)[1])
