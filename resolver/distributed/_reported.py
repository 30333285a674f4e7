"""Running a query so that it can be followed: its rows, and the report of how it ran.

For the command line and benchmarks; the ways of getting rows for everybody else are
``DataFrame``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import datafusion

from ._stream import ResultStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._dataframe import DataFrame
    from ._report import Progress, RunReport

__all__ = ["start", "stream"]


def start(frame: DataFrame) -> tuple[datafusion.RecordBatchStream, RunReport | None]:
    """Run the stages of ``frame``; its rows, and how they were made.

    No report: the query runs on a single node, while its rows are read.
    """
    query = frame._session._query(frame)
    if query is None:
        return datafusion.DataFrame.execute_stream(frame), None
    return ResultStream(query), query.report


def stream(
    frame: DataFrame, progress: Callable[[Progress], object] | None = None
) -> tuple[datafusion.RecordBatchStream, bool]:
    """The rows of ``frame`` as they come, and whether workers make them.

    ``progress`` is told how what comes before the first row comes along; it may be called
    by several threads at once.
    """
    rows = frame._session._stream(frame, progress)
    if rows is None:
        return datafusion.DataFrame.execute_stream(frame), False
    return rows, True
