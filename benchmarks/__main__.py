"""``python -m benchmarks``: one table, every peer beside the resolver, every target.

Progress goes to stderr, the table to stdout. Exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import bench_aio, hits, lanes, scaling, scenarios
from .measure import gil_enabled, heading
from .peers import CACHEBOX, CACHETOOLS, DICT, LRU_CACHE, RESOLVER


@dataclass(frozen=True)
class Row:
    """One line: `figure` is what the target bounds; a row without a target is only shown."""

    what: str
    measured: str
    compared: str = ""
    figure: float = 0.0
    at_most: float | None = None
    at_least: float | None = None
    unit: str = "x"

    @property
    def missed(self) -> bool:
        """Whether a target is not reached."""
        over = self.at_most is not None and self.figure > self.at_most
        return over or (self.at_least is not None and self.figure < self.at_least)

    def cells(self) -> tuple[str, str, str, str, str]:
        """The line of the table."""
        if self.at_most is not None:
            target = f"at most {self.at_most:.4g}{self.unit}"
        elif self.at_least is not None:
            target = f"at least {self.at_least:.4g}{self.unit}"
        else:
            return self.what, self.measured, self.compared, "", ""
        return self.what, self.measured, self.compared, target, "MISS" if self.missed else "pass"


def hit_rows() -> list[Row]:
    """A hit, beside each peer's."""
    at_most = {DICT: 1.3, LRU_CACHE: 0.8}
    at_least = {CACHEBOX: 1.4, CACHETOOLS: 12.0}
    rows = []
    for name, (nanoseconds, over_ours) in hits.measure().items():
        what, measured = f"a hit: {name}", f"{nanoseconds:.0f} ns"
        if name == RESOLVER:
            rows.append(Row(what, measured))
        elif name in at_most:
            ratio = 1 / over_ours
            compared = f"resolver / it: {ratio:.2f}x"
            rows.append(Row(what, measured, compared, ratio, at_most=at_most[name]))
        else:
            compared = f"it / resolver: {over_ours:.1f}x"
            rows.append(Row(what, measured, compared, over_ours, at_least=at_least.get(name)))
    return rows


def awaited_rows() -> list[Row]:
    """A hit in asyncio."""
    ratio = bench_aio.measure()
    compared = "it / await a coroutine that returns dict[url]"
    return [
        Row("an awaited hit", f"{ratio:.2f}x", compared, ratio, at_most=bench_aio.AT_MOST),
    ]


def request_rows() -> list[Row]:
    """Requests to a real server."""
    what = {
        scenarios.HELD: "a small do_get: client held",
        scenarios.RESOLVED: "a small do_get: resolved each time",
        scenarios.NEW_CLIENT: "a small do_get: new FlightClient each time",
    }
    at_most = {scenarios.RESOLVED: 1.02}
    rows = []
    for style, (microseconds, ratio) in scenarios.requests().items():
        compared = "" if style == scenarios.HELD else f"it / held: {ratio:.3f}x"
        measured = f"{microseconds:.0f} us"
        rows.append(Row(what[style], measured, compared, ratio, at_most=at_most.get(style)))
    return rows


def cold_rows() -> list[Row]:
    """What has no client yet."""
    connects = scenarios.stampede()
    seconds = scenarios.silent_peers()
    return [
        Row("256 threads, one cold URL", f"{connects}", "", connects, at_most=1, unit=" connect"),
        Row(
            "64 threads, 64 silent peers, connect_timeout=1",
            f"{seconds:.2f} s", "", seconds, at_most=2, unit=" s",
        ),
    ]  # fmt: skip


def memory_rows() -> list[Row]:
    """What the map itself weighs."""
    weight = scenarios.bytes_per_url()
    what = "memory per URL, at 65,536 URLs"
    return [Row(what, f"{weight:.0f} bytes", "", weight, at_most=256, unit=" bytes")]


def scaling_rows(measured_elsewhere: Path | None) -> list[Row]:
    """Two threads beside one, where threads run at once: here, or on another interpreter."""
    what = "2 threads on disjoint URLs / 1 thread"
    text = measured_elsewhere.read_text() if measured_elsewhere else ""
    if text:
        figures = json.loads(text)
        what += f" ({figures['heading'].partition(',')[0]})"
    elif gil_enabled():
        return [Row(what, "-", "needs a free-threaded interpreter")]
    else:
        figures = scaling.measure()
    compared = f"dict: {figures['dict']:.2f}x"
    measured = f"{figures['resolver']:.2f}x"
    one, two = figures["1 lane"], figures["2 lanes"]
    beside = (
        f"1 lane: {one:.2f}x, dict: {figures['dict, one URL']:.2f}x, "
        f"a dict each: {figures['a dict each']:.2f}x"
    )
    return [
        Row(what, measured, compared, figures["resolver"], at_least=figures["dict"]),
        Row("2 threads on one URL, 2 lanes / 1 thread", f"{two:.2f}x", beside, two, at_least=1.6),
    ]


def lane_rows() -> list[Row]:
    """Several connections per URL; without a target, because the cores decide."""
    return [
        Row(
            f"{lanes.THREADS} threads on one URL, {name}: {count} lanes",
            f"{ratio:.2f}x",
            "of 1 lane",
        )
        for name, ratios in lanes.measure().items()
        for count, ratio in ratios.items()
        if count > 1
    ]


def main() -> int:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--free-threaded",
        type=Path,
        metavar="FILE",
        help="what `python -m benchmarks.scaling` printed on a free-threaded interpreter",
    )
    elsewhere = parser.parse_args().free_threaded
    parts: dict[str, Callable[[], list[Row]]] = {
        "hits": hit_rows,
        "awaited hits": awaited_rows,
        "requests": request_rows,
        "cold starts": cold_rows,
        "memory": memory_rows,
        "threads": lambda: scaling_rows(elsewhere),
        "lanes": lane_rows,
    }
    rows: list[Row] = []
    for name, measure in parts.items():
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += measure()
    print(f"\n{heading()}\n\n{as_table(rows)}")
    missed = [row.what for row in rows if row.missed]
    if missed:
        print(f"\nmissed: {', '.join(missed)}")
    return 1 if missed else 0


def as_table(rows: list[Row]) -> str:
    """Columns as wide as they need to be."""
    lines = [("what", "measured", "compared", "target", ""), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
