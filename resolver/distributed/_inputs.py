"""What a task reads of other stages: brought here, and put into its plan as file scans.

A partition that this process holds is read in place; any other is fetched, through the
ChannelResolver of whoever runs the task, piece by piece. Nothing is run here.
"""

from __future__ import annotations

import functools
import itertools
import threading
import uuid
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import pyarrow as pa
from pyarrow import flight

from resolver._errors import ResolverError

from ._batches import checked, stored_schema
from ._errors import DistributedError
from ._partition import PartitionWriter
from ._plan_proto import FileEntry, PlanNode
from ._reach import reach
from ._threads import call_all
from ._wire import HEALTH, PartitionSource, PartitionTicket, UnknownOutputError, WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import datafusion

    from resolver._resolver import ChannelResolver

    from ._exchange import Exchange
    from ._wire import OutputKey, StageInput

__all__ = ["Fetcher", "InputLostError", "scan_of_nothing", "with_inputs"]

Headers = list[tuple[bytes, bytes]]

_PIECE_TIMEOUT: Final = 30.0
"""Seconds that one piece of a partition may take, beyond the silence that is allowed."""

_STREAMS: Final = 4
"""Partitions that are fetched at a time, but one from every worker at least."""

_Stream = tuple[str, int]
"""The worker's URL, and which of the streams from there it is."""

_File = tuple[int, bytes]
"""What tells the files of a source from those of others, and its schema."""


class InputLostError(DistributedError, ConnectionError):
    """Stage output could not be had from ``url``, where it was; it must be made again."""


class _GivenUpError(Exception):
    """Nobody waits any more for what is fetched."""


