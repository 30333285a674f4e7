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

import enum
import itertools
import pickletools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "AggregateMode",
    "FileEntry",
    "JoinType",
    "PlanDecodeError",
    "PlanNode",
    "WindowFunction",
    "column_expression",
    "python_functions",
]

_PACKAGE: Final = "resolver.plan"

# message -> ((field, number, type, repeated), ...). A type that is a message of this
# table nests; enums are read as int32, which is how they travel. Fields are declared
# with explicit presence (proto2), so a zero that DataFusion wrote is written back.
# "child" is the encoding of another plan node: kept as bytes until somebody asks for it.
_Field = tuple[str, int, str, bool]
_MESSAGES: Final[dict[str, tuple[_Field, ...]]] = {
    "Opaque": (),
    "Unary": (("input", 1, "child", False),),
    "Limited": (("input", 1, "child", False), ("fetch", 2, "int64", False)),
    "GlobalLimit": (("input", 1, "child", False), ("fetch", 3, "int64", False)),
    "Merge": (
        ("input", 1, "child", False),
        ("keys", 2, "SortExpression", True),
        ("fetch", 3, "int64", False),
    ),
    "Binary": (("left", 1, "child", False), ("right", 2, "child", False)),
    "Many": (("inputs", 1, "child", True),),
    "Extension": (("inputs", 2, "child", True),),
    "Analyze": (("input", 3, "child", False),),
    "ScalarSubquery": (("input", 1, "child", False), ("subqueries", 2, "child", True)),
    "Aggregate": (
        ("group_by", 1, "bytes", True),
        ("functions", 2, "Expression", True),
        ("mode", 3, "int32", False),
        ("input", 4, "child", False),
        ("input_schema", 7, "Schema", False),
        ("dynamic_filter", 13, "bytes", False),
    ),
    "AggregateCall": (("arguments", 2, "Expression", True), ("name", 4, "string", False)),
    "Schema": (("columns", 1, "SchemaField", True),),
    "SchemaField": (("type", 2, "Type", False),),
    # Of the types only those of which a sum, or which of two equal ones is kept, may depend
    # on their order.
    "Type": (
        ("float16", 11, "Opaque", False),
        ("float32", 12, "Opaque", False),
        ("float64", 13, "Opaque", False),
        ("list", 25, "Opaque", False),
        ("large_list", 26, "Opaque", False),
        ("fixed_size_list", 27, "Opaque", False),
        ("struct", 28, "Opaque", False),
        ("union", 29, "Opaque", False),
        ("dictionary", 30, "Opaque", False),
        ("map", 33, "Opaque", False),
    ),
    "Sort": (
        ("input", 1, "child", False),
        ("keys", 2, "SortExpression", True),
        ("fetch", 3, "int64", False),
        ("preserve_partitioning", 4, "bool", False),
        ("dynamic_filter", 5, "bytes", False),
    ),
    "SortExpression": (("sort", 10, "SortKey", False),),
    "SortKey": (
        ("expression", 1, "bytes", False),
        ("ascending", 2, "bool", False),
        ("nulls_first", 3, "bool", False),
    ),
    "Window": (
        ("input", 1, "child", False),
        ("functions", 2, "WindowFunction", True),
        ("partition_keys", 5, "bytes", True),
    ),
    "WindowFunction": (("order_by", 6, "SortKey", True), ("name", 8, "string", False)),
    "HashJoin": (
        ("left", 1, "child", False),
        ("right", 2, "child", False),
        ("on", 3, "JoinOn", True),
        ("join_type", 4, "int32", False),
        ("mode", 6, "int32", False),
        ("filter", 8, "bytes", False),
        ("projection", 9, "bytes", False),  # numbers, packed
        ("null_aware", 10, "bool", False),
        ("dynamic_filter", 11, "bytes", False),
        ("fetch", 12, "uint64", False),
    ),
    "NestedLoopJoin": (
        ("left", 1, "child", False),
        ("right", 2, "child", False),
        ("join_type", 3, "int32", False),
    ),
    "Projection": (
        ("input", 1, "child", False),
        ("expressions", 2, "Expression", True),
        ("names", 3, "string", True),
    ),
    "Expression": (("column", 1, "Column", False), ("aggregate", 4, "AggregateCall", False)),
    "Column": (("name", 1, "string", False), ("index", 2, "uint32", False)),
    "JoinOn": (("left", 1, "bytes", False), ("right", 2, "bytes", False)),
    "Hash": (("expressions", 1, "bytes", True), ("partition_count", 2, "uint64", False)),
    "Partitioning": (("round_robin", 1, "uint64", False), ("hash", 2, "Hash", False)),
    "Repartition": (
        ("input", 1, "child", False),
        ("partitioning", 5, "Partitioning", False),
        ("preserve_order", 6, "bool", False),
    ),
    "File": (
        ("path", 1, "string", False),
        ("size", 2, "uint64", False),
        ("last_modified_ns", 3, "uint64", False),
        ("range", 5, "FileRange", False),
    ),
    "FileRange": (("start", 1, "int64", False), ("end", 2, "int64", False)),
    "FileGroup": (("files", 1, "File", True),),
    "Statistics": (("rows", 1, "Precision", False),),
    "Precision": (("info", 1, "int32", False), ("value", 2, "Scalar", False)),
    "Scalar": (("uint64", 11, "uint64", False),),
    "ScanLimit": (("limit", 1, "uint64", False),),
    "ScanConf": (
        ("file_groups", 1, "FileGroup", True),
        ("limit", 5, "ScanLimit", False),
        ("statistics", 6, "Statistics", False),
        ("object_store_url", 8, "string", False),
        ("partitioned_by_file_group", 14, "bool", False),
        ("output_partitioning", 15, "bytes", False),
    ),
    "Scan": (("base_conf", 1, "ScanConf", False),),
    "MemoryScan": (("partitions", 1, "bytes", True),),
    "Placeholder": (("schema", 1, "bytes", False),),
    "StageInput": (("number", 1, "uint64", False),),
}

