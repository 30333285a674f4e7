"""What several connections per URL are worth: real requests over 1, 2 and 4 lanes.

The look-ups alone, which only a free-threaded interpreter runs at once, are in
`scaling.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pyarrow import flight

from resolver import DefaultChannelResolver
from resolver.testing import FlightServerProcess

from .measure import all_at_once, median_ratio, take_turns

LANES = (1, 2, 4)
SMALL = "small do_get"
BULK = "do_get of 8 MB"
THREADS = 4

_ROWS = 131_072  # of int64: 1 MB a batch


def asker(
    url: str, resolver: DefaultChannelResolver, ticket: bytes, calls: int
) -> Callable[[], None]:
    """Each of `THREADS` threads, all at once: `calls` requests on the client of its lane."""
    asked = flight.Ticket(ticket)

    def ask(_: int) -> None:
        for _ in range(calls):
            resolver.get_flight_client_for_url(url).do_get(asked).read_all()

    return lambda: (all_at_once(THREADS, ask), None)[1]


def measure(*, turns: int = 15) -> dict[str, dict[int, float]]:
    """Requests a second over so many lanes, over those on one lane; median of turns."""
    ratios = {}
    for name, rows, ticket, calls in ((SMALL, 1, b"1", 50), (BULK, _ROWS, b"8", 2)):
        with FlightServerProcess(batch_rows=rows) as worker, contextlib.ExitStack() as stack:
            runs = {}
            for lanes in LANES:
                resolver = DefaultChannelResolver(connections_per_url=lanes)
                stack.enter_context(resolver)
                if resolver.prefetch([worker.url]):
                    raise RuntimeError("the worker cannot be reached")
                runs[str(lanes)] = asker(worker.url, resolver, ticket, calls)
            times = take_turns(runs, turns=turns)
        ratios[name] = {lanes: median_ratio(times["1"], times[str(lanes)]) for lanes in LANES}
    return ratios
