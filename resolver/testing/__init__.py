"""Fakes and fault injection for whoever tests code that uses a resolver.

- `FakeConnector` and `FakeClient`: a connector without a network, whose connects can
  be counted, blocked, delayed and failed per URL;
- `FlightServerProcess`: a small real Flight server in another process, to be killed,
  restarted and suspended;
- `FaultyProxy`: a TCP proxy in front of a port that refuses, stays silent, resets,
  delays or talks nonsense.

All of it stays on this machine. Production code imports nothing from here.
"""

from ._fake import FakeClient, FakeConnector, Gate
from ._proxy import FaultyProxy
from ._server import FlightServerProcess

__all__ = ["FakeClient", "FakeConnector", "FaultyProxy", "FlightServerProcess", "Gate"]
