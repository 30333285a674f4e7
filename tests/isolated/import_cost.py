"""Checks what `import resolver` loads: neither grpc nor datafusion, no thread, few modules."""

# ruff: noqa: T201 -- a script reports to whoever runs it

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pyarrow.flight  # noqa: F401 -- the baseline

OWN_ALLOWED = 25
# Some of the standard library's, too: which of them pyarrow has loaded is its affair.
ALL_ALLOWED = 80  # a framework is hundreds

before = set(sys.modules)
import resolver  # noqa: E402

loaded = sorted(set(sys.modules) - before)
print(len(loaded), *loaded)
heavy = {"grpc", "datafusion", "google", "polars", "pandas", "cloudpickle", "asyncio"}
wrong = sorted(heavy & ({name.partition(".")[0] for name in loaded}))
assert not wrong, f"import resolver loads {wrong}"
own = [name for name in loaded if name.startswith("resolver")]
assert len(own) <= OWN_ALLOWED, f"import resolver loads {len(own)} modules of its own"
assert len(loaded) <= ALL_ALLOWED, f"import resolver loads {len(loaded)} modules"
optional = {
    "resolver.distributed",
    "resolver.testing",
    "resolver.cli",
    "resolver._grpc",
    "resolver._grpc_client",
    "resolver.aio",
    "resolver.layers",
}
assert not optional & set(loaded), "import resolver loads optional parts"
assert threading.active_count() == 1, "import resolver starts a thread"
assert resolver.DefaultChannelResolver(object.__new__(resolver.FlightConnector)) is not None
assert threading.active_count() == 1, "making a resolver starts a thread"
