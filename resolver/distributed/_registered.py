"""What a session knows by name besides its tables: functions and object stores.

A plan carries only the names of both, so every session that decodes a plan needs the same
ones. A session derived from another starts without them; here they are handed over.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import datafusion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["FUNCTION_KINDS", "ObjectStore", "hand_over_functions"]

_SCHEMA: Final = re.compile(r"[a-z][a-z0-9+.-]*://")
_HOST: Final = re.compile(r"[^/?#@\s]+")


@dataclass(frozen=True, slots=True)
class FunctionKind:
    """How functions of one kind are listed, found and registered."""

    type: type[Any]
    names: Callable[[datafusion.SessionContext], Iterable[str]]
    get: Callable[[datafusion.SessionContext, str], Any]
    register: Callable[[datafusion.SessionContext, Any], None]


# The base's methods, not a subclass's: what is handed over has been looked at already.
_Base: Final = datafusion.SessionContext
FUNCTION_KINDS: Final = {
    "udf": FunctionKind(datafusion.ScalarUDF, _Base.udfs, _Base.udf, _Base.register_udf),
    "udaf": FunctionKind(datafusion.AggregateUDF, _Base.udafs, _Base.udaf, _Base.register_udaf),
    "udwf": FunctionKind(datafusion.WindowUDF, _Base.udwfs, _Base.udwf, _Base.register_udwf),
}
"""Scalar, aggregate and window functions."""


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A store of ``datafusion.object_store`` and where a session finds it.

    ``schema`` is like ``"s3://"``; ``host`` is a bucket, or a host with its port. The
    store, which may hold credentials, is in no ``repr``.
    """

    schema: str
    store: Any = field(repr=False)
    host: str

    def __post_init__(self) -> None:
        if not _SCHEMA.fullmatch(self.schema) or self.schema == "file://":
            raise ValueError(f"{self.schema!r} is no schema of an object store, like 's3://'")
        if not _HOST.fullmatch(self.host):
            # Not shown: it may be a whole URL with a password in it.
            raise ValueError(f"the host of {self.schema} is no bucket name and no host[:port]")

    @property
    def url(self) -> str:
        """How plans name the store."""
        return f"{self.schema}{self.host}/"

    def register(self, context: datafusion.SessionContext) -> None:
        datafusion.SessionContext.register_object_store(context, self.schema, self.store, self.host)


def hand_over_functions(
    source: datafusion.SessionContext, target: datafusion.SessionContext
) -> None:
    """Register in ``target`` every function that was registered in ``source``.

    A function under the name of a built-in one is left out: it cannot be told apart.
    """
    for name, kind in FUNCTION_KINDS.items():
        for function in set(kind.names(source)) - _builtin(name):
            kind.register(target, kind.get(source, function))


@functools.cache
def _builtin(kind: str) -> frozenset[str]:
    return frozenset(FUNCTION_KINDS[kind].names(datafusion.SessionContext()))
