"""What a server says when it ends a call that is being written, behind interceptors.

Imported only when grpcio is used.
"""

from __future__ import annotations

from typing import Any

import grpc.aio

__all__ = ["KeepsStatus"]


class KeepsStatus(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]  # untyped
    """The innermost interceptor: a call that the server refused ends as the server said.

    A write that comes too late fails, and grpc.aio then calls the whole call INTERNAL before
    the server's own status is there. Without interceptors ``_client`` writes in its own way.
    """

    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        """Before the first message is sent."""
        call = await continuation(details, requests)
        core = getattr(call, "_cython_call", None)
        if core is not None:
            call._cython_call = _Core(core)  # noqa: SLF001 -- it has no public name
        return call


class _Core:
    """The core of a call, which waits for its status where it would make one up."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def set_internal_error(self, _details: str) -> None:
        pass
