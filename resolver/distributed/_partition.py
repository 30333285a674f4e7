"""One partition of stage output as Arrow IPC files: how it is laid out, written and read.

Whose partition it is, and how long it stays, is not this module's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from ._batches import cast_batch, has_dictionary
from ._wire import PartitionReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = [
    "PIECE_BYTES",
    "PartitionWriter",
    "StoredPartition",
    "ipc_options",
    "nothing_stored",
    "read",
]

PIECE_BYTES: Final = 32 << 20
"""A worker answers with at most this much of a partition, but with one batch at least."""


_NO_COLUMNS: Final = pa.schema([])
_CHARGE_EVERY: Final = 1 << 20  # bytes: telling where a file ends costs as much as a batch


@dataclass(frozen=True, slots=True)
class StoredPartition:
    """One partition on disk: no file, one, or as many as there are batches.

    ``schema`` is that of the files, without columns if there are none, and ``compression``
    theirs, as in ``DistributedOptions``.
    """

    files: tuple[Path, ...]
    report: PartitionReport
    schema: pa.Schema
    compression: str = "none"


def nothing_stored() -> StoredPartition:
    """A partition without rows."""
    return StoredPartition((), PartitionReport(0, 0, 0), _NO_COLUMNS)


class PartitionWriter:
    """Writes one partition as Arrow IPC files, named ``stem`` and so on. For one thread.

    Usually one file. An IPC file can hold only one dictionary per column, so a partition
    with dictionary-encoded columns gets one file for every batch. ``compression`` is that
    of the batches: none, lz4 or zstd. ``charge`` is called with the bytes that writing
    came to, about once per MiB, and may refuse by raising. ``rows`` and ``batches`` count
    what has been written.
    """

    def __init__(
        self,
        stem: Path,
        partition: int,
        schema: pa.Schema,
        *,
        compression: str = "none",
        charge: Callable[[int], object] = lambda _count: None,
    ) -> None:
        self._stem = stem.with_name(f"{stem.name}-{partition}")
        self._schema = schema
        self._compression = compression
        self._options = ipc_options(compression)
        self._charge = charge
        self._one_batch_per_file = has_dictionary(schema)
        self._files: list[Path] = []
        self._sink: Any = None
        self._writer: Any = None
        self._in_file = 0  # bytes that are charged of the open file
        self._uncharged = 0  # bytes in memory, roughly
        self._size = 0
        self.rows = 0
        self.batches = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Append ``batch``, cast to the writer's schema."""
        if self._writer is None or self._one_batch_per_file:
            self._end_file()
            path = self._stem.with_name(f"{self._stem.name}-{len(self._files)}.arrow")
            self._files.append(path)
            self._sink = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_file(self._sink, self._schema, options=self._options)
        self._writer.write_batch(cast_batch(batch, self._schema))
        self.rows += batch.num_rows
        self.batches += 1
        self._uncharged += batch.nbytes
        if self._uncharged >= _CHARGE_EVERY:
            self._account()

    def finish(self) -> StoredPartition:
        """Raises what ``charge`` raises."""
        self._end_file()
        report = PartitionReport(self.rows, self.batches, self._size)
        schema = self._schema if self._files else _NO_COLUMNS
        return StoredPartition(tuple(self._files), report, schema, self._compression)

    def close(self) -> None:
        """Close the open file, if any. Idempotent; needed only when not finished."""
        writer, self._writer = self._writer, None
        sink, self._sink = self._sink, None
        try:
            if writer is not None:
                writer.close()
        finally:
            if sink is not None:
                sink.close()

    def discard(self) -> None:
        """Close, and remove what was written: whoever removes the rest may have been here."""
        self.close()
        for path in self._files:
            path.unlink(missing_ok=True)

    def _end_file(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()  # writes a footer
            self._account()
            self.close()
            self._in_file = 0

    def _account(self) -> None:
        self._uncharged = 0
        added = self._sink.tell() - self._in_file
        self._in_file += added
        self._size += added
        self._charge(added)


def ipc_options(compression: str) -> pa.ipc.IpcWriteOptions:
    """How batches of this compression are written, to a file as to a stream."""
    return pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)


def read(
    stored: StoredPartition, first_batch: int = 0, *, limit: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The batches of a stored partition from ``first_batch`` on, memory-mapped.

    With ``limit``, in bytes, ends before the batch that passes it, but not before the
    first one.
    """
    given = 0
    for batch in _batches(stored, first_batch):
        size = batch.get_total_buffer_size()
        if limit is not None and given and given + size > limit:
            return
        given += size
        yield batch


def _batches(stored: StoredPartition, first: int) -> Iterator[pa.RecordBatch]:
    # One file with all batches, or one for each: what PartitionWriter writes.
    files, skipped = stored.files, first
    if len(files) > 1:
        files, skipped = files[first:], 0
    for path in files:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            for index in range(skipped, reader.num_record_batches):
                yield reader.get_batch(index)