# The variants of a plan node: kind -> (field number, message).
_KINDS: Final[dict[str, tuple[int, str]]] = {
    "parquet_scan": (1, "Scan"),
    "csv_scan": (2, "Scan"),
    "empty": (3, "Opaque"),
    "projection": (4, "Projection"),
    "global_limit": (6, "GlobalLimit"),
    "local_limit": (7, "Limited"),
    "aggregate": (8, "Aggregate"),
    "hash_join": (9, "HashJoin"),
    "sort": (10, "Sort"),
    "coalesce_batches": (11, "Unary"),
    "filter": (12, "Unary"),
    "coalesce_partitions": (13, "Limited"),
    "repartition": (14, "Repartition"),
    "window": (15, "Window"),
    "cross_join": (16, "Binary"),
    "avro_scan": (17, "Scan"),
    "extension": (18, "Extension"),
    "union": (19, "Many"),
    "explain": (20, "Opaque"),
    "sort_preserving_merge": (21, "Merge"),
    "nested_loop_join": (22, "NestedLoopJoin"),
    "analyze": (23, "Analyze"),
    "json_sink": (24, "Unary"),
    "symmetric_hash_join": (25, "Binary"),
    "interleave": (26, "Many"),
    "placeholder_row": (27, "Placeholder"),
    "csv_sink": (28, "Unary"),
    "parquet_sink": (29, "Unary"),
    "unnest": (30, "Unary"),
    "json_scan": (31, "Scan"),
    "cooperative": (32, "Unary"),
    "generate_series": (33, "Opaque"),
    "sort_merge_join": (34, "Binary"),
    "memory_scan": (35, "MemoryScan"),
    "async_func": (36, "Unary"),
    "buffer": (37, "Unary"),
    "arrow_scan": (38, "Scan"),
    "scalar_subquery": (39, "ScalarSubquery"),
    # Not DataFusion's: stands for the output of another stage until a task reads it.
    "stage_input": (19_000_001, "StageInput"),
}
_SCANS: Final = frozenset(kind for kind, (_, message) in _KINDS.items() if message == "Scan")
_CHILDREN: Final = {
    kind: tuple(
        (name, repeated) for name, _, type_, repeated in _MESSAGES[message] if type_ == "child"
    )
    for kind, (_, message) in _KINDS.items()
}


_FILTERING: Final = frozenset(
    kind
    for kind, (_, message) in _KINDS.items()
    if any(name == "dynamic_filter" for name, _, _, _ in _MESSAGES[message])
)

