"""Temporary directories that outlive nobody.

A directory is locked by the process that made it, for as long as that process lives.
Whoever makes one next removes those whose lock has gone, so what a killed process left
behind does not stay. What is inside a directory is not this module's business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Final

__all__ = ["LockedDirectory"]

_PREFIX: Final = "resolver-"
_NEW: Final = ".new-resolver-"
_LOCK: Final = ".lock"
_GLOB: Final = frozenset("*?[")
_SIGNATURE: Final = b"a directory of resolver's own"
_OURS: Final = re.compile(r"resolver-[a-z]+-[a-z0-9_]{8}")


class LockedDirectory:
    """A fresh directory ``resolver-<purpose>-…`` under ``base``, removed by ``close()``.

    ``base`` defaults to the system's temporary directory. Also removed when the object
    is collected and at interpreter exit, but never by a forked child, which inherits
    the object and not the ownership.
    """

    def __init__(self, purpose: str, base: str | os.PathLike[str] | None = None) -> None:
        parent = Path(tempfile.gettempdir() if base is None else base).absolute()
        if not _GLOB.isdisjoint(str(parent)):
            raise ValueError(
                f"{parent} has one of the characters {' '.join(sorted(_GLOB))}, which DataFusion "
                "reads as a pattern; set exchange_dir, or TMPDIR, to another directory"
            )
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        # Locked under one name and only then given the name that others look for: a
        # directory that can be found is always locked by a living process.
        fresh = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
        lock = os.open(fresh / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, _SIGNATURE)
        self.path: Final = parent / f"{_PREFIX}{purpose}-{fresh.name.removeprefix(_NEW)}"
        fresh.rename(self.path)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove the directory and all in it. Idempotent."""
        self._finalizer()

    def __repr__(self) -> str:
        return f"LockedDirectory({str(self.path)!r})"


def remove_abandoned(parent: Path) -> None:
    """Remove the directories that this module made under ``parent`` and whose owner is gone."""
    for lock_path in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        if not _OURS.fullmatch(lock_path.parent.name):
            continue
        with contextlib.suppress(OSError):
            lock = os.open(lock_path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.read(lock, 2 * len(_SIGNATURE)) == _SIGNATURE:
                    shutil.rmtree(lock_path.parent, ignore_errors=True)
            finally:
                os.close(lock)


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() != owner:
        return
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
