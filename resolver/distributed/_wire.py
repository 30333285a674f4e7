"""What coordinator and worker say to each other: actions, tickets, reports.

Pure data with strict parsing. Everything here may come from a stranger: a parser
accepts exactly what its ``to_bytes`` writes and raises ``WireError`` for anything else.
No name in a message ever becomes part of a path; outputs are looked up by ``OutputKey``.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from ._options import COMPRESSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "AWAIT_TASK",
    "EXECUTE_TASK",
    "HEALTH",
    "INLINE_BYTES",
    "RELEASE_OUTPUTS",
    "RELEASE_QUERY",
    "RENEW_LEASE",
    "WORKER_INFO",
    "AwaitRequest",
    "NodeMetrics",
    "OutputKey",
    "PartitionReport",
    "PartitionSource",
    "PartitionTicket",
    "ReleaseRequest",
    "StageInput",
    "TaskReport",
    "TaskRequest",
    "WireError",
    "parse_query_id",
]

EXECUTE_TASK: Final = "resolver.execute_task"
"""Start a task and wait a while for it: a TaskReport, or nothing while it still runs."""
AWAIT_TASK: Final = "resolver.await_task"
"""Wait a while longer for a started task; answers as EXECUTE_TASK does."""
RELEASE_OUTPUTS: Final = "resolver.release_outputs"
"""Remove some output of a query that goes on: everybody who reads it has."""
RELEASE_QUERY: Final = "resolver.release_query"
"""End a query: stop its tasks, remove its output."""
RENEW_LEASE: Final = "resolver.renew_lease"
"""Keep a query: its coordinator is alive."""
WORKER_INFO: Final = "resolver.worker_info"
HEALTH: Final = "resolver.health"

INLINE_BYTES: Final = 1 << 16
"""The output of a task up to this size goes with its report, and on to whoever reads it."""

_MAX_HEADER_BYTES: Final = 1 << 20
_MAX_REQUEST_BYTES: Final = 1 << 26  # what a task reads is listed in it
_MAX_WAIT: Final = 60.0  # seconds
_MAX_REPORT_BYTES: Final = 1 << 26  # the schema of a very wide table is in it
_MAX_INDEX: Final = 1 << 20
_QUERY_ID: Final = re.compile(r"[0-9a-f]{32}")


class UnknownOutputError(KeyError):
    """What was named, a task, an output or a query, is not held by this process."""


class WireError(ValueError):
    """A message that does not follow the protocol; the message says how."""


@dataclass(frozen=True, slots=True)
class OutputKey:
    """Names what one attempt at one task wrote. ``query`` is 32 hexadecimal digits."""

    query: str
    stage: int
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class PartitionTicket:
    """One output partition of a task, from ``first_batch`` on: the content of a Flight ticket.

    A worker answers with a piece of the partition, not necessarily all that is left of it,
    so that a deadline for the call does not limit how large a partition may be.
    """

    output: OutputKey
    partition: int
    first_batch: int = 0

    def to_bytes(self) -> bytes:
        return _dump(
            {**asdict(self.output), "partition": self.partition, "first_batch": self.first_batch}
        )

    @classmethod
    def parse(cls, data: bytes) -> PartitionTicket:
        fields = _load(data, {"query", "stage", "task", "attempt", "partition", "first_batch"})
        first_batch = _index(fields, "first_batch", limit=1 << 40)
        return cls(_output_key(fields), _index(fields, "partition"), first_batch)


@dataclass(frozen=True, slots=True)
class PartitionSource:
    """Where one output partition of a task is, and how much of it there is.

    ``files`` is the partition itself, as Arrow IPC files, when it is small enough to be
    sent along; then nobody needs to fetch it.
    """

    url: str
    output: OutputKey
    partition: int
    rows: int
    batches: int
    size: int
    files: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class StageInput:
    """What a task reads of another stage.

    ``number`` is the one that the task's plan bears in place of the stage; ``partitions``
    are those of the plan's input, each made of the sources listed, in that order;
    ``schema`` is the Arrow schema they have, serialized.
    """

    number: int
    schema: bytes
    partitions: tuple[tuple[PartitionSource, ...], ...]


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Run ``plan`` over ``inputs`` and keep its output as ``output`` until the query ends.

    ``settings`` are the DataFusion options in which the coordinator's session differs
    from the defaults, so that the plan means the same on both sides. ``passthrough``
    names the headers of this call that go with the calls it causes. ``wait`` is how many
    seconds to wait for the task before answering; ``compression``, ``lease`` and
    ``worker_timeout`` are as in ``DistributedOptions``.
    """

    output: OutputKey
    plan: bytes
    settings: Mapping[str, str]
    inputs: tuple[StageInput, ...] = ()
    passthrough: tuple[str, ...] = ()
    wait: float = 5.0
    compression: str = "none"
    lease: float = 60.0
    worker_timeout: float = 10.0

    def to_bytes(self) -> bytes:
        files: list[bytes] = []
        header = {
            **asdict(self.output),
            "settings": dict(self.settings),
            "inputs": [_dumped_input(stage_input, files) for stage_input in self.inputs],
            "plan": len(self.plan),
            "passthrough": list(self.passthrough),
            "wait": self.wait,
            "compression": self.compression,
            "lease": self.lease,
            "worker_timeout": self.worker_timeout,
        }
        return b"".join([_dump(header), b"\n", self.plan, *files])

    @classmethod
    def parse(cls, data: bytes) -> TaskRequest:
        header, body = _split(data)
        names = {"query", "stage", "task", "attempt", "settings", "inputs", "passthrough", "plan"}
        names |= {"wait", "compression", "lease", "worker_timeout"}
        fields = _load(header, names, limit=_MAX_REQUEST_BYTES)
        settings, passthrough = fields["settings"], fields["passthrough"]
        if not isinstance(settings, dict) or not _all_strings(settings.values()):
            raise WireError("settings must be an object of strings")
        if not isinstance(passthrough, list) or not _all_strings(passthrough):
            raise WireError("passthrough must be a list of strings")
        if fields["compression"] not in COMPRESSIONS:
            raise WireError(f"compression must be one of {', '.join(COMPRESSIONS)}")
        if not isinstance(fields["inputs"], list):
            raise WireError("inputs must be a list")
        plan = body.take(fields["plan"])
        inputs = tuple(_parsed_input(stage_input, body) for stage_input in fields["inputs"])
        body.check_end()
        return cls(
            output=_output_key(fields),
            plan=plan,
            settings=settings,
            inputs=inputs,
            passthrough=tuple(passthrough),
            wait=_seconds(fields, "wait", _MAX_WAIT),
            compression=fields["compression"],
            lease=_seconds(fields, "lease"),
            worker_timeout=_seconds(fields, "worker_timeout"),
        )


