"""Guards the speed of a hit by counting instructions, which are the same on a busy machine.

``python -m benchmarks.guard`` counts the instructions of a resolver's hit and of
`dict.get` under ``valgrind --tool=callgrind``: two runs of different length each, whose
difference belongs to the look-ups alone. It fails when the ratio of the two has grown by
more than 5 % over ``baseline.json``, and when that has no entry for this interpreter and
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
_SHORT, _LONG = 20, 520  # rounds over all URLs
# What differs from run to run: hashes, and how long numpy's threads spin before they sleep.
_STEADY = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_COLLECTED = re.compile(r"Collected : (\d+)")

_COMMON = """
import sys
urls = [f"http://10.0.{n // 256}.{n % 256}:50051" for n in range(512)]
def loop(rounds):
    for _ in range(rounds):
        for url in urls:
            CALL
"""
_DICT = "known = {url: object() for url in urls}\nloop(int(sys.argv[1]))\n"
_RESOLVER = """
from resolver import DefaultChannelResolver
class Connector:
    def connect(self, url):
        return object()
channels = DefaultChannelResolver(Connector())
for url in urls:
    channels.get_flight_client_for_url(url)
loop(int(sys.argv[1]))
assert channels.stats().connects == len(urls)
"""
PROGRAMS = {
    "dict.get": _COMMON.replace("CALL", "known.get(url)") + _DICT,
    "resolver": _COMMON.replace("CALL", "channels.get_flight_client_for_url(url)") + _RESOLVER,
}


class CannotTellError(Exception):
    """The guard could not do its work; the message says what is missing."""


def key() -> str:
    """What the count depends on: interpreter, GIL, implementation, architecture."""
    gil = "" if gil_enabled() else "t"
    version = ".".join(platform.python_version_tuple()[:2])
    return (
        f"{sys.implementation.name}-{version}{gil}-{platform.machine()}-{_backend.IMPLEMENTATION}"
    )


def instructions_per_lookup(program: str) -> float:
    """Instructions of one turn of a program's loop."""
    short, long = _collected(program, _SHORT), _collected(program, _LONG)
    return (long - short) / ((_LONG - _SHORT) * _URLS)


def _collected(program: str, rounds: int) -> int:
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
            program,
            str(rounds),
        ],
        env={**os.environ, **_STEADY, "RESOLVER_BACKEND": _backend.IMPLEMENTATION},
        capture_output=True,
        text=True,
        check=False,
    )
    collected = _COLLECTED.search(result.stderr)
    if result.returncode != 0 or collected is None:
        raise CannotTellError(f"valgrind failed: {result.stderr[-2_000:]}")
    return int(collected[1])


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
        counts = {name: instructions_per_lookup(text) for name, text in PROGRAMS.items()}
    except CannotTellError as error:
        print(f"guard: {error}", file=sys.stderr)
        return 2
    ratio = counts["resolver"] / counts["dict.get"]
    figures = ", ".join(f"{name} {count:.0f}" for name, count in counts.items())
    print(f"guard: {key()}: instructions per look-up: {figures}; ratio {ratio:.3f}")
    baseline = read_baseline()
    if update:
        baseline[key()] = {
            **{name: round(n, 1) for name, n in counts.items()},
            "ratio": round(ratio, 3),
        }
        BASELINE.write_text(json.dumps(baseline, indent=2, sort_keys=True) + "\n")
        print(f"guard: written to {BASELINE.name}")
        return 0
    if key() not in baseline:
        print(
            f"guard: no baseline for {key()} in {BASELINE.name}, so nothing was compared; "
            "record one on a commit that you trust: python -m benchmarks.guard --update",
            file=sys.stderr,
        )
        return 2
    allowed = baseline[key()]["ratio"] * (1 + TOLERANCE)
    verdict = "within" if ratio <= allowed else "MORE THAN"
    print(f"guard: {verdict} {allowed:.3f}, the baseline's ratio plus {TOLERANCE:.0%}")
    return 0 if ratio <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
