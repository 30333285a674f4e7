"""Functions that look like DataFusion's own on the wire, and are not.

A function travels by its name. A Spark function, or a native one from another library,
that bears the name of a built-in would run as that built-in on a worker: same plan, other
rows. Nothing in a plan tells them apart, so what brings them into a session, or into this
process, is noted here instead. (Python functions are told apart by their encoding.)
"""

from __future__ import annotations

import functools
from typing import Any

import datafusion
from datafusion.functions import spark

__all__ = ["bears_a_builtin_name", "spark_functions_were_used"]


class _Noting:
    """Stands in for what DataFusion's Spark functions are looked up in, and takes note."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        self.was_asked = False

    def __getattr__(self, name: str) -> Any:
        self.was_asked = True
        return getattr(self._functions, name)


def spark_functions_were_used() -> bool:
    """Whether this process has built any expression with ``datafusion.functions.spark``."""
    return _spark.was_asked


def bears_a_builtin_name(function: Any) -> bool:
    """Whether a scalar, aggregate or window function to register shadows a built-in."""
    name: str = function.name
    return name.lower() in _builtin_names()


@functools.cache
def _builtin_names() -> frozenset[str]:
    config = datafusion.SessionConfig().with_information_schema(True)
    names = datafusion.SessionContext(config).sql(
        "SELECT DISTINCT routine_name FROM information_schema.routines"
    )
    return frozenset(name.lower() for name in names.to_pydict()["routine_name"])


_spark = _Noting(spark._f)  # its functions all go through this name of the pinned version
spark._f = _spark
