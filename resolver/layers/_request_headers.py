"""The layer that adds headers to every call; the rules of names and values are `_headers`'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from resolver._headers import Headers, NormalHeaders, normalize_headers

from ._layer import Layer

if TYPE_CHECKING:
    from ._call import Call


class RequestHeaders(Layer):
    """Adds headers to every call: a mapping, pairs, or a callable that returns one.

    A callable is asked anew for every call, on the thread that makes it, and must bound its
    own time; what it raises refuses the call. Values are ``str``, or ``bytes`` under names
    that end in ``-bin``. No value appears in its ``repr``.

    Raises TypeError or ValueError for headers that gRPC would not send.
    """

    def __init__(self, headers: Headers) -> None:
        self._provider: Final = headers if callable(headers) else None
        self._static: NormalHeaders = () if callable(headers) else normalize_headers(headers)

    def begin(self, call: Call) -> None:
        """Add the headers."""
        static = self._static
        call.headers += static if self._provider is None else normalize_headers(self._provider())

    def __repr__(self) -> str:
        shown = "a callable" if self._provider is not None else [name for name, _ in self._static]
        return f"RequestHeaders({shown})"
