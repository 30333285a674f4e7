"""Headers that go with every call a query causes: to workers, and from worker to worker.

Only what may be such a header is decided here; who sends them is the executor's and the
worker's business. Values may be secrets: none is in a ``repr`` or an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["PassthroughHeaders"]

_NAME: Final = re.compile(r"[a-z0-9_.-]+")
_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class PassthroughHeaders:
    """Gives the headers of one query each time it is called. As thread-safe as its source.

    ``source`` is a mapping of names to values, copied, or a callable that gives one,
    called once per query. Names are lower-cased. Raises ``ValueError`` for a name or a
    value that cannot be a header of one's own, ``TypeError`` for what is not text; for a
    callable, when it is called.
    """

    __slots__ = ("_source",)

    def __init__(
        self, source: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None
    ) -> None:
        self._source: Callable[[], Mapping[str, str]]
        if callable(source):
            self._source = source
        else:
            headers = _checked({} if source is None else source)
            self._source = lambda: headers

    def __call__(self) -> dict[str, str]:
        return _checked(self._source())

    def __repr__(self) -> str:
        return "PassthroughHeaders(...)"


def _checked(headers: Any) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise TypeError(
            f"passthrough headers are a mapping of names to values, not a {type(headers).__name__}"
        )
    checked = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("the name and the value of a passthrough header are both str")
        lower = name.lower()
        if not _NAME.fullmatch(lower) or lower.startswith("grpc-") or lower.endswith("-bin"):
            raise ValueError(f"{name!r} is no name of a text header of one's own")
        if lower == "authorization":
            raise ValueError("the authorization is the connector's business, not a header's")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"the value of header {name!r} is not printable ASCII")
        checked[lower] = value
    return checked
