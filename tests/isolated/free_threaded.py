"""On a free-threaded interpreter: importing keeps the GIL off, and threads really race.

Usage: free_threaded.py SECONDS. Exits with 1 when the GIL came back.
"""

# ruff: noqa: T201 -- a script reports to whoever runs it

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from resolver import DefaultChannelResolver, _backend
from resolver.testing import FakeConnector
from tests.support.threads import run_concurrently

THREADS = 8


def main(seconds):
    assert not sys._is_gil_enabled(), "the GIL is on after `import resolver`"
    assert _backend.IMPLEMENTATION == "compiled"
    urls = [f"http://10.0.9.{n}:50051" for n in range(24)]
    connector = FakeConnector()
    resolver = DefaultChannelResolver(connector, max_clients=12, connections_per_url=2)
    until = time.monotonic() + seconds

    def act(seed):
        dice = random.Random(seed)
        while time.monotonic() < until:
            for _ in range(100):
                url = dice.choice(urls)
                client = resolver.get_flight_client_for_url(dice.choice([url, url + "/"]))
                assert client.url == url
                if dice.random() < 0.05:
                    resolver.invalidate(url, client)
        return True

    assert all(run_concurrently([lambda n=n: act(n) for n in range(THREADS)]))
    resolver._validate()
    stats = resolver.stats()
    assert stats.clients <= 12
    resolver.close()
    resolver._validate()
    connector.wait_disposed(connector.created)
    assert not sys._is_gil_enabled(), "the GIL came back"
    print(stats)


if __name__ == "__main__":
    main(float(sys.argv[1]))
