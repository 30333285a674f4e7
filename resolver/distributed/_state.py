"""SessionState and its builder: what a session, or a worker's task, is made with.

The same builder serves both of the places where a ChannelResolver is registered: the
session that starts a query and every worker that runs a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import datafusion

from resolver._resolver import ChannelResolver, default_channel_resolver

from ._lookalikes import bears_a_builtin_name
from ._options import DistributedOptions
from ._passthrough import PassthroughHeaders
from ._registered import FUNCTION_KINDS, ObjectStore
from ._worker_resolver import WorkerResolver

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from ._planner import DistributedPhysicalOptimizerRule

__all__ = ["SessionState", "SessionStateBuilder"]


@dataclass(frozen=True)
class SessionState:
    """Everything a session is made with. Made by ``SessionStateBuilder.build()``.

    Immutable, and may be shared: several sessions, on any threads, can be made of one.

    Without a ``worker_resolver`` or a ``rule`` every plan runs single-node.
    """

    channel_resolver: ChannelResolver
    worker_resolver: WorkerResolver | None = None
    rule: DistributedPhysicalOptimizerRule | None = None
    runtime: datafusion.RuntimeEnvBuilder | None = None
    exchange_dir: str | os.PathLike[str] | None = None
    options: DistributedOptions = field(default_factory=DistributedOptions)
    passthrough_headers: Callable[[], dict[str, str]] = field(
        default_factory=PassthroughHeaders, compare=False
    )
    stores: tuple[ObjectStore, ...] = field(default=(), repr=False, compare=False)
    tables: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _functions: tuple[tuple[str, Any], ...] = field(default=(), repr=False, compare=False)
    _template: datafusion.SessionContext = field(
        default_factory=datafusion.SessionContext, repr=False, compare=False
    )

    def session_config(self) -> datafusion.SessionConfig:
        """A copy of the configuration, free to be changed."""
        return self._template.copied_config()

    @property
    def function_names(self) -> frozenset[str]:
        """The functions that this state registers in every session."""
        return frozenset(function.name for _, function in self._functions)

    @property
    def object_stores(self) -> frozenset[str]:
        """The URLs of the stores that this state registers in every session."""
        return frozenset(store.url for store in self.stores)

    def register(self, context: datafusion.SessionContext) -> None:
        """Give ``context`` this state's functions and object stores."""
        for kind, function in self._functions:
            FUNCTION_KINDS[kind].register(context, function)
        for store in self.stores:
            store.register(context)

    def new_context(self, settings: Mapping[str, str] | None = None) -> datafusion.SessionContext:
        """A plain DataFusion session with all of this state but its tables.

        ``settings`` go over the state's configuration. Raises ``ValueError`` for an option
        that DataFusion does not know or a value it refuses.
        """
        config = self.session_config()
        for name, value in (settings or {}).items():
            config = config.set(name, value)
        context = datafusion.SessionContext(config, self.runtime)
        self.register(context)
        return context


_HAS_A_BUILTIN_NAME: Final = (
    "{name!r} is the name of a function of DataFusion's own, which workers would call instead"
)


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
        self._distributed = DistributedOptions()
        self._headers = PassthroughHeaders()
        self._functions: dict[tuple[str, str], Any] = {}
        self._stores: dict[str, ObjectStore] = {}
        self._tables: dict[str, Any] = {}

    def with_distributed_worker_resolver(self, resolver: WorkerResolver) -> SessionStateBuilder:
        """Where a query's workers come from: anything with ``get_urls()``.

        Raises ``TypeError`` for what has none.
        """
        if not isinstance(resolver, WorkerResolver):
            raise TypeError(f"{type(resolver).__name__} is no WorkerResolver: it has no get_urls()")
        self._worker_resolver = resolver
        return self

    def with_distributed_channel_resolver(self, resolver: ChannelResolver) -> SessionStateBuilder:
        """How a worker is reached: anything with ``get_flight_client_for_url(url)``.

        Default: ``default_channel_resolver()``, shared by the whole process. Raises
        ``TypeError`` for what is none.
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
        """The rule that cuts plans into stages. Raises ``TypeError`` for another one."""
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

    def with_distributed_option(self, name: str, value: object) -> SessionStateBuilder:
        """Set one of ``DistributedOptions``, such as ``broadcast_threshold``.

        Raises ``ValueError`` for an unknown name, or a value of another type or range.
        """
        self._distributed = self._distributed.replace(name, value)
        return self

    def with_distributed_passthrough_headers(
        self, headers: Mapping[str, str] | Callable[[], Mapping[str, str]]
    ) -> SessionStateBuilder:
        """Headers for every call that a query causes, on workers too.

        ``headers`` maps names to values; a callable is asked for such a mapping once per
        query. Workers see them in ``WorkerQueryContext.headers``. Values are ASCII text
        and appear in no log, repr or error.
        """
        self._headers = PassthroughHeaders(headers)
        return self

    def with_udf(self, function: datafusion.ScalarUDF) -> SessionStateBuilder:
        """A scalar function for every session made from the state.

        Plans carry its name only. Build a worker's sessions with a function of the same
        name, and queries that call it are distributed. Raises ``ValueError`` for the name
        of a function of DataFusion's own.
        """
        return self._with_function("udf", function)

    def with_udaf(self, function: datafusion.AggregateUDF) -> SessionStateBuilder:
        """An aggregate function; see ``with_udf``."""
        return self._with_function("udaf", function)

    def with_udwf(self, function: datafusion.WindowUDF) -> SessionStateBuilder:
        """A window function; see ``with_udf``."""
        return self._with_function("udwf", function)

    def _with_function(self, kind: str, function: Any) -> SessionStateBuilder:
        expected = FUNCTION_KINDS[kind].type
        if not isinstance(function, expected):
            raise TypeError(f"with_{kind} takes a {expected.__name__}, not {function!r}")
        if bears_a_builtin_name(function):
            raise ValueError(_HAS_A_BUILTIN_NAME.format(name=function.name))
        self._functions[kind, function.name] = function
        return self

    def with_object_store(self, schema: str, store: Any, host: str) -> SessionStateBuilder:
        """A store of ``datafusion.object_store`` for every session made from the state.

        ``with_object_store("s3://", AmazonS3("lake", ...), "lake")`` makes
        ``s3://lake/...`` readable. Credentials do not travel: build a worker's sessions
        with a store of its own under the same name. Raises ``ValueError`` for what is no
        schema or host.
        """
        entry = ObjectStore(schema, store, host)
        self._stores[entry.url] = entry
        return self

    def with_table(self, name: str, table: Any) -> SessionStateBuilder:
        """A table for every ``SessionContext`` made from the state.

        ``table`` is anything ``register_table`` takes, or Arrow data: an object with
        ``__arrow_c_stream__`` or ``__arrow_c_array__``.
        """
        self._tables[name] = table
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
            options=self._distributed,
            passthrough_headers=self._headers,
            stores=tuple(self._stores.values()),
            tables=dict(self._tables),
            _functions=tuple((kind, function) for (kind, _), function in self._functions.items()),
            _template=datafusion.SessionContext(config),
        )
