"""Whether two threads look up faster than one, beside `dict` doing the same.

Means something on a free-threaded interpreter only; needs none of the peers, few of
which can be had there. `tools/free-threaded` runs this module as a program on one.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

from resolver import DefaultChannelResolver
from resolver.testing import FakeConnector

from .measure import URLS, all_at_once, gil_enabled, heading


def askers(*, rounds: int) -> dict[str, Callable[[int], None]]:
    """Of the resolver and of dict: looks one half of the URLs up, `rounds` times."""
    resolver = DefaultChannelResolver(FakeConnector())
    clients = {url: resolver.get_flight_client_for_url(url) for url in URLS}
    middle = len(URLS) // 2
    halves = URLS[:middle], URLS[middle:]

    def ask_resolver(number: int) -> None:
        urls = halves[number]
        for _ in range(rounds):
            for url in urls:
                resolver.get_flight_client_for_url(url)

    def ask_dict(number: int) -> None:
        urls = halves[number]
        for _ in range(rounds):
            for url in urls:
                clients.get(url)

    return {"resolver": ask_resolver, "dict": ask_dict}


def measure(*, rounds: int = 1_000, turns: int = 101) -> dict[str, float]:
    """Look-ups a second of two threads on disjoint URLs, over those of one thread.

    Each ratio is the median over turns of adjacent one- and two-thread runs.
    """
    order = list(askers(rounds=rounds).items())
    ratios: dict[str, list[float]] = {name: [] for name, _ in order}
    for _ in range(turns):
        for name, ask in order:
            one = all_at_once(1, ask)
            two = all_at_once(2, ask)
            ratios[name].append(2 * one / two)
        order.reverse()
    return {name: statistics.median(seen) for name, seen in ratios.items()}


def main() -> None:
    """Print heading and figures as JSON, for `python -m benchmarks` on another interpreter."""
    if gil_enabled():
        sys.exit("with the GIL two threads take turns; run this on a free-threaded interpreter")
    json.dump({"heading": heading(), **measure()}, sys.stdout)


if __name__ == "__main__":
    main()
