"""SessionState and its builder: what a session, or a worker's task, is made with.

The same builder serves both of the places where a ChannelResolver is registered: the
session that starts a query and every worker that runs a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import datafusion

from resolver._resolver import ChannelResolver, default_channel_resolver

from ._worker_resolver import WorkerResolver

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from ._planner import DistributedPhysicalOptimizerRule

__all__ = ["SessionState", "SessionStateBuilder"]


@dataclass(frozen=True)
class SessionState:
    """Everything a session is made with. Made by ``SessionStateBuilder.build()``.

    Without a ``worker_resolver`` or a ``rule`` every plan runs single-node.
    """

    channel_resolver: ChannelResolver
    worker_resolver: WorkerResolver | None = None
    rule: DistributedPhysicalOptimizerRule | None = None
    runtime: datafusion.RuntimeEnvBuilder | None = None
    exchange_dir: str | os.PathLike[str] | None = None
    _template: datafusion.SessionContext = field(
        default_factory=datafusion.SessionContext, repr=False, compare=False
    )

    def session_config(self) -> datafusion.SessionConfig:
        """A copy of the configuration, free to be changed."""
        return self._template.copied_config()

    def new_context(self) -> datafusion.SessionContext:
        """A plain DataFusion session with this state's configuration and runtime."""
        return datafusion.SessionContext(self.session_config(), self.runtime)


class SessionStateBuilder:
    """Collects what a session needs; every method returns the builder. Not thread-safe."""

    def __init__(self) -> None:
        self._config: datafusion.SessionConfig | None = None
        self._options: dict[str, str] = {}
        self._runtime: datafusion.RuntimeEnvBuilder | None = None
        self._channel_resolver: ChannelResolver | None = None
        self._worker_resolver: WorkerResolver | None = None
        self._rule: DistributedPhysicalOptimizerRule | None = None
        self._exchange_dir: str | os.PathLike[str] | None = None

    def with_distributed_worker_resolver(self, resolver: WorkerResolver) -> SessionStateBuilder:
        """Where a query's workers come from: anything with ``get_urls()``."""
        if not isinstance(resolver, WorkerResolver):
            raise TypeError(f"{type(resolver).__name__} is no WorkerResolver: it has no get_urls()")
        self._worker_resolver = resolver
        return self

    def with_distributed_channel_resolver(self, resolver: ChannelResolver) -> SessionStateBuilder:
        """How a worker is reached: anything with ``get_flight_client_for_url(url)``.

        Default: ``default_channel_resolver()``, shared by the whole process.
        """
        if not callable(getattr(resolver, "get_flight_client_for_url", None)):
            raise TypeError(
                f"{type(resolver).__name__} is no ChannelResolver: "
                "it has no get_flight_client_for_url()"
            )
        self._channel_resolver = resolver
        return self

    def with_physical_optimizer_rule(
        self, rule: DistributedPhysicalOptimizerRule
    ) -> SessionStateBuilder:
        """The rule that cuts plans into stages."""
        if not callable(getattr(rule, "distribute", None)):
            raise TypeError(f"{type(rule).__name__} is no DistributedPhysicalOptimizerRule")
        self._rule = rule
        return self

    def with_config(self, config: datafusion.SessionConfig) -> SessionStateBuilder:
        """DataFusion's configuration. Copied by ``build()``."""
        self._config = config
        return self

    def with_options(self, options: Mapping[str, object]) -> SessionStateBuilder:
        """DataFusion options by name, such as ``datafusion.execution.batch_size``."""
        self._options.update((name, str(value)) for name, value in options.items())
        return self

    def with_runtime(self, runtime: datafusion.RuntimeEnvBuilder) -> SessionStateBuilder:
        """DataFusion's runtime environment: memory pool and spill directories."""
        self._runtime = runtime
        return self

    def with_exchange_dir(self, path: str | os.PathLike[str]) -> SessionStateBuilder:
        """Where fetched stage output is kept while a query runs.

        A directory of the session's own is made there. Default: the system's temporary
        directory.
        """
        self._exchange_dir = path
        return self

    def build(self) -> SessionState:
        """Raises ``ValueError`` for an option that DataFusion does not know."""
        # A SessionConfig changes in place; only a session can copy one.
        config = datafusion.SessionContext(self._config).copied_config()
        for name, value in self._options.items():
            config = config.set(name, value)
        return SessionState(
            channel_resolver=(
                # Not "or": a resolver that holds no client yet is falsy, like any container.
                default_channel_resolver()
                if self._channel_resolver is None
                else self._channel_resolver
            ),
            worker_resolver=self._worker_resolver,
            rule=self._rule,
            runtime=self._runtime,
            exchange_dir=self._exchange_dir,
            _template=datafusion.SessionContext(config),
        )
