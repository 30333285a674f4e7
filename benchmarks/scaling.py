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
    """Of the resolver and of dict: looks one half of the URLs up, `rounds` times.

    Each thread binds the method once, as a loop that counts on it does: threads that look it up
    each time count their references to the resolver, or dict, itself.
    """
    resolver = DefaultChannelResolver(FakeConnector())
    clients = {url: resolver.get_flight_client_for_url(url) for url in URLS}
    middle = len(URLS) // 2
    halves = URLS[:middle], URLS[middle:]

    def ask_resolver(number: int) -> None:
        urls = halves[number]
        get = resolver.get_flight_client_for_url
        for _ in range(rounds):
            for url in urls:
                get(url)

    def ask_dict(number: int) -> None:
        urls = halves[number]
        get = clients.get
        for _ in range(rounds):
            for url in urls:
                get(url)

    return {"resolver": ask_resolver, "dict": ask_dict}


def askers_of_one_url(*, rounds: int) -> dict[str, Callable[[int], None]]:
    """Of the resolver over one and two lanes, and of dict: look one URL up, `rounds` times.

    "a dict each" shares nothing at all: what this machine, busy as it is, lets two threads do.
    Each thread has a string of its own, as one that reads URLs from messages does: threads
    that share the very object make its reference count bounce, whatever they pass it to.
    """
    (url,) = URLS[:1]

    def ask_resolver(lanes: int) -> Callable[[int], None]:
        resolver = DefaultChannelResolver(FakeConnector(), connections_per_url=lanes)

        def ask(_: int) -> None:
            own = "".join(list(url))
            get = resolver.get_flight_client_for_url
            for _ in range(rounds):
                get(own)

        return ask

    clients = {url: object()}

    def ask_dict(_: int) -> None:
        own = "".join(list(url))
        get = clients.get
        for _ in range(rounds):
            get(own)

    def share_nothing(_: int) -> None:
        own = ["".join(list(url))] * 512
        get = {own[0]: object()}.get
        for _ in range(rounds // 512):
            for each in own:
                get(each)

    return {
        "1 lane": ask_resolver(1),
        "2 lanes": ask_resolver(2),
        "dict, one URL": ask_dict,
        "a dict each": share_nothing,
    }


def measure(*, rounds: int = 1_000, turns: int = 101) -> dict[str, float]:
    """Look-ups a second of two threads, over those of one thread.

    Of "resolver" and "dict" on disjoint URLs, of the others on one URL. Each ratio is the
    median over turns of adjacent one- and two-thread runs.
    """
    of_one_url = askers_of_one_url(rounds=rounds * len(URLS) // 2)
    order = list({**askers(rounds=rounds), **of_one_url}.items())
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
