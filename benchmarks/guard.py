"""Guards the speed of a hit by counting instructions, which are the same on a busy machine.

``python -m benchmarks.guard`` counts, under ``valgrind --tool=callgrind``, the instructions
of a hit beside those of `dict.get`, and of a hit awaited in asyncio beside those of an
awaited coroutine that returns a `dict` entry: two runs of different length each, whose
difference belongs to the look-ups alone. The runs are forks of one process, as valgrind
takes longer over imports than over all of them. It fails when a ratio has grown by more than
5 % over ``baseline.json``, and when that has no entry for this interpreter and
implementation. ``--update`` writes the entry.

Exit status: 0 within bounds, 1 grown, 2 cannot tell (no valgrind, no baseline).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from resolver import _backend

from .measure import gil_enabled

TOLERANCE = 0.05
BASELINE = Path(__file__).with_name("baseline.json")

_URLS = 512
_SHORT, _LONG = 20, 220  # rounds over all URLs
# What differs from run to run: hashes, and how long numpy's threads spin before they sleep.
_STEADY = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_COLLECTED = re.compile(r"Collected : (\d+)")

_PRELUDE = """
import asyncio, os, sys
import resolver.aio
urls = [f"http://10.0.{n // 256}.{n % 256}:50051" for n in range(512)]
def measured(run):
    for rounds in map(int, sys.argv[1:]):
        child = os.fork()
        if not child:
            run(rounds)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit("a look-up failed")
"""
_LOOP = """
def loop(rounds):
    for _ in range(rounds):
        for url in urls:
            LOOK_UP(url)
"""
_DICT = """
def run(rounds):
    global known
    known = {url: object() for url in urls}
    loop(rounds)
measured(run)
"""
_RESOLVER = """
class Connector:
    def connect(self, url):
        return object()
def run(rounds):
    global channels
    channels = resolver.DefaultChannelResolver(Connector())
    for url in urls:
        channels.get_flight_client_for_url(url)
    loop(rounds)
    assert channels.stats().connects == len(urls)
measured(run)
"""
_AWAITING = """
async def loop(look_up, rounds):
    for _ in range(rounds):
        for url in urls:
            await look_up(url)
async def main(rounds):
"""
_MEASURED = """
measured(lambda rounds: asyncio.run(main(rounds)))
"""
_COROUTINE = """
    known = {url: object() for url in urls}
    async def from_dict(url):
        return known[url]
    await loop(from_dict, rounds)
"""
_AIO_RESOLVER = """
    class Connector:
        async def connect(self, url):
            return object()
    channels = resolver.aio.DefaultChannelResolver(Connector())
    for url in urls:
        await channels.get_flight_client_for_url(url)
    await loop(channels.get_flight_client_for_url, rounds)
    assert channels.stats().connects == len(urls)
"""
PROGRAMS = {
    "dict.get": _LOOP.replace("LOOK_UP", "known.get") + _DICT,
    "resolver": _LOOP.replace("LOOK_UP", "channels.get_flight_client_for_url") + _RESOLVER,
    "awaited coroutine": _AWAITING + _COROUTINE + _MEASURED,
    "awaited resolver": _AWAITING + _AIO_RESOLVER + _MEASURED,
}
RATIOS = {
    "ratio": ("resolver", "dict.get"),
    "awaited ratio": ("awaited resolver", "awaited coroutine"),
}
"""What is compared, by its name in the baseline."""


class CannotTellError(Exception):
    """The guard could not do its work; the message says what is missing."""


def key() -> str:
    """What the count depends on: interpreter, GIL, implementation, architecture."""
    gil = "" if gil_enabled() else "t"
    version = ".".join(platform.python_version_tuple()[:2])
    return (
        f"{sys.implementation.name}-{version}{gil}-{platform.machine()}-{_backend.IMPLEMENTATION}"
    )


def instructions_per_lookup() -> dict[str, float]:
    """Instructions of one turn of each program's loop."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CannotTellError("valgrind is not installed; it is what counts the instructions")
    result = subprocess.run(
        [
            valgrind,
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            sys.executable,
            "-c",
            _PRELUDE + "".join(PROGRAMS.values()),
            str(_SHORT),
            str(_LONG),
        ],
        env={**os.environ, **_STEADY, "RESOLVER_BACKEND": _backend.IMPLEMENTATION},
        capture_output=True,
        text=True,
        check=False,
    )
    # In the order in which they end: two children for each program, and their parent.
    collected = [int(count) for count in _COLLECTED.findall(result.stderr)]
    if result.returncode != 0 or len(collected) != 2 * len(PROGRAMS) + 1:
        raise CannotTellError(f"valgrind failed: {result.stderr[-2_000:]}")
    pairs = zip(collected[::2], collected[1::2], strict=False)
    turns = (_LONG - _SHORT) * _URLS
    counts = [(long - short) / turns for short, long in pairs]
    return dict(zip(PROGRAMS, counts, strict=True))


def read_baseline() -> dict[str, dict[str, float]]:
    """The committed ratios by `key`."""
    if not BASELINE.exists():
        return {}
    entries: dict[str, dict[str, float]] = json.loads(BASELINE.read_text())
    return entries


def main(arguments: list[str] | None = None) -> int:
    """Count, compare, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write this run into the baseline")
    update = parser.parse_args(arguments).update
    try:
        counts = instructions_per_lookup()
    except CannotTellError as error:
        print(f"guard: {error}", file=sys.stderr)
        return 2
    ratios = {name: counts[ours] / counts[theirs] for name, (ours, theirs) in RATIOS.items()}
    print(f"guard: {key()}: instructions per look-up")
    for name, pair in RATIOS.items():
        figures = ", ".join(f"{program} {counts[program]:.0f}" for program in pair)
        print(f"guard: {figures}; {name} {ratios[name]:.3f}")
    baseline = read_baseline()
    if update:
        baseline[key()] = {
            **{name: round(n, 1) for name, n in counts.items()},
            **{name: round(ratio, 3) for name, ratio in ratios.items()},
        }
        BASELINE.write_text(json.dumps(baseline, indent=2, sort_keys=True) + "\n")
        print(f"guard: written to {BASELINE.name}")
        return 0
    entry = baseline.get(key(), {})
    if not entry.keys() >= RATIOS.keys():
        print(
            f"guard: no baseline for {key()} in {BASELINE.name}, so nothing was compared; "
            "record one on a commit that you trust: python -m benchmarks.guard --update",
            file=sys.stderr,
        )
        return 2
    grown = False
    for name, ratio in ratios.items():
        allowed = entry[name] * (1 + TOLERANCE)
        verdict = "within" if ratio <= allowed else "MORE THAN"
        print(f"guard: {name}: {verdict} {allowed:.3f}, the baseline's plus {TOLERANCE:.0%}")
        grown |= ratio > allowed
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
