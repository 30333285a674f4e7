"""Ends the interpreter with clients in every state. Usage: shutdown.py IMPLEMENTATION CASE.

Exits with 0 and prints nothing on stderr, or the caller's deadline passes.
"""

# ruff: noqa: T201 -- a script reports to whoever runs it

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from resolver import _resolver
from resolver.testing import FakeConnector
from tests.support.implementations import resolver_type

URL = "http://10.0.0.7:50051"


class Late:
    """Closes a resolver when the interpreter drops this, as late as anybody can."""

    def __init__(self, resolver):
        self.resolver = resolver

    def __del__(self):
        self.resolver.close()


class Client:
    """Uses its resolver at its own end."""

    def __init__(self, resolver=None):
        self.resolver = resolver

    def __del__(self):
        if self.resolver is not None:
            self.resolver.invalidate(URL, self)


def main(implementation, case):
    global late, resolver
    connector = FakeConnector()
    resolver = resolver_type(implementation)(connector, idle_timeout=0.05)
    match case:
        case "live":
            resolver.prefetch([URL, "http://b:1", "http://c:1"])
        case "late":
            # Nothing was dropped before: no disposer runs yet, and none can start any more.
            resolver.get_flight_client_for_url(URL)
            late = Late(resolver)
            late.me = late
            resolver = None
        case "default":
            _resolver._default = resolver
            resolver.get_flight_client_for_url(URL)
            sys.modules["__main__"].keep = resolver.get_flight_client_for_url
        case "cycle":
            resolver.connector = type("C", (), {"connect": lambda self, url: Client(resolver)})()
            resolver.get_flight_client_for_url(URL)
        case "connecting":
            gate = connector.block()
            for _ in range(3):
                threading.Thread(
                    target=resolver.get_flight_client_for_url, args=(URL,), daemon=True
                ).start()
            gate.wait_entered()
        case "disposing":
            held = [resolver.get_flight_client_for_url(f"http://h{n}:1") for n in range(100)]
            resolver.clear()
            sys.modules["__main__"].held = held
    print("main ends")


if __name__ == "__main__":
    main(*sys.argv[1:])
