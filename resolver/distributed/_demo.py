"""``python -m resolver demo``: TPC-H queries on local workers, checked and explained.

Only shows what the package does; everything it calls is public, but for the statistics.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import datafusion
import pyarrow as pa

from resolver import DefaultChannelResolver

from . import _tpch
from ._calls import worker_info
from ._cluster import LocalCluster
from ._output import table_text
from ._reported import start
from ._state import SessionStateBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ._dataframe import DataFrame
    from ._report import RunReport

__all__ = ["run"]

_PRINTED: Final = (1, 3)
"""The queries whose plans are printed: with one network boundary, and with several."""

_SHOWN_ROWS: Final = 20

_STATISTICS: Final = ("hits", "misses", "waits", "connects", "connect_failures", "clients")


def run(*, scale_factor: str, workers: int, data_dir: Path | None) -> int:
    """Run the demo; 0 if every row was right, 1 if not."""
    folder = _tpch.data_folder(scale_factor, data_dir)
    if folder.is_dir():
        print(f"TPC-H scale factor {scale_factor} is in {folder}")
    else:
        with _step(f"Making TPC-H scale factor {scale_factor} in {folder}"):
            _tpch.generate(scale_factor, folder)
    with contextlib.ExitStack() as stack:
        with _step(f"Starting {workers} workers"):
            cluster = stack.enter_context(LocalCluster(workers=workers))
        for url in cluster.get_urls():
            print(f"  {url}")
        resolver = stack.enter_context(DefaultChannelResolver())
        # So little would be one worker's; here all of them are to be seen.
        builder = SessionStateBuilder().with_distributed_option("scan_bytes_per_task", 0)
        distributed = cluster.session(resolver, builder=builder)
        single = datafusion.SessionContext()
        for session in (distributed, single):
            for table in _tpch.TABLES:
                session.register_parquet(table, str(folder / table))
        lines, wrong = [], 0
        for number, query in _tpch.QUERIES.items():
            frame = distributed.sql(query)
            print(f"\nTPC-H query {number}{', staged:' if number in _PRINTED else ''}\n")
            if number in _PRINTED:
                frame.explain()
                print()
            with _step("Running it on the workers") as spread:
                answer, report = _answer(frame)
            with _step("Running it on a single node") as alone:
                expected = single.sql(query).to_arrow_table()
            print()
            print(table_text(answer.schema, answer.to_batches(), _SHOWN_ROWS)[0])
            equal = _rows(answer) == _rows(expected)
            wrong += not equal
            stages, tasks = ("-", "-") if report is None else (len(report.stages), report.tasks)
            sent = 0 if report is None else report.fetched_bytes
            line = [f"query {number}", stages, tasks, f"{sent / 1e6:.2f} MB"]
            line += [f"{spread[0]:.3f} s", f"{alone[0]:.3f} s", _word(equal)]
            lines.append([str(cell) for cell in line])
        print("\nAll queries\n")
        _table(["", "stages", "tasks", "sent", "distributed", "single node", "rows"], lines)
        print("\nResolver statistics\n")
        statistics = [["coordinator", *_figures(asdict(resolver.stats()))]]
        for url in cluster.get_urls():
            info = worker_info(resolver, url)
            statistics.append([f"worker {url}", *_figures(info["resolver_stats"])])
        _table(["", *(name.replace("_", " ") for name in _STATISTICS)], statistics)
    if wrong:
        print(f"\n{wrong} of {len(lines)} queries gave wrong rows", file=sys.stderr)
        return 1
    print("\nAll rows equal those of single-node DataFusion, which is faster where there is so")
    print("little to do and one machine to do it: make tpch SF=1 shows how that changes with size.")
    return 0


def _answer(frame: DataFrame) -> tuple[pa.Table, RunReport | None]:
    """The rows of a query, and how they were made."""
    stream, report = start(frame)
    batches = [batch.to_pyarrow() for batch in stream]
    return pa.Table.from_batches(batches, None if batches else frame.schema()), report


@contextlib.contextmanager
def _step(what: str) -> Iterator[list[float]]:
    """Say what is being done while it is done; gives a list that gets the seconds."""
    print(f"{what} … ", end="", flush=True)
    seconds: list[float] = []
    started = time.perf_counter()
    try:
        yield seconds
    except BaseException:
        print("failed")
        raise
    seconds.append(time.perf_counter() - started)
    print(f"{seconds[0]:.2f} s")


def _rows(table: pa.Table) -> list[str]:
    """The rows as a multiset, in an order of their own."""
    return sorted(repr(list(row.values())) for row in table.to_pylist())


def _word(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"


def _figures(statistics: Mapping[str, object]) -> list[str]:
    return [str(statistics.get(name, "-")) for name in _STATISTICS]


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    columns = list(zip(heading, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for row in [heading, *rows]:
        first, *rest = (cell for cell in row)
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  " + "  ".join(cells).rstrip())