class _Transfers:
    """On which of some streams something is still to come. Thread-safe.

    ``ask`` asks a worker for a sign of life; it raises what a call to one does.
    """

    def __init__(self, streams: Iterable[_Stream], ask: Callable[[str], object]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._batches = dict.fromkeys(streams, 0)
        self.over: Final = threading.Event()

    def heard(self, stream: _Stream) -> None:
        """A batch has come. Raises when nobody waits for it."""
        if self.over.is_set():
            raise _GivenUpError
        with self._lock:
            self._batches[stream] += 1

    def ended(self, stream: _Stream) -> None:
        """Everything has come."""
        with self._lock:
            del self._batches[stream]
            if not self._batches:
                self.over.set()

    def watch(self, silence: float) -> None:
        """Until it is over. Raises ``InputLostError`` for a worker that hangs.

        By its silence alone it could not be told from a slow network.
        """
        before = self._awaited()
        while not self.over.wait(silence):
            now = self._awaited()
            quiet = now.items() & before.items()
            call_all([functools.partial(self._check_life, *each) for each in quiet], name="sign")
            before = now

    def _awaited(self) -> dict[_Stream, int]:
        with self._lock:
            return self._batches.copy()

    def _check_life(self, stream: _Stream, batches: int) -> None:
        url, _ = stream
        try:
            self._ask(url)
        except (ResolverError, flight.FlightError, EOFError) as error:
            if self._awaited().get(stream) == batches and not self.over.is_set():
                raise _lost(url, error) from error


class Fetcher:
    """Brings stage output here, at the charge of the task ``key``. For one task.

    What is fetched is put into files whose names begin with ``stem``. ``check`` is
    called between batches and may raise. A worker that sends nothing for ``silence`` seconds
    is asked for a sign of life, and lost if it gives none for as long.
    """

    def __init__(
        self,
        resolver: ChannelResolver,
        exchange: Exchange,
        key: OutputKey,
        stem: Path,
        *,
        headers: Headers,
        silence: float,
        check: Callable[[], object],
    ) -> None:
        self._resolver = resolver
        self._exchange = exchange
        self._key = key
        self._stem = stem.with_name(f"{stem.name}-input")
        self._options = flight.FlightCallOptions(timeout=_PIECE_TIMEOUT + silence, headers=headers)
        self._sign_options = flight.FlightCallOptions(timeout=silence, headers=headers)
        self._silence = silence
        self._check = check
        self._lock = threading.Lock()
        self._charged = 0
        self._files: list[Path] = []
        self.fetched_bytes = 0

    def bring(self, inputs: Sequence[StageInput]) -> dict[PartitionSource, tuple[Path, ...]]:
        """The files of every source of ``inputs``; what is not here is put into the folder.

        Several streams at a time, from one worker too: a stream alone waits more than it
        works.
        """
        found: dict[PartitionSource, tuple[Path, ...]] = {}
        missing: dict[str, dict[PartitionSource, _File]] = defaultdict(dict)
        numbers = itertools.count()
        for stage_input in inputs:
            for source in itertools.chain.from_iterable(stage_input.partitions):
                try:
                    ticket = PartitionTicket(source.output, source.partition)
                    found[source] = self._exchange.partition(ticket).files
                except UnknownOutputError:
                    if source.files:
                        file = next(numbers), stage_input.schema
                        found[source] = self._written(source, file)
                    else:
                        missing[source.url][source] = next(numbers), stage_input.schema
        if not missing:
            return found
        most = max(1, _STREAMS // len(missing))
        streams = {
            (url, first): sources
            for url, each in missing.items()
            for first in range(most)
            if (sources := list(each.items())[first::most])
        }
        transfers = _Transfers(streams, self._ask_for_sign)

        def fetch(stream: _Stream) -> None:
            for source, file in streams[stream]:
                writer = self._writer(file)
                found[source] = self._fetched(source, writer, lambda: transfers.heard(stream))
            transfers.ended(stream)

        calls = [functools.partial(fetch, stream) for stream in streams]
        calls.append(functools.partial(transfers.watch, self._silence))
        try:
            call_all(calls, name="fetch", check=self._check)
        finally:
            transfers.over.set()
        return found

    def _ask_for_sign(self, url: str) -> None:
        action = flight.Action(HEALTH, b"")
        reach(self._resolver, url, lambda c: list(c.do_action(action, self._sign_options)))

    def remove(self) -> None:
        """Give back what was brought and is not needed any more."""
        with self._lock:
            charged, self._charged = self._charged, 0
            files, self._files = self._files, []
        for path in files:
            path.unlink(missing_ok=True)
        if charged:
            self._exchange.charge(self._key, -charged)

    def _written(self, source: PartitionSource, file: _File) -> tuple[Path, ...]:
        """The files of a source that came along with the request.

        Written anew, batch by batch: they are the caller's, and his care is not known.
        """
        writer = self._writer(file)
        try:
            for batch in _batches_of(source):
                writer.write(batch)
            stored = writer.finish()
        except BaseException:
            writer.discard()
            raise
        self._files += stored.files
        return stored.files

    def _writer(self, file: _File) -> PartitionWriter:
        number, schema = file
        stored_as = stored_schema(_deserialized(schema))
        return PartitionWriter(self._stem, number, stored_as, charge=self._charge)

    def _charge(self, count: int) -> None:
        self._exchange.charge(self._key, count)
        with self._lock:
            self._charged += count

    def _fetched(
        self, source: PartitionSource, writer: PartitionWriter, heard: Callable[[], object]
    ) -> tuple[Path, ...]:
        def copy(client: flight.FlightClient) -> None:
            self._copy(client, source, writer, heard)

        try:
            reach(self._resolver, source.url, copy)
            stored = writer.finish()
            heard()
        except BaseException as error:
            writer.discard()
            if isinstance(error, (ResolverError, flight.FlightError, pa.ArrowKeyError, EOFError)):
                raise _lost(source.url, error) from error
            raise
        with self._lock:
            self.fetched_bytes += stored.report.bytes
            self._files += stored.files
        return stored.files

    def _copy(
        self,
        client: flight.FlightClient,
        source: PartitionSource,
        writer: PartitionWriter,
        heard: Callable[[], object],
    ) -> None:
        """Go on where ``writer`` is. Raises ``EOFError`` when less arrives than the task
        reported: a stream that merely ended early must not become a shorter answer.
        """
        while writer.batches < source.batches:
            before = writer.batches
            ticket = PartitionTicket(source.output, source.partition, first_batch=before)
            reader = client.do_get(flight.Ticket(ticket.to_bytes()), self._options)
            try:
                for chunk in reader:
                    self._check()
                    heard()
                    writer.write(chunk.data)
            except BaseException:
                reader.cancel()
                raise
            if writer.batches == before:
                break
        if (writer.rows, writer.batches) != (source.rows, source.batches):
            raise EOFError(f"{writer.rows} rows arrived of a partition of {source.rows}")


def with_inputs(
    plan: PlanNode,
    inputs: Sequence[StageInput],
    fetcher: Fetcher,
    context: datafusion.SessionContext,
    stem: Path,
) -> PlanNode:
    """``plan`` with every stage input replaced by a scan of its files.

    A file that is needed for a moment gets a name that begins with ``stem``. Raises
    ``WireError`` when plan and inputs do not belong together, ``InputLostError`` naming the URL.
    """
    wanted = sorted(node.stage_number for node in plan.walk() if node.kind == "stage_input")
    if wanted != sorted(stage_input.number for stage_input in inputs):
        raise WireError("the inputs of the task are not those that its plan reads")
    files = fetcher.bring(inputs)
    scans: dict[int, PlanNode] = {}
    for stage_input in inputs:
        schema = _deserialized(stage_input.schema)
        groups = [
            [_entry(source, path) for source in partition for path in files[source]]
            for partition in stage_input.partitions
        ]
        scans[stage_input.number] = _scan(schema, groups, stem, context)
    return plan.replaced(
        lambda node: scans[node.stage_number] if node.kind == "stage_input" else None
    )


def scan_of_nothing(
    schema: pa.Schema, partitions: int, stem: Path, context: datafusion.SessionContext
) -> PlanNode:
    """A scan of no files, with these columns and partitions."""
    return _scan(schema, [[]] * partitions, stem, context)


def _scan(
    schema: pa.Schema,
    groups: Sequence[Sequence[FileEntry]],
    stem: Path,
    context: datafusion.SessionContext,
) -> PlanNode:
    """A scan of these files, with the names that the plan has for their columns."""
    stored = stored_schema(schema)
    scan = _template(stored, stem, context).with_files(groups)
    # What is above finds columns by name as well as by position: a join checks both.
    return scan if stored.names == schema.names else scan.renamed(stored.names, schema.names)


_templates: dict[bytes, PlanNode] = {}
_TEMPLATES_KEPT: Final = 512


def _template(schema: pa.Schema, stem: Path, context: datafusion.SessionContext) -> PlanNode:
    """How DataFusion itself encodes a scan of an Arrow file with this schema."""
    key = schema.serialize().to_pybytes()
    known = _templates.get(key)
    if known is not None:
        return known
    path = stem.with_name(f"{stem.name}-schema-{uuid.uuid4().hex}.arrow")
    with pa.ipc.new_file(str(path), schema):
        pass
    plan = context.read_arrow(str(path)).execution_plan()
    path.unlink()
    template = PlanNode.parse(plan.to_bytes(context))
    if len(_templates) >= _TEMPLATES_KEPT:
        _templates.clear()
    _templates[key] = template
    return template


def _entry(source: PartitionSource, path: Path) -> FileEntry:
    try:
        status = path.stat()
    except FileNotFoundError as error:  # somebody tidied up
        raise _lost(source.url, error) from error
    return FileEntry(str(path), status.st_size, status.st_mtime_ns)


def _batches_of(source: PartitionSource) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = []
    try:
        for content in source.files:
            with pa.ipc.open_file(pa.py_buffer(content)) as reader:
                every = map(reader.get_batch, range(reader.num_record_batches))
                batches.extend(checked(every))
    except (pa.ArrowException, OSError) as error:
        raise WireError(f"a partition that came along cannot be read: {error}") from error
    return batches


def _deserialized(schema: bytes) -> pa.Schema:
    try:
        return pa.ipc.read_schema(pa.py_buffer(schema))
    except pa.ArrowException as error:
        raise WireError(f"an input's schema cannot be read: {error}") from error


def _lost(url: str, error: BaseException) -> InputLostError:
    said = str(error).partition(". Detail: ")[0]
    return InputLostError(f"stage output on worker {url} cannot be had: {said}", url=url)
