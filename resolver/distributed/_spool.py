"""A result on its way to DataFusion's own writers: Arrow files that it reads back.

DataFusion writes only what its own plans produce, and the result of a distributed query
comes out of another plan. So the result is put aside batch by batch, in files, and read
again as a table. Holds one batch per partition in memory, whatever the size of the result.
What is written then, and how, is DataFusion's business.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from ._batches import Compactor, cast_batch, has_dictionary
from ._settings import EXECUTION
from ._threads import call_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import datafusion

    from ._executor import HeadRun
    from ._session import SessionContext

__all__ = ["spooled"]

_READING: Final = {
    **EXECUTION,
    # A range of an Arrow file is cut out of the whole file, read into memory for that.
    "datafusion.optimizer.repartition_file_scans": "false",
}


@contextlib.contextmanager
def spooled(
    run: HeadRun, session: SessionContext, schema: pa.Schema
) -> Iterator[datafusion.DataFrame]:
    """The result of ``run`` as a frame over files, which are gone when the body ends.

    The frame has the partitions of ``run``, and the order of a single one. ``schema``
    counts for a result without any batch.
    """
    with tempfile.TemporaryDirectory(prefix="write-", dir=session._exchange_path()) as name:
        directory = Path(name)
        streams = run.partition_streams()
        stop = threading.Event()
        try:
            call_all(
                [
                    functools.partial(_spool, stream, directory / f"{index:06}", stop)
                    for index, stream in enumerate(streams)
                ],
                name="spool",
            )
        finally:
            stop.set()
        if not any(directory.iterdir()):
            with pa.ipc.new_file(str(directory / "empty.arrow"), schema):
                pass
        partitions = {"datafusion.execution.target_partitions": str(len(streams))}
        reader = session._derived({**_READING, **partitions})
        yield reader.read_arrow(directory)


def _spool(stream: Iterable[Any], stem: Path, stop: threading.Event) -> None:
    """Write one partition, as files whose names are in the order of its batches."""
    compactor: Compactor | None = None
    files = 0
    with contextlib.ExitStack() as open_file:
        writer: Any = None
        for item in stream:
            if stop.is_set():
                return
            batch = item.to_pyarrow()
            compactor = compactor or Compactor(batch.schema)
            schema = compactor.schema
            # A file holds one dictionary per column, so such a batch needs one of its own.
            if writer is None or has_dictionary(schema):
                open_file.close()
                path = stem.with_name(f"{stem.name}-{files:09}.arrow")
                writer = open_file.enter_context(pa.ipc.new_file(str(path), schema))
                files += 1
            writer.write_batch(compactor.compacted(cast_batch(batch, compactor.declared)))