@dataclass(frozen=True, slots=True)
class AwaitRequest:
    """The body of ``AWAIT_TASK``: which task, and how many seconds to wait for it."""

    output: OutputKey
    wait: float

    def to_bytes(self) -> bytes:
        return _dump({**asdict(self.output), "wait": self.wait})

    @classmethod
    def parse(cls, data: bytes) -> AwaitRequest:
        fields = _load(data, {"query", "stage", "task", "attempt", "wait"})
        return cls(_output_key(fields), _seconds(fields, "wait", _MAX_WAIT))


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    """The body of ``RELEASE_OUTPUTS``: outputs of one query, one at least."""

    outputs: tuple[OutputKey, ...]

    def to_bytes(self) -> bytes:
        keys = [[key.stage, key.task, key.attempt] for key in self.outputs]
        return _dump({"query": self.outputs[0].query, "outputs": keys})

    @classmethod
    def parse(cls, data: bytes) -> ReleaseRequest:
        fields = _load(data, {"query", "outputs"})
        outputs = fields["outputs"]
        if not isinstance(outputs, list) or not outputs:
            raise WireError("outputs must be a list of some")
        names = ("stage", "task", "attempt")
        if not all(isinstance(key, list) and len(key) == len(names) for key in outputs):
            raise WireError(f"an output must be {', '.join(names)}")
        query = {"query": fields["query"]}
        return cls(
            tuple(_output_key({**query, **dict(zip(names, k, strict=True))}) for k in outputs)
        )


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What one partition came to; ``bytes`` is its size on the worker's disk."""

    rows: int
    batches: int
    bytes: int


