"""Workers that listen in the test's own process, and sessions on them.

Every batch still crosses Flight on loopback; what is saved is starting processes. Tests
of what happens to a process start some.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Self

from resolver import ChannelResolver, DefaultChannelResolver
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    SessionContext,
    SessionStateBuilder,
    StaticWorkerResolver,
    Worker,
)

_IN_MEMORY: Final = Path("/dev/shm")

__all__ = ["BROADCASTS", "DEFAULTS", "SHUFFLES", "LocalWorkers", "Way"]


@dataclass(frozen=True)
class Way:
    """How a session distributes: DataFusion's settings, the engine's options, partitions."""

    settings: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    partitions_per_slot: int = 1

    def but(self, **settings: object) -> Way:
        """The same with other settings of ``datafusion.execution`` or ``.optimizer``."""
        named = {name.replace("__", "."): str(value) for name, value in settings.items()}
        changed = {f"datafusion.{name}": value for name, value in named.items()}
        return replace(self, settings={**self.settings, **changed})


_EVERYWHERE: Final = {"bytes_per_task": 0, "scan_bytes_per_task": 0, "coordinator_threshold": 0}
DEFAULTS: Final = Way()
SHUFFLES: Final = Way(options={**_EVERYWHERE, "broadcast_threshold": 0})
"""Small inputs too are shuffled, to a task on every worker."""
BROADCASTS: Final = Way(options={**_EVERYWHERE, "broadcast_threshold": 1 << 40})
"""Whatever may be broadcast is."""


class LocalWorkers:
    """``count`` workers, up until the ``with`` block ends, and one resolver for all sessions."""

    def __init__(self, count: int, folder: Path) -> None:
        self._count = count
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.resolver: ChannelResolver
        self.urls: list[str]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # In memory where there is such a place: thousands of small queries write files.
            base = _IN_MEMORY if _IN_MEMORY.is_dir() else self._folder
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=base)))
            self.resolver = stack.enter_context(DefaultChannelResolver())
            servers = [
                stack.enter_context(Worker().into_flight_server(exchange_dir=self._folder / name))
                for name in self._folders()
            ]
            self.urls = [server.url for server in servers]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _folders(self) -> Iterator[str]:
        for number in range(self._count):
            name = f"worker{number}"
            (self._folder / name).mkdir()
            yield name

    def session(self, way: Way = DEFAULTS) -> SessionContext:
        rule = DistributedPhysicalOptimizerRule(partitions_per_slot=way.partitions_per_slot)
        builder = (
            SessionStateBuilder()
            .with_options(way.settings)
            .with_distributed_worker_resolver(StaticWorkerResolver(self.urls))
            .with_physical_optimizer_rule(rule)
            .with_distributed_channel_resolver(self.resolver)
            .with_exchange_dir(self._folder)
        )
        for name, value in way.options.items():
            builder.with_distributed_option(name, value)
        return SessionContext(builder.build())
