"""The layer that adds headers to every call; the rules of names and values are `_headers`'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from resolver._headers import Headers, NormalHeaders, normalize_headers

from ._layer import Layer

if TYPE_CHECKING:
    from ._call import Call


@dataclass(frozen=True, repr=False)
class RequestHeaders(Layer):
    """Adds headers to every call: a mapping, pairs, or a callable that returns one.

    A callable is asked anew for every call, on the thread that makes it, and must bound its
    own time; what it raises refuses the call. Values are ``str``, or ``bytes`` under names
    that end in ``-bin``. No value appears in its ``repr``.

    Raises TypeError or ValueError for headers that gRPC would not send.
    """

    headers: Headers

    def __post_init__(self) -> None:
        """Refuse what gRPC would not send."""
        if not callable(self.headers):
            object.__setattr__(self, "headers", normalize_headers(self.headers))

    def begin(self, call: Call) -> None:
        """Add the headers."""
        if callable(self.headers):
            call.headers += normalize_headers(self.headers())
        else:
            call.headers += self._normal

    def __repr__(self) -> str:
        """Show names, no values."""
        if callable(self.headers):
            return "RequestHeaders(<a callable>)"
        return f"RequestHeaders({[name for name, _ in self._normal]})"

    @property
    def _normal(self) -> NormalHeaders:
        return cast("NormalHeaders", self.headers)  # since __post_init__
