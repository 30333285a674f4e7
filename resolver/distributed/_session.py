"""SessionContext: a DataFusion session whose queries run on workers.

Tables, functions and SQL are DataFusion's own. What is added is the way from a query to
its staged plan, and from that to rows; the cutting is ``_planner``'s, the running
``_executor``'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import datafusion
import pyarrow as pa

from resolver._errors import ResolverError

from ._analyzed import display_analyzed
from ._calls import worker_info
from ._dataframe import DataFrame, returns_frame
from ._exchange import Exchange
from ._executor import QueryRun, encoded_headers
from ._lookalikes import bears_a_builtin_name, spark_functions_were_used
from ._pieces import piece_count
from ._plan_proto import PlanNode
from ._planner import first_line, single_node
from ._registered import ObjectStore, hand_over_functions
from ._report import RunReport
from ._scalar_subqueries import has_scalar_subqueries, refused_subquery
from ._settings import (
    BATCH_SIZE,
    EXECUTION,
    PLANNING,
    SCALAR_SUBQUERIES,
    derive_context,
    non_default_settings,
)
from ._sources import refused_source
from ._stage import DEFAULT_WIDTH, DistributedPlan, SingleNodePlan
from ._state import SessionState, SessionStateBuilder
from ._stream import ResultStream
from ._task import MAX_PARTITIONS
from ._threads import call_all
from ._worker_resolver import urls_of
from ._workers import SlotCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ._executor import HeadRun
    from ._report import Progress

__all__ = ["SessionContext"]

_SHOWN_STATISTICS: Final = ("hits", "misses", "waits", "connects", "connect_failures")

_LOOKALIKES = "it may call a function that workers would take for DataFusion's own of that name"
_RUNTIME: Final = (
    "the session's memory and disk limits were SET, which would not hold for a distributed "
    "query; give SessionStateBuilder a runtime instead"
)
# Together with an answer that has no columns: SET and RESET have run when sql() returns.
_SETS_RUNTIME: Final = re.compile(r"\b(re)?set\b.*(runtime|\$)", re.IGNORECASE | re.DOTALL)


class _Shared:
    """What all handles on one session have in common. Thread-safe."""

    def __init__(self, state: SessionState) -> None:
        self.state = state
        self.own_planning: str | None = None
        self.settings: dict[str, str] | None = None
        self.stores = {store.url: store for store in state.stores}
        self._lock = threading.Lock()
        self._exchange: Exchange | None = None
        self.slots = SlotCounts(state.channel_resolver)

    def exchange(self) -> Exchange:
        with self._lock:
            if self._exchange is None:
                # A slow reader of a result is no reason to take it away.
                self._exchange = Exchange(self.state.exchange_dir, abandoned_after=math.inf)
            return self._exchange


# In the display of a logical plan; EXISTS and IN are joins in any case.
_SCALAR_SUBQUERY: Final = re.compile(r"(?<!EXISTS )(?<!IN )\(<subquery>\)")


class SessionContext(datafusion.SessionContext):
    """A ``datafusion.SessionContext`` in all else.

    ``state`` comes from ``SessionStateBuilder``; without one this is plain DataFusion.
    Queries may run from several threads at once. Building a query calls no worker;
    results, plans and ``explain()`` do.

    What a result raises, besides DataFusion's own errors: ``TaskFailedError`` when the
    query itself fails on a worker, ``WorkerLostError`` or ``WorkerConnectError`` when no
    worker is left to run it, ``DistributedError`` when a worker refuses what it is asked,
    and whatever the worker resolver raises. All but the last are ``ResolverError``.
    """

    def __init__(
        self,
        state: SessionState | datafusion.SessionConfig | None = None,
        runtime: datafusion.RuntimeEnvBuilder | None = None,
        *,
        config: datafusion.SessionConfig | None = None,
    ) -> None:
        if not isinstance(state, SessionState):
            state = _plain_state(state, config, runtime)
        elif not (config is None and runtime is None):
            raise TypeError(
                "a SessionState has a configuration and a runtime of its own; "
                "set them with SessionStateBuilder().with_config(...).with_runtime(...)"
            )
        super().__init__(state.session_config(), state.runtime)
        self._shared = _Shared(state)
        state.register(self)
        for name, table in state.tables.items():
            _register_table(self, name, table)

    @property
    def state(self) -> SessionState:
        return self._shared.state

    def sql(self, query: str, *args: Any, **kwargs: Any) -> DataFrame:
        frame = DataFrame(super().sql(query, *args, **kwargs), self)
        self._beware_of_setting(query, frame)
        return frame

    def register_object_store(self, schema: str, store: Any, host: str | None = None) -> None:
        super().register_object_store(schema, store, host)
        if host is not None and not schema.startswith("file:"):
            entry = ObjectStore(schema, store, host)
            self._shared.stores[entry.url] = entry

    def deregister_object_store(self, schema: str, host: str | None = None) -> None:
        super().deregister_object_store(schema, host)
        self._shared.stores.pop(f"{schema}{host}/", None)

    def add_physical_optimizer_rule(self, rule: Any) -> None:
        super().add_physical_optimizer_rule(rule)
        self._shared.own_planning = "the session has an optimizer rule of its own"

    def set_query_planner(self, planner: Any) -> None:
        super().set_query_planner(planner)
        self._shared.own_planning = "the session has a query planner of its own"

    def with_extensions(self, *args: Any, **kwargs: Any) -> Any:
        context = self._adopted(super().with_extensions(*args, **kwargs))
        self._shared.own_planning = "the session has extensions of its own"
        return context

    def enable_spark_functions(self) -> None:
        super().enable_spark_functions()
        self._shared.own_planning = _LOOKALIKES

    def register_udf(self, udf: Any) -> None:
        super().register_udf(udf)
        self._beware_of(udf)

    def register_udaf(self, udaf: Any) -> None:
        super().register_udaf(udaf)
        self._beware_of(udaf)

    def register_udwf(self, udwf: Any) -> None:
        super().register_udwf(udwf)
        self._beware_of(udwf)

    def _beware_of_setting(self, query: str, frame: datafusion.DataFrame) -> None:
        if frame.schema():
            return  # it gives rows: no SET
        self._shared.settings = None
        if _SETS_RUNTIME.search(query):
            self._shared.own_planning = _RUNTIME

    def _settings(self) -> dict[str, str]:
        """What this session's execution options are, other than by default.

        Asking DataFusion takes longer than planning a query, so it is remembered until
        the next statement that may SET one.
        """
        if self._shared.settings is None:
            self._shared.settings = non_default_settings(self)
        return self._shared.settings

    def _beware_of(self, function: Any) -> None:
        if bears_a_builtin_name(function):
            self._shared.own_planning = _LOOKALIKES

    def _derived(self, settings: Mapping[str, str]) -> datafusion.SessionContext:
        """A plain session that knows what this one knows, but for its tables."""
        context = derive_context(self, settings, self.state.runtime)
        hand_over_functions(self, context)
        for store in list(self._shared.stores.values()):
            store.register(context)
        return context

    def _stores_of_workers(self) -> frozenset[str]:
        """The URLs of the stores that workers are taken to have, too.

        Those of the session state; not one that this session has replaced since.
        """
        mine = self._shared.stores
        return frozenset(store.url for store in self.state.stores if mine.get(store.url) == store)

    def _exchange_path(self) -> Path:
        """Where this session keeps files while a query runs. Gone when it closes or dies."""
        return self._shared.exchange().path

    def _adopted(self, context: datafusion.SessionContext) -> SessionContext:
        """Another handle on this session, as one of ours."""
        handle = SessionContext.__new__(SessionContext)
        handle.ctx = context.ctx
        handle._shared = self._shared
        return handle

    def _staged(self, frame: datafusion.DataFrame) -> DistributedPlan | SingleNodePlan:
        """How ``frame`` runs now; a single-node plan as this session itself plans it."""
        planned = self._distribute(frame)
        if isinstance(planned, DistributedPlan):
            return planned
        return single_node(planned, frame.execution_plan())

    def _start(
        self,
        frame: datafusion.DataFrame,
        progress: Callable[[Progress], object] | None = None,
    ) -> HeadRun | None:
        """Run the stages of ``frame`` below the head; ``None``: not distributed."""
        query = self._query(frame, progress)
        return None if query is None else query.next_head()

    def _query(
        self,
        frame: datafusion.DataFrame,
        progress: Callable[[Progress], object] | None = None,
        *,
        in_pieces: bool = False,
    ) -> QueryRun | None:
        """``frame`` as a query that has not run yet; ``None``: it is not distributed.

        It runs as this session would run it now, whatever is SET afterwards.
        """
        started = time.monotonic()
        headers = self.state.passthrough_headers()
        planned = self._distribute(frame, headers)
        if not isinstance(planned, DistributedPlan):
            return None
        assert self.state.rule is not None
        partitions = self.state.rule.target_partitions(planned.workers)
        pieces = piece_count(planned, partitions) if in_pieces else 1
        if pieces > 1:
            finer = self._distribute(frame, headers, pieces=pieces)
            pieces = piece_count(finer, partitions) if isinstance(finer, DistributedPlan) else 1
            if isinstance(finer, DistributedPlan) and pieces > 1:
                planned = finer
        return QueryRun(
            planned,
            resolver=self.state.channel_resolver,
            exchange=self._shared.exchange(),
            context=self._derived(EXECUTION),
            settings={**BATCH_SIZE, **self._settings()},
            headers=headers,
            options=self.state.options,
            report=RunReport(progress=progress, planning_seconds=time.monotonic() - started),
            pieces=pieces,
        )

    def _stream(
        self,
        frame: datafusion.DataFrame,
        progress: Callable[[Progress], object] | None = None,
    ) -> ResultStream | None:
        """The rows of ``frame`` from workers, as they come; ``None``: not distributed."""
        query = self._query(frame, progress, in_pieces=True)
        return None if query is None else ResultStream(query)

    def _analyzed(
        self, frame: datafusion.DataFrame, width: int | None = DEFAULT_WIDTH
    ) -> str | None:
        """Run ``frame`` and show what it did; ``None``: it is not distributed."""
        before = self._resolver_statistics()
        run = self._start(frame)
        if run is None:
            return None
        try:
            report = run.analyze()
        finally:
            run.close()
        after = self._resolver_statistics()
        resolvers = {
            process: {name: value - before[process].get(name, 0) for name, value in stats.items()}
            for process, stats in after.items()
            if process in before
        }
        return display_analyzed(report, resolvers=resolvers, width=width)

    def _resolver_statistics(self) -> dict[str, dict[str, int]]:
        """What the resolvers of this process and of the workers have done so far."""
        resolver: Any = self.state.channel_resolver
        found = {"the coordinator": resolver.stats()} if hasattr(resolver, "stats") else {}
        statistics = {process: dataclasses.asdict(stats) for process, stats in found.items()}
        worker_resolver = self.state.worker_resolver
        for url in [] if worker_resolver is None else urls_of(worker_resolver):
            with contextlib.suppress(ResolverError, pa.ArrowException, EOFError, ValueError):
                info = worker_info(resolver, url, self.state.options.worker_timeout)
                statistics[f"worker {url}"] = info["resolver_stats"]
        return {
            process: {name: stats[name] for name in _SHOWN_STATISTICS if name in stats}
            for process, stats in statistics.items()
        }

    def _why_not(self) -> str | None:
        """Why this session distributes no query at all, if it does not."""
        if self.state.rule is None:
            return "the session has no DistributedPhysicalOptimizerRule"
        if self.state.worker_resolver is None:
            return "the session has no worker resolver"
        if self._shared.own_planning is not None:
            return self._shared.own_planning
        return _LOOKALIKES if spark_functions_were_used() else None

    def _distribute(
        self,
        frame: datafusion.DataFrame,
        headers: Mapping[str, str] | None = None,
        *,
        pieces: int = 1,
    ) -> DistributedPlan | str:
        """The staged plan, or the reason why there is none.

        It has partitions for that many ``pieces``, where there is as much to divide.
        """
        state, reason = self.state, self._why_not()
        if reason is not None:
            return reason
        assert state.rule is not None
        assert state.worker_resolver is not None
        urls = urls_of(state.worker_resolver)
        workers = self._shared.slots.of(
            urls,
            headers=encoded_headers(state.passthrough_headers() if headers is None else headers),
            timeout=state.options.worker_timeout,
        )
        # Planned in a session of its own: what cutting asks for must not change how this
        # session plans the queries that are not cut.
        target = str(min(state.rule.target_partitions(workers) * pieces, MAX_PARTITIONS))
        options = {**PLANNING, "datafusion.execution.target_partitions": target}
        try:
            (planner, planned_frame, plan), refused = self._planned(frame.logical_plan(), options)
        except Exception as error:  # noqa: BLE001  # whatever it is, DataFusion runs the query
            return f"it cannot be planned for workers ({first_line(error)})"
        if refused is not None:
            return refused
        planned = state.rule.distribute(
            plan,
            planner,
            workers,
            options=state.options,
            worker_context=state.new_context(EXECUTION),
            stores=self._stores_of_workers(),
            functions=state.function_names,
        )
        if isinstance(planned, SingleNodePlan):
            return planned.reason
        refused = refused_source(planned_frame, planned.root)
        return planned if refused is None else refused

    def _planned(
        self, logical: datafusion.LogicalPlan, options: Mapping[str, str]
    ) -> tuple[_Planned, str | None]:
        """The plan, and why it must not be run on workers, if so.

        Scalar subqueries are planned as joins. Whether they may be is told by the plan in
        which they are none; the two are made at once.
        """
        ways = [{**options, SCALAR_SUBQUERIES: "true"}]
        if _SCALAR_SUBQUERY.search(logical.display_indent()):
            ways.append({**options})

        def planned(planner: datafusion.SessionContext) -> _Planned:
            frame = planner.create_dataframe_from_logical_plan(logical)
            return _Planned(planner, frame, frame.execution_plan())

        calls = [functools.partial(planned, self._derived(way)) for way in ways]
        told, *rest = call_all(calls, name="plan")
        if not rest or not has_scalar_subqueries(told.plan):
            return told, None
        root = PlanNode.parse(told.plan.to_bytes(told.planner))
        return rest[0], refused_subquery(told.plan, root)


class _Planned(NamedTuple):
    """A physical plan, and the session and the frame that it came from."""

    planner: datafusion.SessionContext
    frame: datafusion.DataFrame
    plan: datafusion.ExecutionPlan


def _plain_state(
    positional: Any,
    config: datafusion.SessionConfig | None,
    runtime: datafusion.RuntimeEnvBuilder | None,
) -> SessionState:
    """The state of a session without workers, made as its base is."""
    if positional is not None and config is not None:
        raise TypeError("two configurations were given")
    config = config if positional is None else positional
    if not isinstance(config, datafusion.SessionConfig | None):
        raise TypeError(
            "a SessionContext is made from a SessionState or a SessionConfig, "
            f"not a {type(config).__name__}"
        )
    builder = SessionStateBuilder()
    if config is not None:
        builder.with_config(config)
    if runtime is not None:
        builder.with_runtime(runtime)
    return builder.build()


def _register_table(session: SessionContext, name: str, table: Any) -> None:
    arrow = hasattr(table, "__arrow_c_stream__") or hasattr(table, "__arrow_c_array__")
    if arrow and not isinstance(table, datafusion.DataFrame):
        session.from_arrow(table, name)
    else:
        session.register_table(name, table)


def _stay_distributed() -> None:
    """Wrap every method that gives a DataFrame or another handle on the session."""
    for name, function in vars(datafusion.SessionContext).items():
        if name in vars(SessionContext) or isinstance(function, (classmethod, staticmethod)):
            continue
        if returns_frame(function):
            setattr(SessionContext, name, _giving_frames(function))
        elif getattr(function, "__annotations__", {}).get("return") == "SessionContext":
            setattr(SessionContext, name, _giving_handles(function))


def _giving_frames(function: Any) -> Any:
    @functools.wraps(function)
    def method(self: SessionContext, *args: Any, **kwargs: Any) -> DataFrame:
        return DataFrame(function(self, *args, **kwargs), self)

    return method


def _giving_handles(function: Any) -> Any:
    @functools.wraps(function)
    def method(self: SessionContext, *args: Any, **kwargs: Any) -> SessionContext:
        return self._adopted(function(self, *args, **kwargs))

    return method


_stay_distributed()
