"""A line on a terminal that says how far a query is.

For a person: nothing else reads it. What there is to say comes from ``_report``.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from ._report import Progress

__all__ = ["ProgressLine"]


class ProgressLine:
    """Prints stages and tasks as they start and finish. Thread-safe.

    ``stream`` is ``sys.stderr`` unless told otherwise, so that results can be piped. On a
    terminal the line is overwritten each time and removed by ``close()``; elsewhere every
    state gets a line of its own.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        self._show(
            f"stage {progress.stage}: {progress.done} of {progress.tasks} tasks, "
            f"in all {progress.total_done} of {progress.total_tasks}"
        )

    def close(self) -> None:
        """Leave a terminal as it was. Idempotent."""
        with self._lock:
            if self._terminal and self._width:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()
            self._width = 0

    def _show(self, text: str) -> None:
        with self._lock:
            if self._terminal:
                self._stream.write("\r" + text.ljust(self._width))
                self._width = len(text)
            else:
                self._stream.write(text + "\n")
            self._stream.flush()