@dataclass(frozen=True, slots=True)
class NodeMetrics:
    """What one node of a task's plan did, in the order in which a plan is displayed.

    ``seconds`` is compute time summed over partitions; ``spilled`` is in bytes.
    """

    rows: int
    seconds: float
    spilled: int


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The outcome of a task.

    ``schema`` is the Arrow schema of its output, serialized; ``probed`` tells that there
    was no batch to show it, and that what is nullable was lost therefore. ``seconds`` is
    the time the task ran on the worker, ``fetched_bytes`` what it fetched from other
    workers, and ``nodes`` the metrics of its plan, from the root down. ``files`` are those
    of every partition, for an output of at most ``INLINE_BYTES``.
    """

    partitions: tuple[PartitionReport, ...]
    schema: bytes
    seconds: float
    fetched_bytes: int = 0
    nodes: tuple[NodeMetrics, ...] = ()
    files: tuple[tuple[bytes, ...], ...] | None = None
    probed: bool = False

    def to_bytes(self) -> bytes:
        files = self.files
        header = _dump(
            {
                "partitions": [[p.rows, p.batches, p.bytes] for p in self.partitions],
                "schema": base64.b64encode(self.schema).decode(),
                "seconds": self.seconds,
                "fetched_bytes": self.fetched_bytes,
                "nodes": [[n.rows, n.seconds, n.spilled] for n in self.nodes],
                "probed": self.probed,
                "files": None if files is None else [[len(f) for f in each] for each in files],
            }
        )
        return b"".join([header, b"\n", *(file for each in files or () for file in each)])

    @classmethod
    def parse(cls, data: bytes) -> TaskReport:
        header, body = _split(data)
        names = {"partitions", "schema", "seconds", "fetched_bytes", "nodes", "files", "probed"}
        fields = _load(header, names, limit=_MAX_REPORT_BYTES)
        try:
            files = None
            if fields["files"] is not None:
                files = tuple(tuple(map(body.take, sizes)) for sizes in fields["files"])
                if len(files) != len(fields["partitions"]):
                    raise WireError("as many lists of files as partitions were expected")
            body.check_end()
            return cls(
                partitions=tuple(
                    PartitionReport(int(rows), int(batches), int(size))
                    for rows, batches, size in fields["partitions"]
                ),
                schema=base64.b64decode(fields["schema"], validate=True),
                seconds=float(fields["seconds"]),
                fetched_bytes=int(fields["fetched_bytes"]),
                nodes=tuple(
                    NodeMetrics(int(rows), float(seconds), int(spilled))
                    for rows, seconds, spilled in fields["nodes"]
                ),
                files=files,
                probed=bool(fields["probed"]),
            )
        except (TypeError, ValueError, binascii.Error) as error:
            raise WireError(f"malformed task report: {error}") from error


def parse_query_id(data: bytes) -> str:
    """The body of ``RELEASE_QUERY``."""
    try:
        return _query_id(data.decode("ascii"))
    except UnicodeDecodeError as error:
        raise WireError("a query id is 32 hexadecimal digits") from error


class _Body:
    """What follows the line of JSON of a message: pieces one after the other."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._at = start

    def take(self, size: object) -> bytes:
        end = self._at + size if type(size) is int and size >= 0 else -1
        if not self._at <= end <= len(self._data):
            raise WireError("a message is shorter than it says, or a size in it is none")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def check_end(self) -> None:
        if self._at != len(self._data):
            raise WireError("a message is longer than it says")


