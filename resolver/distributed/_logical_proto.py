"""DataFusion's logical encoding, as far as it tells how a table's files are read.

The physical encoding of a CSV or JSON scan leaves some reader options out; the logical
encoding of the same table has them all. Only the scan of such a table is read here, and
nothing is ever written. What an option means for a distributed plan is ``_sources``'
business, physical plans are ``_plan_proto``'s.

Like there, the description is built at run time, in a pool of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TextScan", "parse_text_scan"]

_PACKAGE: Final = "resolver.logical"

# message -> ((field, number, type), ...), with explicit presence: what DataFusion left at
# its default is absent, except that an unset quote or delimiter is written out.
_MESSAGES: Final = {
    "CsvOptions": (
        ("has_header", 1, "bytes"),
        ("delimiter", 2, "bytes"),
        ("quote", 3, "bytes"),
        ("escape", 4, "bytes"),
        ("compression", 5, "int32"),
        ("schema_infer_max_rec", 6, "uint64"),
        ("date_format", 7, "bytes"),
        ("datetime_format", 8, "bytes"),
        ("timestamp_format", 9, "bytes"),
        ("timestamp_tz_format", 10, "bytes"),
        ("time_format", 11, "bytes"),
        ("null_value", 12, "bytes"),
        ("null_regex", 13, "bytes"),
        ("comment", 14, "bytes"),
        ("double_quote", 15, "bytes"),
        ("newlines_in_values", 16, "bytes"),
        ("terminator", 17, "bytes"),
        ("truncated_rows", 18, "bytes"),
        ("compression_level", 19, "uint64"),
        ("quote_style", 20, "int32"),
        ("ignore_leading_whitespace", 21, "bytes"),
        ("ignore_trailing_whitespace", 22, "bytes"),
    ),
    "JsonOptions": (
        ("compression", 1, "int32"),
        ("schema_infer_max_rec", 2, "uint64"),
        ("compression_level", 3, "uint64"),
        ("newline_delimited", 4, "bool"),
    ),
    "CsvFormat": (("options", 5, "CsvOptions"),),
    "JsonFormat": (("options", 1, "JsonOptions"),),
    "ListingScan": (("csv", 10, "CsvFormat"), ("json", 15, "JsonFormat")),
    "LogicalPlan": (("listing_scan", 1, "ListingScan"),),
}

_COMPRESSIONS: Final = {0: "gzip", 1: "bzip2", 2: "xz", 3: "zstd", 4: "uncompressed"}


@dataclass(frozen=True, slots=True)
class TextScan:
    """The scan of a table of text files.

    ``format`` is ``"csv"`` or ``"json"``. ``options`` are those that differ from
    DataFusion's defaults, as text; one that this module does not know is called
    ``option N`` after its number on the wire.
    """

    format: str
    options: Mapping[str, str]


def parse_text_scan(data: bytes) -> TextScan | None:
    """Read what ``LogicalPlan.to_bytes()`` wrote for one leaf of a plan.

    ``None`` for whatever is not the scan of CSV or JSON files.
    """
    try:
        scan = _Plan.FromString(data).listing_scan
    except DecodeError:
        return None
    if scan.HasField("csv"):
        return TextScan("csv", _options(scan.csv, _csv_default))
    if scan.HasField("json"):
        return TextScan("json", _options(scan.json, _json_default))
    return None


def _options(format_: Any, is_default: Any) -> dict[str, str]:
    options = format_.options
    found = {
        field.name: _shown(field.name, value)
        for field, value in options.ListFields()
        if not is_default(field.name, value)
    }
    # Absent is 0 on the wire, and 0 is no default of these two.
    if not options.HasField("compression"):
        found["compression"] = _COMPRESSIONS[0]
    if "newline_delimited" in options.DESCRIPTOR.fields_by_name and not options.newline_delimited:
        found["newline_delimited"] = "false"
    for message in (format_, options):
        unknown: Any = UnknownFieldSet(message)  # its type stub knows no iteration
        for field in unknown:
            found[f"option {field.field_number}"] = "unknown"
    return found


def _csv_default(name: str, value: object) -> bool:
    defaults = {"delimiter": b",", "quote": b'"', "compression": 4}
    return value == defaults.get(name, b"")


def _json_default(name: str, value: object) -> bool:
    return value == {"compression": 4, "newline_delimited": True}.get(name)


def _shown(name: str, value: Any) -> str:
    if name == "compression":
        return _COMPRESSIONS.get(value, str(value))
    if isinstance(value, bytes):
        if len(value) == 1 and value[0] < 2:  # noqa: PLR2004  # an optional bool
            return str(bool(value[0])).lower()
        return value.decode(errors="backslashreplace")
    return str(value)


def _plan_class() -> Any:
    proto = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "bool": proto.TYPE_BOOL,
        "bytes": proto.TYPE_BYTES,
        "int32": proto.TYPE_INT32,
        "uint64": proto.TYPE_UINT64,
    }
    file = descriptor_pb2.FileDescriptorProto(
        name="resolver/logical.proto", package=_PACKAGE, syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, type_ in fields:
            field = message.field.add(name=field_name, number=number, label=proto.LABEL_OPTIONAL)
            if type_ in scalars:
                field.type = scalars[type_]
            else:
                field.type = proto.TYPE_MESSAGE
                field.type_name = f".{_PACKAGE}.{type_}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.LogicalPlan"))


_Plan: Final = _plan_class()