_FETCHING: Final = frozenset(
    kind
    for kind, (_, message) in _KINDS.items()
    if any(name == "fetch" for name, _, _, _ in _MESSAGES[message])
)

_JOINS: Final = frozenset({"cross_join", "hash_join", "nested_loop_join"})

# Of these, all but the first give the same in any order only of some types.
_EXACT: Final = frozenset({"count", "bool_and", "bool_or", "bit_and", "bit_or", "bit_xor"})
_EXACT_OF_COLUMNS: Final = frozenset({"avg", "max", "min", "sum"})


class AggregateMode(enum.IntEnum):
    """How an aggregation is split over partitions, as DataFusion numbers it."""

    PARTIAL = 0
    FINAL = 1
    FINAL_PARTITIONED = 2
    SINGLE = 3
    SINGLE_PARTITIONED = 4
    PARTIAL_REDUCE = 5


class JoinType(enum.IntEnum):
    """Join types as DataFusion numbers them; left is the build side of a join."""

    INNER = 0
    LEFT = 1
    RIGHT = 2
    FULL = 3
    LEFT_SEMI = 4
    LEFT_ANTI = 5
    RIGHT_SEMI = 6
    RIGHT_ANTI = 7
    LEFT_MARK = 8
    RIGHT_MARK = 9


_ABSENT: Final = 2  # of a statistic; otherwise it is exact, or an estimate from above
_COLLECT_LEFT: Final = 0
_SLIVER: Final = 0.1  # of what a group of files reads on average
_PARTITIONED: Final = 1


def _length(file: Any) -> int:
    """Bytes that are read of a file."""
    length: int = file.range.end - file.range.start if file.HasField("range") else file.size
    return length


def _continues(file: Any, other: Any) -> bool:
    """Whether ``other`` is a range of the same file, right behind."""
    if not (file.HasField("range") and other.HasField("range")):
        return False
    return bool(file.path == other.path and file.range.end == other.range.start)


class PlanDecodeError(ValueError):
    """The bytes are not a physical plan of the known encoding."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a scan: absolute ``path``, ``size`` in bytes, ``mtime_ns``."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class WindowFunction:
    """One function of a window node. ``name`` tells how it was asked for, ``order`` how it runs.

    ``order`` has (ascending, NULLs first) for each of its ORDER BY, ``order_keys`` what it
    orders by, encoded.
    """

    name: str
    order: tuple[tuple[bool, bool], ...]
    order_keys: tuple[bytes, ...]


# A Python function in a plan: this, a version, the interpreter's, and a pickle that begins
# with the function's name.
_PYTHON_FUNCTION: Final = re.compile(rb"DFPYUD[FAW]\x01..(?=\x80)", re.DOTALL)


def python_functions(data: bytes) -> frozenset[str]:
    """Names of the Python functions that are pickled in plan bytes; nothing is unpickled.

    Raises ``PlanDecodeError`` for one that tells no name.
    """
    names = set()
    for found in _PYTHON_FUNCTION.finditer(data):
        try:
            operations = pickletools.genops(data[found.end() :])
            names.add(next(str(value) for _, value, _ in operations if isinstance(value, str)))
        except (StopIteration, ValueError) as error:
            raise PlanDecodeError("a Python function in the plan tells no name") from error
    return frozenset(names)


# A call of a scalar function: an expression of that kind, its length, and first in it the
# name, or what comes after one that is empty. Other bytes may happen to look like one.
_SCALAR_CALL: Final = re.compile(
    rb"(?=\x82\x01[\x80-\xff]{0,4}[\x00-\x7f](?:\n(.)|[\x12\x1a\x22]))", re.DOTALL
)


def column_expression(name: str, index: int) -> bytes:
    """A column of a node's input, encoded as an expression."""
    expression = _Expression()
    expression.column.name, expression.column.index = name, index
    encoded: bytes = expression.SerializeToString()
    return encoded


def _classes() -> tuple[Any, Any]:
    proto = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "int32": proto.TYPE_INT32,
        "int64": proto.TYPE_INT64,
        "uint32": proto.TYPE_UINT32,
        "uint64": proto.TYPE_UINT64,
        "bool": proto.TYPE_BOOL,
        "bytes": proto.TYPE_BYTES,
        "child": proto.TYPE_BYTES,
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
    found = [
        pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in ("PlanNode", "Expression")
    ]
    node_class, expression_class = map(message_factory.GetMessageClass, found)
    return node_class, expression_class