def _split(data: bytes) -> tuple[bytes, _Body]:
    end = data.find(b"\n")
    if end < 0:
        raise WireError("a message is a line of JSON and what it describes")
    return data[:end], _Body(data, end + 1)


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _load(data: bytes, names: set[str], *, limit: int = _MAX_HEADER_BYTES) -> dict[str, Any]:
    if len(data) > limit:
        raise WireError(f"a message of {len(data)} bytes is over the limit")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError("not a JSON message of this protocol") from error
    if not isinstance(fields, dict) or fields.keys() != names:
        raise WireError(f"expected exactly the fields {', '.join(sorted(names))}")
    return fields


def _output_key(fields: Mapping[str, Any]) -> OutputKey:
    return OutputKey(
        _query_id(fields["query"]),
        _index(fields, "stage"),
        _index(fields, "task"),
        _index(fields, "attempt"),
    )


def _query_id(value: object) -> str:
    if not isinstance(value, str) or not _QUERY_ID.fullmatch(value):
        raise WireError("a query id is 32 hexadecimal digits")
    return value


def _index(fields: Mapping[str, Any], name: str, limit: int = _MAX_INDEX) -> int:
    value = fields[name]
    if type(value) is not int or not 0 <= value < limit:
        raise WireError(f"{name} must be a whole number from 0 to {limit - 1}")
    return value


def _seconds(fields: Mapping[str, Any], name: str, limit: float = sys.float_info.max) -> float:
    value = fields[name]
    if type(value) not in (int, float) or not 0 <= value <= limit:
        raise WireError(f"{name} must be a number of seconds from 0 to {limit:g}")
    return float(value)


def _all_strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _dumped_input(stage_input: StageInput, files: list[bytes]) -> dict[str, Any]:
    partitions = []
    for sources in stage_input.partitions:
        dumped = []
        for source in sources:
            key = source.output
            dumped.append(
                [
                    *(source.url, key.query, key.stage, key.task, key.attempt),
                    *(source.partition, source.rows, source.batches, source.size),
                    [len(file) for file in source.files],
                ]
            )
            files.extend(source.files)
        partitions.append(dumped)
    schema = base64.b64encode(stage_input.schema).decode()
    return {"number": stage_input.number, "schema": schema, "partitions": partitions}


def _parsed_input(value: object, body: _Body) -> StageInput:
    if not isinstance(value, dict) or value.keys() != {"number", "schema", "partitions"}:
        raise WireError("an input has exactly the fields number, partitions and schema")
    try:
        return StageInput(
            number=_index(value, "number"),
            schema=base64.b64decode(value["schema"], validate=True),
            partitions=tuple(
                tuple(_parsed_source(source, body) for source in sources)
                for sources in value["partitions"]
            ),
        )
    except WireError:
        raise
    except (TypeError, ValueError) as error:
        raise WireError("malformed input of a task") from error


_SOURCE_FIELDS: Final = (
    *("url", "query", "stage", "task", "attempt"),
    *("partition", "rows", "batches", "size", "files"),
)


def _parsed_source(values: Iterable[object], body: _Body) -> PartitionSource:
    fields: dict[str, Any] = dict(zip(_SOURCE_FIELDS, values, strict=True))
    if not isinstance(fields["url"], str):
        raise WireError("the URL of a source must be a string")
    rows, batches, size = (
        _index(fields, name, limit=1 << 60) for name in ("rows", "batches", "size")
    )
    return PartitionSource(
        fields["url"],
        _output_key(fields),
        _index(fields, "partition"),
        rows,
        batches,
        size,
        tuple(body.take(length) for length in fields["files"]),
    )
