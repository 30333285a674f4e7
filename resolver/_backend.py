"""Picks the compiled cache or its Python twin, once, and says which.

``IMPLEMENTATION`` is ``"compiled"`` or ``"python"``. The environment variable
``RESOLVER_BACKEND`` with one of these values forces the choice; forcing ``compiled``
where the extension was not built is an ImportError, never a silent fallback; and an
extension that was built but does not load is an error in any case.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

IMPLEMENTATION: Literal["compiled", "python"]

_wanted = os.environ.get("RESOLVER_BACKEND", "")

if _wanted not in ("", "compiled", "python"):
    raise ImportError(f"RESOLVER_BACKEND is {_wanted!r}; use 'compiled', 'python' or unset it")

if TYPE_CHECKING:
    from ._cache_py import ClientCache, fast_hits, leak
elif _wanted == "python":
    from ._cache_py import ClientCache, fast_hits, leak

    IMPLEMENTATION = "python"
else:
    try:
        from ._cache import ClientCache, fast_hits, leak

        IMPLEMENTATION = "compiled"
    except ModuleNotFoundError as error:
        if _wanted == "compiled":
            raise ImportError(
                "RESOLVER_BACKEND=compiled, but the extension resolver._cache is not built: "
                "reinstall without RESOLVER_NO_EXTENSIONS and with a C compiler"
            ) from error
        from ._cache_py import ClientCache, fast_hits, leak

        IMPLEMENTATION = "python"

__all__ = ["IMPLEMENTATION", "ClientCache", "fast_hits", "leak"]
