"""Runs the stages of one query: what when, where, and again.

Stages run from the leaves up. A stage's tree is settled once its inputs are measured;
its tasks then run on the workers that are left. Every task's output stays where it was
made, so a lost worker costs its tasks and not the query.

The invariant that keeps an answer right: an output counts only while every output that
it was made from is still the one in use. Made again, a stage need not give the same rows
in the same partitions, so what was made from the lost rows is made again too.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from resolver._errors import ResolverError, WorkerConnectError

from . import _wire
from ._adapt import adapt, read_by_every_task, waits_for_build_side
from ._calls import TaskRefusedError
from ._errors import DistributedError, WorkerLostError
from ._inputs import InputLostError
from ._pieces import may_be_read_in_pieces
from ._runs import (
    Output,
    StageRun,
    TaskRun,
    as_run,
    is_latest,
    measured_of,
    replaced,
    sizes_of,
    stage_input,
)
from ._sizes import divided_bytes, reads_little, task_count
from ._threads import call_all
from ._tree import Boundary, Share, Stage, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from ._calls import WorkerCalls
    from ._options import DistributedOptions
    from ._report import RunReport
    from ._workers import WorkerSlots

__all__ = ["Scheduler", "StageRun"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Settled:
    """A stage whose inputs have run: its tree, and who they are by number."""

    tree: Tree
    inputs: Mapping[int, StageRun]
    decisions: tuple[str, ...] = ()
    one_task: bool = False  # for it holds what were stages of their own

    def after(self, decisions: Iterable[str]) -> _Settled:
        """The same, with what had been decided before."""
        return replace(self, decisions=(*decisions, *self.decisions))


class Scheduler:
    """Runs the stages of one query. Made for one query; ``settle_head`` is called once."""

    def __init__(
        self,
        query: str,
        *,
        workers: Sequence[WorkerSlots],
        calls: WorkerCalls,
        options: DistributedOptions,
        settings: Mapping[str, str],
        passthrough: Sequence[str],
        empty: Callable[[Tree], Tree],
        first_new_number: int,
        report: RunReport,
    ) -> None:
        self.query: Final = query
        self._workers = workers
        self._calls = calls
        self._options = options
        self._settings = settings
        self._passthrough = tuple(passthrough)
        self._empty = empty
        self._report = report
        self._numbers = itertools.count(first_new_number)
        self._lock = threading.Lock()
        self._lost: dict[str, ResolverError] = {}
        self._refusing: dict[str, ResolverError] = {}  # new tasks; their outputs count
        self._called: set[str] = set()
        self._is_over = False
        self._pieces = 1

    @property
    def called(self) -> list[str]:
        """The workers that have been given a task, or may have been."""
        with self._lock:
            return sorted(self._called)

    @property
    def lost(self) -> frozenset[str]:
        """The workers that were lost so far."""
        with self._lock:
            return frozenset(self._lost)

    def end(self) -> None:
        """Start nothing more."""
        with self._lock:
            self._is_over = self._calls.is_over = True

    # Settling: inputs first, then decisions.

    def settle(self, stage: Stage, *, may_merge: bool = True) -> _Settled:
        """Run everything below ``stage`` and decide how its own tree will run.

        A stage below that one task would run is left to the task that reads it, if that
        is one task too: ``may_merge``.
        """
        tree = stage.tree
        decisions: dict[str, None] = {}  # each once
        runs: dict[int, StageRun] = {}
        prepared: dict[int, _Settled] = {}
        little: dict[int, _Settled] = {}
        spared = read_by_every_task(tree, self._options)
        while True:
            inputs = [leaf.source for leaf in tree.walk() if leaf.source is not None]
            missing = [below for below in inputs if below.number not in runs]
            if not missing:
                break
            settled = {**prepared, **little}
            merged = self._merged(stage, tree, missing, runs, settled) if may_merge else None
            if merged is not None:
                return merged.after(decisions)
            wanted = [below for below in missing if below.number not in spared]
            waiting = waits_for_build_side(tree, runs)
            mergeable = _may_be_merged(missing, self._options) if may_merge else frozenset()
            calls = self._steps(wanted, waiting, mergeable, settled)
            for number, result in call_all(calls, name=f"stage-{stage.number}"):
                if isinstance(result, StageRun):
                    runs[number] = result
                elif number in waiting:
                    prepared[number] = result
                else:
                    little[number] = result
            tree = self._adapted(tree, runs, prepared, little, decisions)
            spared = frozenset()  # what is still there is needed after all
        needed = {below.number for below in inputs}
        for number, probe in prepared.items():
            if number not in needed:  # its decisions are this stage's now
                decisions.update(dict.fromkeys(probe.decisions))
        return _Settled(tree, {number: runs[number] for number in sorted(needed)}, tuple(decisions))

    def _steps(
        self,
        wanted: Sequence[Stage],
        waiting: Collection[int],
        mergeable: Collection[int],
        settled: Mapping[int, _Settled],
    ) -> list[Callable[[], tuple[int, StageRun | _Settled]]]:
        """Run these stages, but those that wait for a build side only up to their own tree."""
        steps: list[Callable[[], tuple[int, StageRun | _Settled]]] = []
        for below in wanted:
            if below.number not in waiting:
                may_wait = below.number in mergeable and below.number not in settled
                steps.append(functools.partial(self._completed, below, settled, may_wait=may_wait))
            elif below.number not in settled:
                steps.append(functools.partial(self._prepared, below))
        return steps

    def _merged(
        self,
        stage: Stage,
        tree: Tree,
        missing: Sequence[Stage],
        runs: Mapping[int, StageRun],
        settled: Mapping[int, _Settled],
    ) -> _Settled | None:
        """``tree`` with what ``missing`` would run in it, if one task is enough for it all."""
        if not all(below.number in settled for below in missing):
            return None
        below = {stage.number: settled[stage.number] for stage in missing}
        inputs = {**runs, **{n: run for one in below.values() for n, run in one.inputs.items()}}
        whole = replaced(tree, {number: one.tree for number, one in below.items()})
        read = [leaf.source.number for leaf in whole.walk() if leaf.source is not None]
        measured = {number: inputs[number].measured() for number in read}
        if len(read) != len(measured) or not reads_little(whole, measured, self._options):
            return None
        decisions = [decision for one in below.values() for decision in one.decisions]
        decisions += [
            f"stage {number} reads little, so one task runs it and stage {stage.number}"
            for number in below
        ]
        return _Settled(whole, {n: inputs[n] for n in sorted(measured)}, tuple(decisions), True)

    def _adapted(
        self,
        tree: Tree,
        runs: dict[int, StageRun],
        prepared: dict[int, _Settled],
        little: Mapping[int, _Settled],
        decisions: dict[str, None],
    ) -> Tree:
        """``tree`` after what is known now; what it reads is put into ``runs``, or prepared."""
        adapted = adapt(
            tree,
            # A join is left out if its build side has no rows. Of mixed attempts, none may
            # have any though every one of them as a whole would have some.
            {number: measured_of(self._made(run.tasks).values()) for number, run in runs.items()},
            {
                # Its repartition was the shuffle that is not needed.
                number: probe.tree.children[0]
                for number, probe in prepared.items()
                if number not in runs
            },
            self._options,
            empty=self._empty,
            new_number=self._new_number,
        )
        decisions.update(dict.fromkeys(adapted.decisions))
        known = dict(runs)
        for probe in prepared.values():
            known.update(probe.inputs)
        for created in adapted.created:
            # It may read another that was created before it, or one that waited in vain. What
            # is below that has run, and must not run again.
            waited = {**prepared, **little}
            calls = [
                functools.partial(self._complete, below, waited.get(below.number))
                for below in created.inputs
                if below.number not in known
            ]
            made = call_all(calls, name=f"stage-{created.number}")
            known.update({run.number: run for run in made})
            inputs = {below.number: known[below.number] for below in created.inputs}
            prepared[created.number] = _Settled(as_run(created.tree, inputs), inputs)
        for leaf in adapted.tree.walk():
            if leaf.source is not None and leaf.source.number in known:
                runs[leaf.source.number] = known[leaf.source.number]
        return as_run(adapted.tree, runs)

    def _completed(
        self, stage: Stage, prepared: Mapping[int, _Settled], *, may_wait: bool = False
    ) -> tuple[int, StageRun | _Settled]:
        settled = prepared.get(stage.number) or self.settle(stage)
        if may_wait and reads_little(settled.tree, sizes_of(settled.inputs), self._options):
            return stage.number, settled
        return stage.number, self._complete(stage, settled)

    def _prepared(self, stage: Stage) -> tuple[int, StageRun | _Settled]:
        # Its tree may become a part of another one that several tasks run.
        return stage.number, self.settle(stage, may_merge=False)

    def _new_number(self) -> int:
        return next(self._numbers)

    def settle_head(self, head: Stage, pieces: int = 1) -> list[StageRun]:
        """Run everything below ``head``; its last stage joins it when it reads little.

        If that is to run in ``pieces``, or fewer, it has not run yet, and each of the heads
        that are returned reads one of them: ``inputs_of()`` is what runs it.
        """
        self._pieces = pieces
        inputs = head.inputs
        prepare = [functools.partial(self.settle, below) for below in inputs]
        settled = {
            below.number: result
            for below, result in zip(inputs, call_all(prepare, name="head"), strict=True)
        }
        small = {below.number for below in inputs if self._is_small(below, settled[below.number])}
        if pieces > 1 and not small:
            (last,) = inputs
            parts = self._in_pieces(last, settled[last.number])
            return [self._head(head, {last.number: part}) for part in parts]
        complete = [
            functools.partial(self._complete, below, settled[below.number])
            for below in inputs
            if below.number not in small
        ]
        runs = {run.number: run for run in call_all(complete, name="head")}
        decisions: list[str] = []
        for number in sorted(small):
            runs.update(settled[number].inputs)
            decisions += settled[number].decisions
            decisions.append(f"stage {number} reads little, so the coordinator runs it")
        trees = {number: self._coarser(settled[number].tree) for number in small}
        tree = replaced(head.tree, trees)
        self._report.decided(head.number, decisions)
        return [self._head(replace(head, tree=tree), runs)]

    def _head(self, head: Stage, runs: Mapping[int, StageRun]) -> StageRun:
        """``head`` over what has run, or is to run when it is asked for."""
        self._report.head = as_run(head.tree, runs)
        return StageRun(replace(head, tree=self._report.head), runs)

    def _is_small(self, stage: Stage, settled: _Settled) -> bool:
        """Reads only stages, and so little that the coordinator may as well run it."""
        if stage.boundary is not Boundary.COALESCE or any(
            tree.node.is_scan or tree.kind == "memory_scan" for tree in settled.tree.walk()
        ):
            return False
        measured = [below.measured() for below in settled.inputs.values()]
        return sum(m.bytes for m in measured) <= self._options.coordinator_threshold

    def _complete(self, stage: Stage, settled: _Settled | None = None) -> StageRun:
        """Run ``stage`` and everything below it."""
        if settled is None:
            settled = self.settle(stage)
        (run,) = self._placed(stage, replace(settled, tree=self._coarser(settled.tree)))
        call_all(
            [functools.partial(self._ensure, task) for task in run.tasks],
            name=f"stage-{stage.number}-task",
        )
        return run

    def _coarser(self, tree: Tree) -> Tree:
        """``tree``, planned for pieces and run as a whole, in partitions that run at once."""
        if self._pieces == 1 or tree.needs_one_task:
            return tree
        return tree.merged(sum(worker.slots for worker in self._workers))

    def _in_pieces(self, last: Stage, settled: _Settled) -> list[StageRun]:
        """The last stage as several that each give a part of its rows, and have not run yet."""
        slots = sum(worker.slots for worker in self._workers)
        pieces = 1
        if not settled.one_task and may_be_read_in_pieces(settled.inputs):
            size = divided_bytes(settled.tree, sizes_of(settled.inputs))
            wanted = math.ceil(size / self._options.stream_bytes)
            # Of those that it has partitions for, so that every slot has something to do.
            possible = math.ceil(replace(last, tree=settled.tree).divisible / slots)
            pieces = max(1, min(self._pieces, wanted, possible))
        if pieces == 1:
            settled = replace(settled, tree=self._coarser(settled.tree))
        return self._placed(last, settled, pieces)

    def _placed(self, stage: Stage, settled: _Settled, pieces: int = 1) -> list[StageRun]:
        """``stage``, all below which has run, as ``pieces`` with tasks of their own, or fewer."""
        stage = replace(stage, tree=settled.tree)
        measured = sizes_of(settled.inputs)
        workers = 1 if settled.one_task else len(self._live())
        tasks = task_count(stage, measured, self._options, workers)
        runs = self._place(StageRun(stage, settled.inputs), tasks, pieces)
        self._report.decided(stage.number, settled.decisions)
        placed = [(task.index, task.url, task.tree) for run in runs for task in run.tasks]
        self._report.started(stage, placed)
        return runs

    def _live(self) -> list[WorkerSlots]:
        with self._lock:
            gone = {**self._refusing, **self._lost}
        live = [worker for worker in self._workers if worker.url not in gone]
        errors = list(gone.values())
        if not live:
            if len(errors) == 1:
                raise errors[0]
            raise self._all_lost(errors) from errors[-1]
        return live

    def _all_lost(self, errors: Sequence[ResolverError]) -> WorkerLostError:
        urls = ", ".join(worker.url for worker in self._workers)
        said = "; ".join(str(error) for error in errors)
        return WorkerLostError(
            f"no worker of {urls} is left to run the query: {said}", url=errors[-1].url
        )

    def _place(self, run: StageRun, tasks: int, pieces: int) -> list[StageRun]:
        """One task per worker and piece, each with partitions for its slots."""
        live = self._live()
        if tasks < len(live):
            live = self._nearest(run, live, tasks)
        slots = sum(worker.slots for worker in live)
        numbers = itertools.count()
        placed = []
        low = 0
        for _ in range(pieces):
            piece = StageRun(run.stage, run.inputs)
            for worker in live:
                share = Share(low, low + worker.slots, slots * pieces)
                low = share.high
                tree = run.stage.tree.shared(share)
                if tree is not None:
                    piece.tasks.append(TaskRun(piece, next(numbers), tree, worker.url))
            placed.append(piece)
        return [piece for piece in placed if piece.tasks] or placed[:1]

    def _nearest(self, run: StageRun, live: Sequence[WorkerSlots], tasks: int) -> list[WorkerSlots]:
        """The ``tasks`` workers that hold the most of what the stage reads."""
        held = dict.fromkeys((worker.url for worker in live), 0)
        for below in run.inputs.values():
            for task in below.tasks:
                if task.output is not None and task.output.url in held:
                    held[task.output.url] += sum(p.bytes for p in task.output.report.partitions)
        # Stages that read nothing yet are spread, so that they run side by side.
        turned = [*live[run.number % len(live) :], *live[: run.number % len(live)]]
        best = sorted(turned, key=lambda worker: -held[worker.url])[:tasks]
        return [worker for worker in live if worker in best]

    # Running: one task, until its output is there and counts.

    def _ensure(self, task: TaskRun) -> None:
        with task.lock:
            while not self._is_usable(task.output, task):
                inputs, read = self.inputs_of(task.stage, task.tree)
                self._try(task, inputs, read)

    def inputs_of(
        self, run: StageRun, tree: Tree
    ) -> tuple[tuple[_wire.StageInput, ...], tuple[tuple[TaskRun, _wire.OutputKey], ...]]:
        """What ``tree`` reads, all of it there and made from one another."""
        leaves = [leaf for leaf in tree.walk() if leaf.source is not None]
        needed = {leaf.source.number for leaf in leaves if leaf.source is not None}
        there = self._made(task for number in sorted(needed) for task in run.inputs[number].tasks)
        inputs = tuple(stage_input(leaf, run, there) for leaf in leaves)
        return inputs, tuple((task, output.key) for task, output in there.items())

    def _made(self, tasks: Iterable[TaskRun]) -> dict[TaskRun, Output]:
        """The outputs of ``tasks``, all of them there and made from one another."""
        outputs: dict[TaskRun, Output | None] = dict.fromkeys(tasks)
        while True:
            # Looked at once: others may be making some of these again at the same time.
            outputs = {task: task.output for task in outputs}
            stale = [task for task, output in outputs.items() if not self._is_usable(output, task)]
            if not stale:
                return {task: output for task, output in outputs.items() if output is not None}
            # Making one again can make another stale; hence the loop.
            call_all([functools.partial(self._ensure, task) for task in stale], name="again")

    def is_current(self, read: Iterable[tuple[TaskRun, _wire.OutputKey]]) -> bool:
        """Whether these outputs are still in use, and all that they were made from."""
        seen: dict[int, bool] = {}

        def counts(task: TaskRun) -> bool:
            if id(task) not in seen:
                output = task.output
                seen[id(task)] = output is not None and all(
                    is_latest(below, key) and counts(below) for below, key in output.read
                )
            return seen[id(task)]

        return all(is_latest(task, key) and counts(task) for task, key in read)

    def _is_usable(self, output: Output | None, task: TaskRun) -> bool:
        return (
            output is not None
            and (output.report.files is not None or output.url not in self._lost)
            and self.is_current([(task, output.key)])
        )

    def _try(
        self,
        task: TaskRun,
        inputs: tuple[_wire.StageInput, ...],
        read: tuple[tuple[TaskRun, _wire.OutputKey], ...],
    ) -> None:
        url = self._url_for(task)
        key = _wire.OutputKey(self.query, task.stage.number, task.index, task.attempts)
        request = _wire.TaskRequest(
            output=key,
            plan=task.tree.plan().to_bytes(),
            settings=self._settings,
            inputs=inputs,
            passthrough=self._passthrough,
            wait=min(_POLL, self._options.lease / 3),
            compression=self._options.compression,
            lease=self._options.lease,
            worker_timeout=self._options.worker_timeout,
        )
        task.attempts += 1
        started = time.monotonic()
        try:
            report = self._calls.run_task(url, request, self._options.task_timeout)
            # With what is left of the plan alone nobody could tell.
            if len(report.partitions) != task.tree.partitions:
                raise DistributedError(f"worker {url} ran another plan than it was given", url=url)
        except (WorkerConnectError, WorkerLostError, InputLostError) as error:
            self._count_failure(task, error)
            return
        task.output = Output(key, url, report, read)
        self._report.finished(
            task.stage.number, task.index, url, report, time.monotonic() - started
        )

    def _url_for(self, task: TaskRun) -> str:
        live = [worker.url for worker in self._live()]
        if task.url not in live:
            task.url = live[(task.index + task.attempts) % len(live)]
        with self._lock:
            if self._is_over:
                raise WorkerLostError(f"query {self.query} is over", url=task.url)
            self._called.add(task.url)
        return task.url

    def _count_failure(self, task: TaskRun, error: ResolverError) -> None:
        self.lose(error)
        self._report.retried(task.stage.number, task.index, str(error))
        if not self._is_innocent(task, error):
            task.failures += 1
        if task.failures > self._options.task_retries:
            raise WorkerLostError(
                f"task {task.index} of stage {task.stage.number} was started {task.failures} "
                f"times and each time a worker was lost; the last time: {error}",
                url=error.url,
            ) from error
        if any(worker.url not in {**self._refusing, **self._lost} for worker in self._workers):
            # With nobody left the query fails, and its error says it all.
            _log.warning("query %s: %s", self.query, error)

    def _is_innocent(self, task: TaskRun, error: ResolverError) -> bool:
        """Whether ``task`` has had no part in it: nobody ran it, or another worker was lost.

        It reads of a lost one no more, so it cannot miss the same twice.
        """
        if not isinstance(error, InputLostError):
            return isinstance(error, WorkerConnectError | TaskRefusedError)
        url = str(error.url)
        is_new = url not in task.missed and any(worker.url == url for worker in self._workers)
        task.missed.add(url)
        return is_new

    def lose(self, error: ResolverError) -> None:
        """Count the worker that ``error`` names as gone for the rest of the query.

        One that only refuses tasks gets no more of them, and its outputs stay in use.
        """
        with self._lock:
            if self._is_over:
                raise error
            gone = self._refusing if isinstance(error, TaskRefusedError) else self._lost
            gone.setdefault(str(error.url), error)


_POLL: Final = 2.0  # seconds


def _may_be_merged(stages: Sequence[Stage], options: DistributedOptions) -> frozenset[int]:
    """Those of the inputs of one stage that may wait for whether one task reads them all.

    They would wait in vain for one that is too much for it, unless that is ready by then.
    """

    def is_big(stage: Stage) -> bool:
        return any(not reads_little(below.tree, {}, options) for below in stage.walk())

    big = [stage for stage in stages if is_big(stage)]
    return frozenset(
        stage.number
        for stage in stages
        if all(other is stage or other.depth < stage.depth for other in big)
    )
