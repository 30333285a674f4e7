"""Ctrl-C and SIGTERM while a command runs: it cleans up and ends, whatever it is doing.

Python runs a handler of signals only between two steps of its main thread, and a query
that DataFusion computes on that thread is one step. So another thread sees the signal, too,
and ends the process if the main thread does not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Ending", "ending_by_signals"]

_UNTIL_NOTICED: Final = 2.0  # seconds
# Seconds; closing a cluster may take 5. DataFusion may notice, and not come back all the same.
_UNTIL_CLEAN: Final = 7.0
_UNTIL_EXIT: Final = 5.0  # seconds for what is to be done at exit, which may wait for it too


class Ending:
    """Whether the command was told to end. ``signal``: 0, or by which signal."""

    def __init__(self) -> None:
        self.signal = 0
        self._noticed = threading.Event()
        self._done = threading.Event()

    def handle(self, number: int, _frame: object) -> None:
        self.signal = number
        self._noticed.set()
        raise KeyboardInterrupt

    def done(self) -> None:
        self._done.set()

    def watch(self, pipe: int) -> None:
        """Wait for a signal's number in ``pipe``, or its end; closes it."""
        with open(pipe, "rb", buffering=0) as numbers:
            number = numbers.read(1)
        if not number or (self._noticed.wait(_UNTIL_NOTICED) and self._done.wait(_UNTIL_CLEAN)):
            return
        if not self._done.is_set():
            # Directories and unfinished files go; an interpreter's usual end would wait for
            # the main thread. Workers end with the pipe that they hold.
            leaving = threading.Thread(
                target=atexit._run_exitfuncs,  # noqa: SLF001  # there is no public name
                name="exit",
                daemon=True,
            )
            leaving.start()
            leaving.join(_UNTIL_EXIT)
            os._exit(128 + number[0])


@contextlib.contextmanager
def ending_by_signals() -> Iterator[Ending]:
    """Within, SIGINT and SIGTERM raise ``KeyboardInterrupt``; only on the main thread."""
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=ending.watch, args=(reader,), name="signals", daemon=True).start()
    before = {
        number: signal.signal(number, ending.handle)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN  # as nohup and shells have it
    }
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield ending
    finally:
        ending.done()
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
