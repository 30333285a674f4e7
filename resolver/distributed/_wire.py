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
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "EXECUTE_TASK",
    "RELEASE_QUERY",
    "WORKER_INFO",
    "OutputKey",
    "PartitionReport",
    "PartitionTicket",
    "TaskReport",
    "TaskRequest",
    "WireError",
    "parse_query_id",
]

EXECUTE_TASK: Final = "resolver.execute_task"
RELEASE_QUERY: Final = "resolver.release_query"
WORKER_INFO: Final = "resolver.worker_info"

_MAX_HEADER_BYTES: Final = 1 << 20
_MAX_REPORT_BYTES: Final = 1 << 26  # the schema of a very wide table is in it
_MAX_INDEX: Final = 1 << 20
_QUERY_ID: Final = re.compile(r"[0-9a-f]{32}")


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
    """One output partition of a task: the content of a Flight ticket."""

    output: OutputKey
    partition: int

    def to_bytes(self) -> bytes:
        return _dump({**asdict(self.output), "partition": self.partition})

    @classmethod
    def parse(cls, data: bytes) -> PartitionTicket:
        fields = _load(data, {"query", "stage", "task", "attempt", "partition"})
        return cls(_output_key(fields), _index(fields, "partition"))


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Run ``plan`` and keep its output as ``output`` until the query is released.

    ``settings`` are the DataFusion options in which the coordinator's session differs
    from the defaults, so that the plan means the same on both sides.
    """

    output: OutputKey
    plan: bytes
    settings: Mapping[str, str]

    def to_bytes(self) -> bytes:
        header = _dump({**asdict(self.output), "settings": dict(self.settings)})
        return header + b"\n" + self.plan

    @classmethod
    def parse(cls, data: bytes) -> TaskRequest:
        header, newline, plan = data.partition(b"\n")
        if not newline:
            raise WireError("a task request is a line of JSON followed by the bytes of a plan")
        fields = _load(header, {"query", "stage", "task", "attempt", "settings"})
        settings = fields["settings"]
        if not isinstance(settings, dict) or not all(
            isinstance(value, str) for value in settings.values()
        ):
            raise WireError("settings must be an object of strings")
        return cls(_output_key(fields), plan, settings)


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What one partition came to; ``bytes`` is its size on the worker's disk."""

    rows: int
    batches: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The outcome of a task.

    ``schema`` is the Arrow schema the plan declares, serialized, or ``None`` when no
    partition gave a batch: DataFusion shows a schema only with the first one.
    ``seconds`` is the time the task ran on the worker.
    """

    partitions: tuple[PartitionReport, ...]
    schema: bytes | None
    seconds: float

    def to_bytes(self) -> bytes:
        schema = None if self.schema is None else base64.b64encode(self.schema).decode()
        return _dump(
            {
                "partitions": [[p.rows, p.batches, p.bytes] for p in self.partitions],
                "schema": schema,
                "seconds": self.seconds,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> TaskReport:
        fields = _load(data, {"partitions", "schema", "seconds"}, limit=_MAX_REPORT_BYTES)
        try:
            partitions = tuple(
                PartitionReport(int(rows), int(batches), int(size))
                for rows, batches, size in fields["partitions"]
            )
            encoded = fields["schema"]
            schema = None if encoded is None else base64.b64decode(encoded, validate=True)
            return cls(partitions, schema, float(fields["seconds"]))
        except (TypeError, ValueError, binascii.Error) as error:
            raise WireError(f"malformed task report: {error}") from error


def parse_query_id(data: bytes) -> str:
    """The body of ``RELEASE_QUERY``."""
    try:
        return _query_id(data.decode("ascii"))
    except UnicodeDecodeError as error:
        raise WireError("a query id is 32 hexadecimal digits") from error


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


def _index(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if type(value) is not int or not 0 <= value < _MAX_INDEX:
        raise WireError(f"{name} must be a whole number from 0 to {_MAX_INDEX - 1}")
    return value
