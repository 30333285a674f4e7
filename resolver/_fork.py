"""Whether gRPC can work in this process, or was inherited, dead, through a fork.

gRPC starts threads with the first client or server of a process, whoever makes it, and a
forked child has none of them: even a fresh client there hangs, deadline or not. Three
things tell, in this order: what the connector did, gRPC's threads in the parent at the
moment of a fork (Linux), and, where a fork may have gone unseen, one call to nowhere on
a thread that may be left behind. Nothing here connects to a worker.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple

from pyarrow import flight

from ._errors import ForkedProcessError

_TASKS: Final = "/proc/self/task"
_GRPC_THREADS: Final = frozenset({"event_engine", "grpc_global_tim", "grpcpp_sync_ser"})
# grpcio carries a gRPC of its own, whose threads bear the same names.
_OTHER_GRPC: Final = "grpc._cython.cygrpc"
_PF_FORKNOEXEC: Final = 0x40
_FLAGS_FIELD: Final = 6  # of /proc/self/stat, counted from the state behind the name

# A socket that nobody can ever listen on: where gRPC works, the refusal takes milliseconds.
_NOWHERE: Final = "grpc+unix:///dev/null/none"
_CALL_TIMEOUT: Final = 0.2
_GRACE: Final = 0.25
_LONGEST_TRIAL: Final = 0.75


class _Trial(NamedTuple):
    pid: int
    thread: threading.Thread
    end: float


def _born_by_fork() -> bool:
    """Whether this process may be a fork that ran no other program since."""
    if not hasattr(os, "fork"):
        return False
    try:
        stat = Path("/proc/self/stat").read_bytes()
        return bool(int(stat.rpartition(b")")[2].split()[_FLAGS_FIELD]) & _PF_FORKNOEXEC)
    except (OSError, ValueError, IndexError):
        return True  # no Linux: the trial will tell


# The process that is known to have used gRPC: this one, or the ancestor that it died with.
_used_by: int | None = None
# The process whose gRPC was certainly not inherited, since it was not forked.
_unforked: int | None = None if _born_by_fork() else os.getpid()
# In a fork of the process that made it, a trial says nothing.
_trial: _Trial | None = None


def refuse_in_forked_child(url: str, deadline: float) -> None:
    """Raise ``ForkedProcessError`` where gRPC was inherited; claim gRPC otherwise.

    At once where the parent's use of gRPC was seen; in a fork that was not seen, or whose
    parent showed no threads, after a trial of at most 0.75 s that ends no later than 0.25 s
    after ``deadline`` (of ``time.monotonic``). Thread-safe; takes no lock that a fork could
    leave held.
    """
    global _used_by  # noqa: PLW0603 -- a fact about the process
    pid = os.getpid()
    if _used_by is not None and _used_by != pid:
        _refuse(url, f"process {_used_by}")
    if _unforked != pid and not _grpc_works(pid, max(deadline - time.monotonic(), 0) + _GRACE):
        _refuse(url, "a process")
    _used_by = pid


def _grpc_works(pid: int, limit: float) -> bool:
    global _trial  # noqa: PLW0603 -- as above
    trial = _trial
    if trial is None or trial.pid != pid:
        thread = threading.Thread(target=_call_nowhere, name="resolver-fork-trial", daemon=True)
        thread.start()
        trial = _trial = _Trial(pid, thread, time.monotonic() + _LONGEST_TRIAL)
    # One that ended late was only slow: what was refused meanwhile works from then on.
    trial.thread.join(max(min(limit, trial.end - time.monotonic()), 0))
    return not trial.thread.is_alive()


def _call_nowhere() -> None:
    try:
        client = flight.FlightClient(_NOWHERE)
        client.list_actions(flight.FlightCallOptions(timeout=_CALL_TIMEOUT))
    except Exception:  # noqa: BLE001, S110 -- any end but none proves that gRPC works
        pass


def _refuse(url: str, parent: str) -> None:
    raise ForkedProcessError(
        f"Cannot connect to worker {url}: this process was forked from {parent}, which had "
        "used Arrow Flight, and gRPC does not survive a fork. Start processes with the 'spawn' "
        "or 'forkserver' method of multiprocessing, or fork before the first Flight client or "
        "server is made",
        url=url,
    )


def _note_grpc_threads() -> None:
    """Before a fork: claim gRPC for this process if it runs, whoever started it."""
    global _used_by  # noqa: PLW0603 -- as above
    if _used_by is None and _OTHER_GRPC not in sys.modules and _has_grpc_threads():
        _used_by = os.getpid()


def _has_grpc_threads() -> bool:
    try:
        tasks = list(Path(_TASKS).iterdir())
    except OSError:
        return False
    for task in tasks:
        try:
            name = (task / "comm").read_text("utf-8", "replace")
        except OSError:
            continue  # it has just ended
        if name.strip() in _GRPC_THREADS:
            return True
    return False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_note_grpc_threads)
