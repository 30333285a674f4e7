"""What a hit costs, beside each peer.

Where objects lie in memory and how their keys hash moves a figure by a tenth, so the
measurement is made in several fresh processes and their median taken.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from .measure import URLS, median_ratio, take_turns

if TYPE_CHECKING:
    from .peers import Loop

Figures = dict[str, tuple[float, float]]
"""Of each peer: nanoseconds a look-up, and that over the resolver's."""

_TURN = 0.002  # seconds; several look-ups of every URL even for the slowest peer


def measure(*, processes: int = 5, turns: int = 101) -> Figures:
    """The median of as many fresh processes, each with a hash seed of its own."""
    runs: list[Figures] = []
    for seed in range(processes):
        command = [sys.executable, "-m", "benchmarks.hits", str(turns)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        result = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        runs.append(json.loads(result.stdout))
    return {
        name: (
            statistics.median(run[name][0] for run in runs),
            statistics.median(run[name][1] for run in runs),
        )
        for name in runs[0]
    }


def measure_here(*, turns: int) -> Figures:
    """The same in this process."""
    from .peers import RESOLVER, hit_peers

    loops = hit_peers()
    rounds = {name: _rounds_for(loop, _TURN) for name, loop in loops.items()}
    runs = {name: functools.partial(loop, rounds[name], URLS) for name, loop in loops.items()}
    # Only this thread works, so its own processor time leaves the machine's other work out.
    times = take_turns(runs, turns=turns, clock=time.thread_time)
    per_lookup = {
        name: [seconds * 1e9 / (rounds[name] * len(URLS)) for seconds in taken]
        for name, taken in times.items()
    }
    return {
        name: (statistics.median(taken), median_ratio(taken, per_lookup[RESOLVER]))
        for name, taken in per_lookup.items()
    }


def _rounds_for(loop: Loop, seconds: float) -> int:
    """How often all URLs can be looked up in about so many seconds."""
    loop(1, URLS)
    start = time.thread_time()
    loop(3, URLS)
    return max(1, round(3 * seconds / (time.thread_time() - start)))


if __name__ == "__main__":
    json.dump(measure_here(turns=int(sys.argv[1])), sys.stdout)
