"""DataFusion's plan encoding: read a plan's shape, cut it, and splice it.

The only module that knows how a physical plan looks on the wire. It describes just
the fields it must touch (children, file groups, a few modes) and leaves every other
byte of a plan alone: protobuf carries fields it does not know through parse and
serialize, so expressions, schemas and options arrive exactly as DataFusion wrote them.
The description is built at run time, in a pool of its own; no ``protoc`` is needed and
nothing clashes with another copy of DataFusion's messages in the process.

It must not decide anything: what may run where is the planner's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["FileEntry", "PlanDecodeError", "PlanNode"]

_PACKAGE: Final = "resolver.plan"

# message -> ((field, number, type, repeated), ...). A type that is a message of this
# table nests; enums are read as int32, which is how they travel. Fields are declared
# with explicit presence (proto2), so a zero that DataFusion wrote is written back.
_Field = tuple[str, int, str, bool]
_MESSAGES: Final[dict[str, tuple[_Field, ...]]] = {
    "Opaque": (),
    "Unary": (("input", 1, "PlanNode", False),),
    "Binary": (("left", 1, "PlanNode", False), ("right", 2, "PlanNode", False)),
    "Many": (("inputs", 1, "PlanNode", True),),
    "Extension": (("inputs", 2, "PlanNode", True),),
    "Analyze": (("input", 3, "PlanNode", False),),
    "ScalarSubquery": (
        ("input", 1, "PlanNode", False),
        ("subqueries", 2, "PlanNode", True),
    ),
    "Aggregate": (
        ("mode", 3, "int32", False),
        ("input", 4, "PlanNode", False),
        ("dynamic_filter", 13, "bytes", False),
    ),
    "Sort": (
        ("input", 1, "PlanNode", False),
        ("preserve_partitioning", 4, "bool", False),
        ("dynamic_filter", 5, "bytes", False),
    ),
    "Hash": (("partition_count", 2, "uint64", False),),
    "Partitioning": (("round_robin", 1, "uint64", False), ("hash", 2, "Hash", False)),
    "Repartition": (
        ("input", 1, "PlanNode", False),
        ("partitioning", 5, "Partitioning", False),
        ("preserve_order", 6, "bool", False),
    ),
    "File": (
        ("path", 1, "string", False),
        ("size", 2, "uint64", False),
        ("last_modified_ns", 3, "uint64", False),
    ),
    "FileGroup": (("files", 1, "File", True),),
    "ScanConf": (
        ("file_groups", 1, "FileGroup", True),
        ("object_store_url", 8, "string", False),
        ("partitioned_by_file_group", 14, "bool", False),
        ("output_partitioning", 15, "bytes", False),
    ),
    "Scan": (("base_conf", 1, "ScanConf", False),),
}

# The variants of a plan node: kind -> (field number, message).
_KINDS: Final[dict[str, tuple[int, str]]] = {
    "parquet_scan": (1, "Scan"),
    "csv_scan": (2, "Scan"),
    "empty": (3, "Opaque"),
    "projection": (4, "Unary"),
    "global_limit": (6, "Unary"),
    "local_limit": (7, "Unary"),
    "aggregate": (8, "Aggregate"),
    "hash_join": (9, "Binary"),
    "sort": (10, "Sort"),
    "coalesce_batches": (11, "Unary"),
    "filter": (12, "Unary"),
    "coalesce_partitions": (13, "Unary"),
    "repartition": (14, "Repartition"),
    "window": (15, "Unary"),
    "cross_join": (16, "Binary"),
    "avro_scan": (17, "Scan"),
    "extension": (18, "Extension"),
    "union": (19, "Many"),
    "explain": (20, "Opaque"),
    "sort_preserving_merge": (21, "Unary"),
    "nested_loop_join": (22, "Binary"),
    "analyze": (23, "Analyze"),
    "json_sink": (24, "Unary"),
    "symmetric_hash_join": (25, "Binary"),
    "interleave": (26, "Many"),
    "placeholder_row": (27, "Opaque"),
    "csv_sink": (28, "Unary"),
    "parquet_sink": (29, "Unary"),
    "unnest": (30, "Unary"),
    "json_scan": (31, "Scan"),
    "cooperative": (32, "Unary"),
    "generate_series": (33, "Opaque"),
    "sort_merge_join": (34, "Binary"),
    "memory_scan": (35, "Opaque"),
    "async_func": (36, "Unary"),
    "buffer": (37, "Unary"),
    "arrow_scan": (38, "Scan"),
    "scalar_subquery": (39, "ScalarSubquery"),
}
_SCANS: Final = frozenset(kind for kind, (_, message) in _KINDS.items() if message == "Scan")
_AGGREGATE_PARTIAL: Final = 0


class PlanDecodeError(ValueError):
    """The bytes are not a physical plan of the known encoding."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a scan: absolute ``path``, ``size`` in bytes, ``mtime_ns``."""

    path: str
    size: int
    mtime_ns: int


def _node_class() -> Any:
    proto = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "int32": proto.TYPE_INT32,
        "uint64": proto.TYPE_UINT64,
        "bool": proto.TYPE_BOOL,
        "bytes": proto.TYPE_BYTES,
        "string": proto.TYPE_STRING,
    }
    file = descriptor_pb2.FileDescriptorProto(
        name="resolver/plan.proto", package=_PACKAGE, syntax="proto2"
    )

    def add(message: Any, name: str, number: int, type_: str, repeated: bool) -> Any:
        field = message.field.add(name=name, number=number)
        field.label = proto.LABEL_REPEATED if repeated else proto.LABEL_OPTIONAL
        if type_ in scalars:
            field.type = scalars[type_]
        else:
            field.type = proto.TYPE_MESSAGE
            field.type_name = f".{_PACKAGE}.{type_}"
        return field

    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            add(message, *field)
    node = file.message_type.add(name="PlanNode")
    node.oneof_decl.add(name="kind")
    for kind, (number, type_) in _KINDS.items():
        add(node, kind, number, type_, repeated=False).oneof_index = 0

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.PlanNode"))


