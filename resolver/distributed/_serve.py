"""The life of a worker process: announce it, wait, stop cleanly.

A worker ends on SIGTERM or SIGINT or, when it has an owner, together with it: the owner
holds the other end of standard input, so its end reaches us even if it is killed, and
should a copy of that end live on in some other process, we notice that our parent is
another one. Flight is not this module's business.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Final

from ._worker import WorkerServer

__all__ = ["Owner", "serve"]

_PARENT_POLL: Final = 0.5  # seconds
_STOP_TIMEOUT: Final = 10.0  # seconds after which a call that will not end is cut off


class Owner:
    """The process a worker belongs to, and the directory that ends with it."""

    def __init__(self, pid: int, directory: Path | None) -> None:
        self.pid = pid
        self.directory = directory

    def watch(self, stop: threading.Event) -> None:
        """Set ``stop`` once the owner is gone. Returns at once."""

        def until_end_of_input() -> None:
            with contextlib.suppress(OSError, ValueError):
                while os.read(sys.stdin.fileno(), 4_096):
                    pass
            stop.set()

        def until_orphaned() -> None:
            while not stop.wait(_PARENT_POLL):
                if os.getppid() != self.pid:
                    stop.set()

        for watch in (until_end_of_input, until_orphaned):
            threading.Thread(target=watch, name=watch.__name__, daemon=True).start()

    def clean_up(self) -> None:
        """Remove the owner's directory if the owner can no longer do it."""
        if self.directory is not None and os.getppid() != self.pid:
            shutil.rmtree(self.directory, ignore_errors=True)


def serve(server: WorkerServer, owner: Owner | None = None) -> None:
    """Announce ``server`` on standard output, as a line of JSON, and serve until told to stop.

    Call it on the main thread, where signals arrive.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if owner is None:
        signal.signal(signal.SIGINT, lambda *_: stop.set())
    else:
        # Ctrl-C reaches the whole process group; when we end is for the owner to decide.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        owner.watch(stop)
    print(json.dumps({"url": server.url, "pid": os.getpid()}), flush=True)
    stop.wait()
    last_resort = threading.Timer(_STOP_TIMEOUT, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()
    server.shutdown()
    last_resort.cancel()
    if owner is not None:
        owner.clean_up()
