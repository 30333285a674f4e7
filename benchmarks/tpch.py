"""All 22 TPC-H queries, on local workers and on a single node, checked and compared.

    python -m benchmarks.tpch --scale-factor 1 --workers 2
    python -m benchmarks.tpch --scale-factor 1 --query 16 22 --runs 31

Both sides have as many partitions as there are workers, on the same machine and in the
same run: they take turns, so that what else the machine does hits both. At scale factors
0.01, 0.1 and 1 all rows are compared with DuckDB's answers, elsewhere with each other's.
A time is the median of the runs after a first one, which is not counted; it includes
planning, and ends when all rows are here. Exit code 1: a wrong row or a missed target.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import tpch_reference as reference
from benchmarks.measure import heading
from benchmarks.tpch_side import SIDES, Memory, Run, Side
from resolver.distributed._tpch import data_folder

TOTAL_RATIO, QUERY_RATIO, MEMORY_RATIO = 1.5, 2.5, 1.5
TRIVIAL_SECONDS = 0.015

TRIVIAL = {
    "count(*) of a small file": "SELECT count(*) FROM region",
    "the same, reading it": "SELECT count(*) FROM region WHERE r_name <> ''",
}
PARTS = 4
GROWTH = (0.1, 1.0, 5.0)
MB = 1e6


@dataclass(frozen=True)
class Line:
    """One query: median seconds of both sides, and how it was distributed."""

    query: str
    distributed: float
    single_node: float
    stages: int | None
    tasks: int
    fetched_bytes: int
    retries: int
    wrong: list[str]

    @property
    def ratio(self) -> float:
        return self.distributed / self.single_node

    def cells(self) -> tuple[str, ...]:
        alone = self.stages is None
        return (
            self.query,
            f"{self.distributed:.3f} s",
            f"{self.single_node:.3f} s",
            f"{self.ratio:.2f}x",
            "-" if alone else f"{self.stages}",
            "-" if alone else f"{self.tasks}",
            "-" if alone else f"{self.fetched_bytes / MB:.1f} MB",
            "equal" if not self.wrong else f"WRONG: {self.wrong[0][:60]}",
        )


@dataclass(frozen=True)
class Result:
    """One scale factor."""

    scale_factor: float
    lines: list[Line]
    trivial: list[Line]
    cluster: Memory
    single_node: Memory

    @property
    def distributed_seconds(self) -> float:
        return sum(line.distributed for line in self.lines)

    @property
    def single_node_seconds(self) -> float:
        return sum(line.single_node for line in self.lines)

    @property
    def ratio(self) -> float:
        return self.distributed_seconds / self.single_node_seconds

    def memory_ratio(self, size: int) -> float:
        return size / self.single_node.own

    def targets(self) -> list[tuple[str, str, str, bool]]:
        """What, measured, target, and whether it is met."""
        wrong = sum(bool(line.wrong) for line in self.lines)
        count = len(self.lines)
        worst = max(self.lines, key=lambda line: line.ratio)
        biggest = max(self.cluster.workers)
        coordinator, worker = self.memory_ratio(self.cluster.own), self.memory_ratio(biggest)
        rows = [
            ("queries with right rows", f"{count - wrong} of {count}", f"{count}", not wrong),
            (
                "queries that were distributed",
                f"{sum(line.stages is not None for line in self.lines)} of {count}",
                f"{count}",
                all(line.stages is not None for line in self.lines),
            ),
            ("total / single node", f"{self.ratio:.2f}x", *_most(self.ratio, TOTAL_RATIO)),
            (
                f"worst query ({worst.query}) / single node",
                f"{worst.ratio:.2f}x",
                *_most(worst.ratio, QUERY_RATIO),
            ),
            (
                "coordinator's peak memory / single node's",
                f"{coordinator:.2f}x",
                *_most(coordinator, MEMORY_RATIO),
            ),
            (
                "largest worker's peak memory / single node's",
                f"{worker:.2f}x",
                *_most(worker, MEMORY_RATIO),
            ),
        ]
        for line in self.trivial:
            more = line.distributed - line.single_node
            met = more <= TRIVIAL_SECONDS
            target = f"at most {TRIVIAL_SECONDS * 1e3:.0f} ms"
            rows.append((f"{line.query}, above single node", f"{more * 1e3:.1f} ms", target, met))
        return rows


def _most(value: float, limit: float) -> tuple[str, bool]:
    return f"at most {limit}x", value <= limit


def measure(
    scale_factor: float,
    *,
    workers: int,
    runs: int,
    data_dir: Path | None,
    chosen: Sequence[int] = (),
) -> Result:
    """Run all queries, or those ``chosen``, on both sides, in turns."""
    queries = {number: q for number, q in reference.queries().items() if number in chosen}
    queries = queries or reference.queries()
    folder = _data(scale_factor, data_dir)
    answers = reference.answers(scale_factor)
    with contextlib.ExitStack() as stack:
        sides = []
        for name in SIDES:
            side = Side(name, folder, workers)
            stack.callback(side.close)
            sides.append(side)
        lines = []
        for number, query in queries.items():
            _say(f"scale factor {scale_factor:g}: query {number}")
            lines.append(_line(f"query {number}", query, sides, runs, answers.get(number)))
        memory = [side.memory() for side in sides]
        trivial = [_line(what, query, sides, 7 * runs, None) for what, query in TRIVIAL.items()]
    return Result(scale_factor, lines, trivial, *memory)


def _line(what: str, query: str, sides: Sequence[Side], runs: int, answer: str | None) -> Line:
    first = [side.run(query) for side in sides]
    wrong = _wrong(first, answer)
    seconds: list[list[float]] = [[], []]
    for turn in range(runs):
        for index in (0, 1) if turn % 2 else (1, 0):
            seconds[index].append(sides[index].run(query).seconds)
    distributed, single_node = map(statistics.median, seconds)
    ran = first[0]
    how = (ran.stages, ran.tasks, ran.fetched_bytes, ran.retries)
    return Line(what, distributed, single_node, *how, wrong)


def _wrong(runs: Sequence[Run], answer: str | None) -> list[str]:
    distributed, single_node = (run.table() for run in runs)
    if answer is None:
        return reference.differences(distributed, single_node)
    wrong = [f"distributed: {text}" for text in reference.differences(distributed, answer)]
    return wrong + [f"single: {text}" for text in reference.differences(single_node, answer)]


def _data(scale_factor: float, data_dir: Path | None) -> Path:
    near = data_folder(f"{scale_factor:g}", data_dir)
    folder = near.with_name(f"tpch-reference-sf{scale_factor:g}-{PARTS}-parts")
    if not folder.is_dir():
        _say(f"making TPC-H scale factor {scale_factor:g} in {folder}")
        reference.generate(scale_factor, folder, parts=PARTS)
    return folder


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def report(result: Result, workers: int) -> Iterator[str]:
    """The tables of one scale factor."""
    yield f"TPC-H scale factor {result.scale_factor:g}, {workers} workers of one slot each"
    yield ""
    columns = ("", "distributed", "single node", "ratio", "stages", "tasks", "shuffled", "rows")
    total = (
        "total",
        f"{result.distributed_seconds:.3f} s",
        f"{result.single_node_seconds:.3f} s",
        f"{result.ratio:.2f}x",
        f"{sum(line.stages or 0 for line in result.lines)}",
        f"{sum(line.tasks for line in result.lines)}",
        f"{sum(line.fetched_bytes for line in result.lines) / MB:.1f} MB",
        "",
    )
    yield from table([columns, *(line.cells() for line in result.lines), total])
    yield ""
    yield from _memory_table(result)
    yield ""
    yield from table(
        [
            ("what", "measured", "target", ""),
            *((*row[:3], "pass" if row[3] else "MISS") for row in result.targets()),
        ],
    )


def _memory_table(result: Result) -> Iterator[str]:
    cluster = result.cluster
    sizes = {
        "single node": result.single_node.own,
        "coordinator": cluster.own,
        **{f"worker {number}": size for number, size in enumerate(cluster.workers)},
        "coordinator and workers": cluster.own + sum(cluster.workers),
    }
    yield from table(
        [
            ("peak memory (resident)", "", "/ single node"),
            *(
                (what, f"{size / MB:.0f} MB", f"{result.memory_ratio(size):.2f}x")
                for what, size in sizes.items()
            ),
        ]
    )


def growth(results: Sequence[Result]) -> Iterator[str]:
    """How the totals grow with the data."""
    yield "All 22 queries, as the data grows"
    yield ""
    rows = [
        ("scale factor", "distributed", "single node", "ratio", "worker's peak", "/ single node")
    ]
    for result in results:
        peak = max(result.cluster.workers)
        rows.append(
            (
                f"{result.scale_factor:g}",
                f"{result.distributed_seconds:.2f} s",
                f"{result.single_node_seconds:.2f} s",
                f"{result.ratio:.2f}x",
                f"{peak / MB:.0f} MB",
                f"{result.memory_ratio(peak):.2f}x",
            )
        )
    yield from table(rows)


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they need to be, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def as_json(results: Sequence[Result], workers: int) -> Mapping[str, object]:
    """Everything that was measured; times in seconds, sizes in bytes."""
    return {
        "heading": heading(),
        "workers": workers,
        "results": [asdict(result) | {"targets": result.targets()} for result in results],
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale-factor", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=9, help="that count (default: %(default)s)")
    parser.add_argument(
        "--query",
        type=int,
        nargs="+",
        default=[],
        choices=range(1, 23),
        metavar="NUMBER",
        help="default: all",
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help=f"scale factors {', '.join(map('{:g}'.format, GROWTH))}",
    )
    parser.add_argument("--data-dir", type=Path, help="where the data is kept (default: as demo's)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    options = parser.parse_args()
    results = [
        measure(
            factor,
            workers=options.workers,
            runs=options.runs,
            data_dir=options.data_dir,
            chosen=options.query,
        )
        for factor in (GROWTH if options.growth else [options.scale_factor])
    ]
    if options.json:
        print(json.dumps(as_json(results, options.workers), indent=2))
    else:
        print(heading())
        for result in results:
            print("", *report(result, options.workers), sep="\n")
        if options.growth:
            print("", *growth(results), sep="\n")
    missed = [row[0] for result in results for row in result.targets() if not row[3]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