_Message: Final = _node_class()


class PlanNode:
    """One node of a physical plan with everything below it. Immutable; edits copy."""

    __slots__ = ("_message",)

    def __init__(self, message: Any) -> None:
        self._message = message

    @classmethod
    def parse(cls, data: bytes) -> PlanNode:
        """Read what ``ExecutionPlan.to_bytes()`` wrote.

        Raises ``PlanDecodeError`` for anything else; protobuf's own limit of 100 levels
        of nesting applies.
        """
        try:
            return cls(_Message.FromString(data))
        except DecodeError as error:
            raise PlanDecodeError(f"not the bytes of a physical plan: {error}") from error

    def to_bytes(self) -> bytes:
        data: bytes = self._message.SerializeToString()
        return data

    @property
    def kind(self) -> str:
        """The variant, such as ``"projection"``; ``"unknown"`` for one not in the table."""
        return self._message.WhichOneof("kind") or "unknown"

    @property
    def children(self) -> tuple[PlanNode, ...]:
        """The inputs, in the order DataFusion lists them."""
        if self.kind == "unknown":
            return ()
        body = self._body()
        children: list[PlanNode] = []
        for name, _, type_, repeated in _MESSAGES[_KINDS[self.kind][1]]:
            if type_ != "PlanNode":
                continue
            if repeated:
                children.extend(PlanNode(child) for child in getattr(body, name))
            elif body.HasField(name):
                children.append(PlanNode(getattr(body, name)))
        return tuple(children)

    def walk(self) -> Iterable[PlanNode]:
        """Yield the node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def _body(self) -> Any:
        return getattr(self._message, self.kind)

    # What the planner asks of a node.

    @property
    def is_scan(self) -> bool:
        """Reads files: the node has file groups, one per partition."""
        return self.kind in _SCANS

    @property
    def is_partial_aggregate(self) -> bool:
        return self.kind == "aggregate" and self._body().mode == _AGGREGATE_PARTIAL

    @property
    def is_partition_wise_sort(self) -> bool:
        """A sort that orders each partition by itself."""
        return self.kind == "sort" and bool(self._body().preserve_partitioning)

    @property
    def is_round_robin(self) -> bool:
        return self.kind == "repartition" and self._body().partitioning.HasField("round_robin")

    @property
    def is_hash_repartition(self) -> bool:
        return self.kind == "repartition" and self._body().partitioning.HasField("hash")

    @property
    def hash_partitions(self) -> int:
        """Output partitions of a hash repartition."""
        return int(self._body().partitioning.hash.partition_count)

    @property
    def preserves_order(self) -> bool:
        """A repartition that merges sorted inputs instead of interleaving them."""
        return self.kind == "repartition" and bool(self._body().preserve_order)

    @property
    def has_dynamic_filter(self) -> bool:
        return self.kind in ("aggregate", "sort") and self._body().HasField("dynamic_filter")

    @property
    def file_groups(self) -> int:
        """Partitions of a file scan."""
        return len(self._body().base_conf.file_groups)

    @property
    def object_store_url(self) -> str:
        return str(self._body().base_conf.object_store_url)

    @property
    def declares_partitioning(self) -> bool:
        """The scan promises how rows are spread over its groups, which a cut would break."""
        conf = self._body().base_conf
        return bool(conf.partitioned_by_file_group) or conf.HasField("output_partitioning")

    # Edits. Each returns a new plan and leaves this one as it is.

    def _copy(self) -> PlanNode:
        message = _Message()
        message.CopyFrom(self._message)
        return PlanNode(message)

    def with_input(self, child: PlanNode) -> PlanNode:
        """The node over another ``child``, for a node that has exactly one."""
        copy = self._copy()
        copy._body().input.CopyFrom(child._message)
        return copy

    def with_file_groups(self, groups: Sequence[int]) -> PlanNode:
        """A scan of only these of its file groups, in this order."""
        copy = self._copy()
        kept = copy._body().base_conf.file_groups
        originals = self._body().base_conf.file_groups
        del kept[:]
        for index in groups:
            kept.add().CopyFrom(originals[index])
        return copy

    def with_files(self, groups: Sequence[Sequence[FileEntry]]) -> PlanNode:
        """A scan of these files instead, one group per partition.

        The entries carry no byte range: with one, DataFusion reads an Arrow file whole
        into memory instead of batch by batch.
        """
        copy = self._copy()
        replaced = copy._body().base_conf.file_groups
        del replaced[:]
        for group in groups:
            files = replaced.add().files
            for entry in group:
                files.add(
                    path=entry.path.lstrip("/"),
                    size=entry.size,
                    last_modified_ns=entry.mtime_ns,
                )
        return copy

    def without_rows(self) -> PlanNode:
        """The same plan with every scan's groups emptied: its schema, and no rows."""
        if self.is_scan:
            return self.with_files([[]] * self.file_groups)
        copy = self._copy()
        for child in copy.children:
            child._message.CopyFrom(child.without_rows()._message)
        return copy

    def coalesced(self) -> PlanNode:
        """The plan's partitions brought into one."""
        message = _Message()
        message.coalesce_partitions.input.CopyFrom(self._message)
        return PlanNode(message)