_Message, _Expression = _classes()


class PlanNode:
    """One node of a physical plan with everything below it. Immutable; edits copy."""

    __slots__ = ("_message", "kind")

    def __init__(self, message: Any) -> None:
        self._message = message
        # The variant, such as "projection"; "unknown" for one not in the table.
        self.kind: str = message.WhichOneof("kind") or "unknown"

    @classmethod
    def parse(cls, data: bytes) -> PlanNode:
        """Read what ``ExecutionPlan.to_bytes()`` wrote.

        Raises ``PlanDecodeError`` for anything else, for a node's children once they are
        asked for.
        """
        try:
            return cls(_Message.FromString(data))
        except DecodeError as error:
            raise PlanDecodeError(f"not the bytes of a physical plan: {error}") from error

    @classmethod
    def stage_input(cls, number: int) -> PlanNode:
        """A leaf that stands for the output of stage ``number``."""
        message = _Message()
        message.stage_input.number = number
        return cls(message)

    @classmethod
    def hash_repartition(cls, expressions: Sequence[bytes], partitions: int) -> PlanNode:
        """A repartition by the hash of these encoded expressions, without an input yet."""
        message = _Message()
        scheme = message.repartition.partitioning.hash
        scheme.expressions.extend(expressions)
        scheme.partition_count = partitions
        return cls(message)

    @classmethod
    def projection(cls, columns: Sequence[tuple[str, int]], names: Sequence[str]) -> PlanNode:
        """These columns, by name and index, under other names; without an input yet."""
        message = _Message()
        message.projection.names.extend(names)
        for name, index in columns:
            column = message.projection.expressions.add().column
            column.name, column.index = name, index
        return cls(message)

    @classmethod
    def coalesce(cls) -> PlanNode:
        """All partitions brought into one, without an input yet."""
        message = _Message()
        message.coalesce_partitions.SetInParent()
        return cls(message)

    def to_bytes(self) -> bytes:
        data: bytes = self._message.SerializeToString()
        return data

    @property
    def children(self) -> tuple[PlanNode, ...]:
        """The inputs, in the order DataFusion lists them."""
        if self.kind == "unknown":
            return ()
        body = self._body()
        children: list[PlanNode] = []
        for name, repeated in _CHILDREN[self.kind]:
            if repeated:
                children.extend(PlanNode.parse(child) for child in getattr(body, name))
            elif body.HasField(name):
                children.append(PlanNode.parse(getattr(body, name)))
        return tuple(children)

    def walk(self) -> Iterator[PlanNode]:
        """Yield the node and all below it, parents first. For plans of any depth."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))

    def _body(self) -> Any:
        return getattr(self._message, self.kind)

    # What the planner asks of a node.

    @property
    def is_scan(self) -> bool:
        """Reads files: the node has file groups, one per partition."""
        return self.kind in _SCANS

    @property
    def aggregate_mode(self) -> int:
        """The ``AggregateMode`` of an aggregate; -1 for any other node."""
        return int(self._body().mode) if self.kind == "aggregate" else -1

    @property
    def is_partition_wise_sort(self) -> bool:
        """A sort that orders each partition by itself."""
        return self.kind == "sort" and bool(self._body().preserve_partitioning)

    @property
    def is_partitioned_window(self) -> bool:
        """A window function with PARTITION BY."""
        return self.kind == "window" and len(self._body().partition_keys) > 0

    @property
    def is_round_robin(self) -> bool:
        return self.kind == "repartition" and self._body().partitioning.HasField("round_robin")

    @property
    def partition_keys(self) -> tuple[bytes, ...]:
        """What a window node divides its rows by, encoded."""
        return tuple(self._body().partition_keys)

    @property
    def window_functions(self) -> tuple[WindowFunction, ...]:
        """What a window node computes."""
        return tuple(
            WindowFunction(
                each.name,
                tuple((key.ascending, key.nulls_first) for key in each.order_by),
                tuple(key.expression for key in each.order_by),
            )
            for each in self._body().functions
        )

    @property
    def sort_keys(self) -> tuple[bytes, ...]:
        """What a sort or a merge orders by, encoded; of any other node nothing."""
        if self.kind not in {"sort", "sort_preserving_merge"}:
            return ()
        return tuple(key.sort.expression for key in self._body().keys)

    @property
    def is_hash_repartition(self) -> bool:
        return self.kind == "repartition" and self._body().partitioning.HasField("hash")

    @property
    def divides_into(self) -> int:
        """Output partitions of a repartition by hash or in turn; 1 of any other node."""
        if self.kind != "repartition":
            return 1
        partitioning = self._body().partitioning
        return int(partitioning.round_robin or partitioning.hash.partition_count)

    @property
    def hash_partitions(self) -> int:
        """Output partitions of a hash repartition."""
        return int(self._body().partitioning.hash.partition_count)

    @property
    def hash_expressions(self) -> tuple[bytes, ...]:
        """What a hash repartition hashes, encoded."""
        return tuple(self._body().partitioning.hash.expressions)

    @property
    def join_keys(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """What a hash join compares, encoded: of its left side and of its right."""
        on = self._body().on
        return tuple(key.left for key in on), tuple(key.right for key in on)

    @property
    def left_key_columns(self) -> tuple[tuple[str, int], ...]:
        """What a hash join compares of its left side, by name and index.

        Nothing if some of it is computed.
        """
        columns = [_Expression.FromString(key.left) for key in self._body().on]
        if not all(key.HasField("column") for key in columns):
            return ()
        return tuple((key.column.name, key.column.index) for key in columns)

    @property
    def compares_keys_only(self) -> bool:
        """A hash join without conditions beyond its keys."""
        return self.kind == "hash_join" and not self._body().HasField("filter")

    @property
    def group_keys(self) -> tuple[bytes, ...]:
        """What an aggregation groups by, encoded."""
        return tuple(self._body().group_by)

    @property
    def is_exact_aggregate(self) -> bool:
        """An aggregation that gives the same whatever the order of its rows."""
        body = self._body()
        types = [column.type for column in body.input_schema.columns]

        def is_exact(column: Any) -> bool:
            index = column.column.index
            return (
                column.HasField("column") and index < len(types) and not types[index].ListFields()
            )

        return all(
            call.name in _EXACT
            or (call.name in _EXACT_OF_COLUMNS and all(map(is_exact, call.arguments)))
            for call in (each.aggregate for each in body.functions)
        )

    @property
    def scalar_functions(self) -> frozenset[str]:
        """Names of the scalar functions that the node alone calls, and perhaps of some more."""
        node = self.bare()
        if node.is_scan:
            node = node.with_file_groups([])
        elif node.kind == "memory_scan":
            node = node.with_memory_partitions([])
        data = node.to_bytes()
        return frozenset(
            data[match.end(1) : match.end(1) + match[1][0]].decode(errors="replace")
            if match[1]
            else ""
            for match in _SCALAR_CALL.finditer(data)
        )

    @property
    def preserves_order(self) -> bool:
        """A repartition that merges sorted inputs instead of interleaving them."""
        return self.kind == "repartition" and bool(self._body().preserve_order)

    @property
    def join_type(self) -> int:
        """The ``JoinType`` of a hash join or a nested-loop join."""
        return int(self._body().join_type)

    @property
    def is_partitioned_join(self) -> bool:
        """A hash join of partition k with partition k, under either side's hash."""
        return self.kind == "hash_join" and self._body().mode == _PARTITIONED

    @property
    def is_null_aware(self) -> bool:
        """A NOT IN, which depends on a NULL anywhere on its other side."""
        return self.kind == "hash_join" and bool(self._body().null_aware)

    @property
    def fetch(self) -> int | None:
        """How many rows pass at most, of each partition; ``None``: not known to be limited."""
        if self.is_scan:
            conf = self._body().base_conf
            return int(conf.limit.limit) if conf.HasField("limit") else None
        if self.kind not in _FETCHING or not self._body().HasField("fetch"):
            return None
        fetch = int(self._body().fetch)
        return None if fetch < 0 else fetch

    @property
    def file_groups(self) -> int:
        """Partitions of a file scan."""
        return len(self._body().base_conf.file_groups)

    @property
    def file_ranges(self) -> int:
        """Files, or byte ranges of files, that a scan reads."""
        return sum(len(group.files) for group in self._body().base_conf.file_groups)

    @property
    def file_bytes(self) -> int:
        """Size of the files that a scan reads, counted once for every range of them."""
        groups = self._body().base_conf.file_groups
        return sum(file.size for group in groups for file in group.files)

    @property
    def file_rows(self) -> int | None:
        """Rows in the files that a scan reads, before any filter; ``None``: not known."""
        rows = self._body().base_conf.statistics.rows
        if rows.info == _ABSENT or not rows.value.HasField("uint64"):
            return None
        return int(rows.value.uint64)

    @property
    def memory_partitions(self) -> tuple[int, ...]:
        """Size in bytes of each partition of an in-memory table."""
        return tuple(len(partition) for partition in self._body().partitions)

    @property
    def object_store_url(self) -> str:
        return str(self._body().base_conf.object_store_url)

    @property
    def declares_partitioning(self) -> bool:
        """The scan promises how rows are spread over its groups, which a cut would break."""
        conf = self._body().base_conf
        return bool(conf.partitioned_by_file_group) or conf.HasField("output_partitioning")

    @property
    def stage_number(self) -> int:
        """Which stage a ``stage_input`` stands for."""
        return int(self._body().number)

    # Edits. Each returns a new plan and leaves this one as it is.

    def _copy(self) -> PlanNode:
        message = _Message()
        message.CopyFrom(self._message)
        return PlanNode(message)

    def bare(self) -> PlanNode:
        """The node alone, without children, and without a filter that it fills in as it runs.

        Only what is below it in the same process could make use of that filter.
        """
        copy = self.over()
        if self.kind in _FILTERING:
            copy._body().ClearField("dynamic_filter")
        return copy

    def over(self, *children: PlanNode) -> PlanNode:
        """The node over other ``children``; a repeated field takes what the others leave."""
        return self.over_encoded([child.to_bytes() for child in children])

    def over_encoded(self, children: Sequence[bytes]) -> PlanNode:
        """``over``, for children that have been encoded already."""
        copy = self._copy()
        if self.kind == "unknown":
            return copy
        body, rest = copy._body(), list(children)
        for name, repeated in _CHILDREN[self.kind]:
            if repeated:
                del getattr(body, name)[:]
                getattr(body, name).extend(rest)
                rest = []
            elif rest:
                setattr(body, name, rest.pop(0))
            else:
                body.ClearField(name)
        return copy

    def collecting_left(self) -> PlanNode:
        """A partitioned hash join as one that holds its whole left side in every task."""
        copy = self._copy()
        copy._body().mode = _COLLECT_LEFT
        return copy

    def finding_partners(self, join_type: JoinType) -> PlanNode:
        """A hash join as one that keeps the rows of one side that have its keys' partners.

        Its whole left side is in every task. Conditions beyond the keys are left out, and so
        is a limit: of the rows that pass here, the join itself may drop some.
        """
        copy = self.collecting_left()
        body = copy._body()
        body.join_type = join_type
        for name in ("filter", "projection", "null_aware", "dynamic_filter", "fetch"):
            body.ClearField(name)
        return copy

    def with_right_keys(self, keys: Sequence[bytes]) -> PlanNode:
        """A hash join that compares these of its right side."""
        copy = self._copy()
        for on, key in zip(copy._body().on, keys, strict=True):
            on.right = key
        return copy

    @property
    def read_bytes(self) -> int:
        """Bytes of files that a scan reads: of a range, those of the range."""
        groups = self._body().base_conf.file_groups
        return sum(_length(file) for group in groups for file in group.files)

    def with_file_groups(self, groups: Sequence[int]) -> PlanNode:
        """A scan of only these of its file groups, in this order."""
        copy = self._copy()
        kept = copy._body().base_conf.file_groups
        originals = self._body().base_conf.file_groups
        del kept[:]
        for index in groups:
            kept.add().CopyFrom(originals[index])
        return copy

    def with_whole_files(self) -> PlanNode:
        """A scan without slivers: where its groups cut off little of a file, they do not.

        Groups are cut at bytes, and a Parquet row group is read by whoever has its first byte:
        with the first thousand bytes of a file goes a large part of its rows.
        """
        copy = self._copy()
        groups = copy._body().base_conf.file_groups
        pieces = [_length(file) for group in groups for file in group.files]
        least = _SLIVER * sum(pieces) / max(1, len(groups))
        for before, after in itertools.pairwise(groups):
            if not before.files or not after.files:
                continue
            last, first = before.files[-1], after.files[0]
            if not _continues(last, first):
                continue
            if _length(last) < least and len(before.files) > 1:
                first.range.start = last.range.start
                del before.files[-1]
            elif _length(first) < least and len(after.files) > 1:
                last.range.end = first.range.end
                del after.files[0]
        return copy

    def with_file_groups_merged(self, count: int) -> PlanNode:
        """A scan with each ``count`` adjacent file groups as one."""
        copy = self._copy()
        merged = copy._body().base_conf.file_groups
        originals = self._body().base_conf.file_groups
        del merged[:]
        for first in range(0, len(originals), count):
            files = merged.add().files
            for group in originals[first : first + count]:
                for file in group.files:
                    last = files[-1] if files else None
                    if last is not None and _continues(last, file):
                        last.range.end = file.range.end
                    else:
                        files.add().CopyFrom(file)
        return copy

    def with_memory_partitions(self, partitions: Sequence[int]) -> PlanNode:
        """An in-memory table of only these of its partitions, in this order."""
        copy = self._copy()
        originals = self._body().partitions
        del copy._body().partitions[:]
        copy._body().partitions.extend(originals[index] for index in partitions)
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

    def renamed(self, old: Sequence[str], new: Sequence[str]) -> PlanNode:
        """The plan's columns, ``old`` by name, under other names, which may repeat."""
        return PlanNode.projection([(name, i) for i, name in enumerate(old)], new).over(self)

    def replaced(self, replace: Callable[[PlanNode], PlanNode | None]) -> PlanNode:
        """The plan with every node for which ``replace`` gives another replaced by that."""
        other = replace(self)
        if other is not None:
            return other
        children = self.children
        if not children:
            return self
        return self.over(*(child.replaced(replace) for child in children))

    def without_rows(self) -> PlanNode:
        """The same plan over scans and in-memory tables of no rows: its schema, and few rows."""

        def emptied(node: PlanNode) -> PlanNode | None:
            if node.is_scan:
                return node.with_files([[]] * node.file_groups)
            return node._without_memory() if node.kind == "memory_scan" else None

        return self.replaced(emptied)

    def _without_memory(self) -> PlanNode:
        return self._with_memory(lambda _: b"")

    def _with_memory(self, change: Callable[[bytes], bytes]) -> PlanNode:
        copy = self._copy()
        partitions = copy._body().partitions
        partitions[:] = [change(partition) for partition in partitions]
        return copy

    def with_memory(self, change: Callable[[bytes], bytes]) -> PlanNode:
        """The plan with ``change`` made to every partition of its in-memory tables.

        A partition is a stream in Arrow's IPC format, or nothing.
        """
        return self.replaced(
            lambda node: node._with_memory(change) if node.kind == "memory_scan" else None
        )

    def cooperating(self) -> PlanNode:
        """The plan with every join giving way to others now and then.

        DataFusion has only its leaves do so. A join that makes millions of rows of one
        batch holds its thread meanwhile, and cannot be stopped either.
        """
        if not self.children:
            return self
        node = self.over(*(child.cooperating() for child in self.children))
        if self.kind not in _JOINS:
            return node
        message = _Message()
        message.cooperative.input = node.to_bytes()
        return PlanNode(message)

    @property
    def is_cooperating_join(self) -> bool:
        """What ``cooperating()`` puts over a join."""
        return self.kind == "cooperative" and self.children[0].kind in _JOINS

    def coalesced(self) -> PlanNode:
        """The plan's partitions brought into one."""
        message = _Message()
        message.coalesce_partitions.input = self.to_bytes()
        return PlanNode(message)

    def always_one_row(self) -> PlanNode:
        """One batch of one or more rows with the columns of this plan, even if it has none.

        A left join of a row without columns: DataFusion shows a schema with a batch only.
        The columns come out nullable, whatever they were.
        """
        row, join = _Message(), _Message()
        row.placeholder_row.schema = b""
        join.nested_loop_join.left = row.SerializeToString()
        join.nested_loop_join.right = self.coalesced().to_bytes()
        join.nested_loop_join.join_type = JoinType.LEFT
        return PlanNode(join)
