"""The scheduler's invariant, over made-up workers: an answer is made of one set of attempts.

No processes and no rows. A made-up worker remembers what every output was made from, and
loses its outputs when a schedule says so; at the end the whole history of what the head
reads is looked at.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from dataclasses import dataclass, field

import datafusion
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from resolver import ResolverError, WorkerConnectError
from resolver.distributed import DistributedPhysicalOptimizerRule, WorkerLostError
from resolver.distributed._calls import TaskRefusedError
from resolver.distributed._cutter import input_of
from resolver.distributed._inputs import InputLostError
from resolver.distributed._options import DistributedOptions
from resolver.distributed._plan_proto import PlanNode
from resolver.distributed._report import RunReport
from resolver.distributed._scheduler import Scheduler
from resolver.distributed._tpch import QUERIES
from resolver.distributed._tree import Boundary, Stage, Tree
from resolver.distributed._wire import PartitionReport, TaskReport
from resolver.distributed._workers import WorkerSlots

QUERY = "ab" * 16
SCHEMA = pa.schema([("x", pa.int64())]).serialize().to_pybytes()
URLS = tuple(f"http://127.0.0.1:{port}" for port in (1, 2, 3, 4))
BEFORE, AFTER, EMPTIED = "before its task", "after its task", "restarted empty"
REFUSED = "takes no more tasks"


@dataclass
class Loss:
    """Worker ``url`` is lost when it is called for the ``call``-th time."""

    url: str
    call: int
    how: str


@dataclass
class FakeCalls:
    """Workers that keep outputs by name, and lose them all when they are lost."""

    report: RunReport
    losses: list[Loss] = field(default_factory=list)
    inline: frozenset[int] = frozenset()
    """Stages whose output is so small that it goes along with the report."""
    size: int = 100
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    calls: Counter[str] = field(default_factory=Counter)
    dead: set[str] = field(default_factory=set)
    draining: set[str] = field(default_factory=set)
    held: dict[str, set] = field(default_factory=dict)
    requests: dict = field(default_factory=dict)

    def run_task(self, url, request, time_limit):
        with self.lock:
            self.calls[url] += 1
            loss = next(
                (x for x in self.losses if x.url == url and x.call == self.calls[url]), None
            )
            if loss is not None and loss.how == REFUSED:
                self.draining.add(url)
            elif loss is not None:
                self.held.pop(url, None)
            if url in self.draining:
                raise TaskRefusedError("it is about to stop", url=url)
            if loss is not None and loss.how == BEFORE:
                self.dead.add(url)
                raise WorkerConnectError("nobody is there", url=url)
            if url in self.dead:
                raise WorkerLostError("nobody is there", url=url)
            self.read([request.inputs])
            assert request.output not in self.requests, "an attempt was started twice"
            self.requests[request.output] = request
            if loss is not None and loss.how == AFTER:
                self.dead.add(url)
                raise WorkerLostError("it fell silent", url=url)
            self.held.setdefault(url, set()).add(request.output)
            return self._report(request)

    def read(self, inputs):
        """Raise for the first source that is gone, as a consumer does."""
        for source in sources(inputs):
            if not source.files and source.output not in self.held.get(source.url, ()):
                raise InputLostError("its input is gone", url=source.url)

    def _report(self, request):
        task = self.report.stages[request.output.stage].tasks[request.output.task]
        partitions = (PartitionReport(1, 1, self.size),) * task.tree.partitions
        inline = request.output.stage in self.inline
        files = ((b"file",),) * len(partitions) if inline else None
        return TaskReport(partitions, SCHEMA, 0.0, files=files)


def sources(requests):
    for inputs in requests:
        for stage_input in inputs:
            for partition in stage_input.partitions:
                yield from partition


def scheduled(calls, workers, number=100, empty=lambda tree: tree, **options):
    options = {"task_retries": 1_000, **options}
    return Scheduler(
        QUERY,
        workers=[WorkerSlots(url, 1) for url in workers],
        calls=calls,
        options=DistributedOptions(**options),
        settings={},
        passthrough=(),
        empty=empty,
        first_new_number=number,
        report=calls.report,
    )


def run_head(scheduler, calls, head, after_reading=lambda: None):
    """What the head reads in the end, as the executor has it."""
    (settled,) = scheduler.settle_head(head)
    return read_head(scheduler, calls, settled, after_reading)


def read_head(scheduler, calls, settled, after_reading=lambda: None):
    for _ in range(20):
        inputs, read = scheduler.inputs_of(settled, settled.stage.tree)
        try:
            with calls.lock:
                calls.read([inputs])
        except InputLostError as error:
            scheduler.lose(error)
            continue
        after_reading()
        if scheduler.is_current(read):
            return inputs
    raise AssertionError("the head never had its inputs")


def history(calls, inputs):
    """Every output that went into ``inputs``, however far back."""
    seen, todo = set(), {source.output for source in sources([inputs])}
    while todo:
        key = todo.pop()
        seen.add(key)
        below = {source.output for source in sources([calls.requests[key].inputs])}
        todo |= below - seen
    return seen


def check(calls, inputs):
    """One attempt of every task, and every row of it read as often as it should be."""
    check_pieces(calls, [inputs])


def check_pieces(calls, pieces):
    """What every piece reads is of one attempt, and together they read every row once."""
    used = {}
    for inputs in pieces:
        keys = history(calls, inputs)
        attempts = Counter((key.stage, key.task) for key in keys)
        assert set(attempts.values()) <= {1}, f"mixed attempts: {attempts}"
        # Of the attempts of different pieces any will do: each reads what others would.
        used.update({(key.stage, key.task): key for key in keys})
    check_reads(calls, pieces)
    for number in {number for number, _ in used}:
        tasks = calls.report.stages[number].tasks
        keys = [key for key in used.values() if key.stage == number]
        assert {key.task for key in keys} == set(range(len(tasks)))
        check_reads(calls, [calls.requests[key].inputs for key in keys])


def check_reads(calls, readers):
    """The tasks of one stage together read every partition once, or, broadcast, each does."""
    for number in {stage_input.number for inputs in readers for stage_input in inputs}:
        stage = calls.report.stages[number]
        every = {
            (task.index, partition)
            for task in stage.tasks
            for partition in range(task.tree.partitions)
        }
        read = [
            Counter((s.output.task, s.partition) for s in sources([[i]]))
            for inputs in readers
            for i in inputs
            if i.number == number
        ]
        for counter in read:
            assert set(counter.values()) <= {1}
        if all(set(counter) == every for counter in read):
            continue  # one reader, or a broadcast
        total = sum(read, Counter())
        assert set(total) == every
        assert set(total.values()) == {1}


def node_of(query):
    context = datafusion.SessionContext()
    batch = pa.record_batch({"x": [1]})
    context.register_record_batches("t", [[batch], [batch], [batch]])
    plan = context.sql(query).execution_plan()
    return next(PlanNode.parse(plan.to_bytes(context)).walk())


@pytest.fixture(scope="module")
def nodes():
    scan, union, join = (
        node_of(f"SELECT * FROM t {rest}") for rest in ("", "UNION ALL SELECT * FROM t", ", t u")
    )
    assert (scan.kind, union.kind, join.kind) == ("memory_scan", "union", "cross_join")
    return scan, union.bare(), join.bare()


class Stages:
    """Makes trees of stages, numbered from the leaves up."""

    def __init__(self, nodes, partitions=3):
        self._scan, self._union, self._join = nodes
        self._partitions = partitions
        self._number = 0

    def stage(self, boundary, *below, partitions=None):
        partitions = partitions or self._partitions
        tree = self.tree(*below)
        if boundary is Boundary.SHUFFLE:
            tree = Tree(PlanNode.hash_repartition([], partitions), "RepartitionExec: Hash", (tree,))
        self._number += 1
        return Stage(self._number, boundary, tree, tree)

    def tree(self, *below):
        leaves = [input_of(stage) for stage in below]
        builds = [leaf for leaf in leaves if leaf.source.boundary is Boundary.BROADCAST]
        others = [leaf for leaf in leaves if leaf not in builds]
        others = others or [Tree(self._scan, "DataSourceExec: partitions=3")]
        tree = Tree(self._union, "UnionExec", tuple(others))
        for build in builds:
            tree = Tree(self._join, "CrossJoinExec", (build, tree))
        return tree

    def head(self, *below):
        tree = self.tree(*below)
        return Stage(0, Boundary.HEAD, tree, tree)


SHUFFLE, COALESCE, BROADCAST = Boundary.SHUFFLE, Boundary.COALESCE, Boundary.BROADCAST
SPREAD = {"bytes_per_task": 0, "scan_bytes_per_task": 0, "coordinator_threshold": 0}


def chain(nodes):
    stages = Stages(nodes)
    first = stages.stage(SHUFFLE)
    second = stages.stage(SHUFFLE, first)
    third = stages.stage(COALESCE, second)
    return stages.head(third)


def test_without_losses_every_task_runs_once(nodes):
    calls = FakeCalls(RunReport())
    check(calls, run_head(scheduled(calls, URLS[:3], **SPREAD), calls, chain(nodes)))
    assert {key.attempt for key in calls.requests} == {0}
    assert len(calls.requests) == 9
    assert calls.report.retries == []


def test_what_was_made_from_a_lost_output_is_made_again(nodes):
    """A worker restarts empty when it has its third task: of all stages something is new."""
    calls = FakeCalls(RunReport(), [Loss(URLS[0], 3, EMPTIED)])
    check(calls, run_head(scheduled(calls, URLS[:3], **SPREAD), calls, chain(nodes)))
    again = {(key.stage, key.task) for key in calls.requests if key.attempt}
    # Task 0 of stage 1 and 2 were on it, all of stage 2 read that, and all of stage 3.
    assert {(1, 0), (2, 0), (2, 1), (2, 2)} <= again
    assert calls.report.retries


def test_a_task_may_miss_more_workers_than_it_may_be_started_again(nodes):
    """Six restart empty between two stages, and its one task finds them one after another."""
    urls = [f"http://127.0.0.1:{port}" for port in range(1, 9)]
    stages = Stages(nodes)
    below = [stages.stage(COALESCE) for _ in range(8)]
    head = stages.head(stages.stage(COALESCE, *below))
    calls = FakeCalls(RunReport())
    options = {"bytes_per_task": 1 << 20, "scan_bytes_per_task": 0, "coordinator_threshold": 0}
    scheduler = scheduled(calls, urls, task_retries=0, **options)
    run_task = calls.run_task

    def restarting(url, request, time_limit):
        if request.output.stage == 9 and not request.output.attempt:
            for each in urls[:6]:
                calls.held.pop(each, None)
        return run_task(url, request, time_limit)

    calls.run_task = restarting
    check(calls, run_head(scheduler, calls, head))
    missed = [retry for retry in calls.report.retries if "its input is gone" in retry]
    assert len(missed) == 6


def test_a_task_that_misses_what_nobody_had_is_given_up(nodes):
    calls = FakeCalls(RunReport())
    for url in ("http://127.0.0.1:99", URLS[0]):

        def missing(_url, _request, _limit, lost=url):
            raise InputLostError("its input is gone", url=lost)

        calls.run_task = missing
        with pytest.raises(WorkerLostError):
            run_head(scheduled(calls, URLS[:2], task_retries=2, **SPREAD), calls, chain(nodes))


def test_a_loss_after_the_last_stage_reaches_down_to_the_leaves(nodes):
    """The head finds a worker gone: its outputs of all stages, and what they went into."""
    calls = FakeCalls(RunReport())
    scheduler = scheduled(calls, URLS[:3], **SPREAD)
    lost = []

    def lose_once():
        if not lost:
            lost.append(calls.held.pop(URLS[1]))
            calls.dead.add(URLS[1])
            scheduler.lose(WorkerLostError("gone", url=URLS[1]))

    (settled,) = scheduler.settle_head(chain(nodes))
    lose_once()
    inputs, read = scheduler.inputs_of(settled, settled.stage.tree)
    assert scheduler.is_current(read)
    check(calls, inputs)
    newest = {(key.stage, key.task): key.attempt for key in history(calls, inputs)}
    lost_tasks = {(key.stage, key.task) for key in lost[0]}
    assert lost_tasks == {(1, 1), (2, 1), (3, 1)}
    assert all(newest[task] for task in lost_tasks)
    assert all(newest[stage, task] for stage in (2, 3) for task in range(3)), "all read what is new"
    assert newest[1, 0] == newest[1, 2] == 0, "nothing was made from what was lost"


def test_a_worker_that_takes_no_more_tasks_keeps_what_it_has(nodes):
    """Nothing that was made there is made again, however often it refuses."""
    calls = FakeCalls(RunReport(), [Loss(URLS[0], 2, REFUSED)])
    scheduler = scheduled(calls, URLS[:3], task_retries=0, **SPREAD)
    inputs = run_head(scheduler, calls, chain(nodes))
    check(calls, inputs)
    assert len(calls.requests) == 3 + 3 + 2, "stage 3 is planned for two workers"
    assert {key.stage: key.task for key in calls.requests if key.attempt} == {2: 0}
    assert URLS[0] in {
        source.url for request in calls.requests.values() for source in sources([request.inputs])
    }


def test_workers_that_all_refuse_are_named(nodes):
    calls = FakeCalls(RunReport(), [Loss(url, 2, REFUSED) for url in URLS[:2]])
    with pytest.raises(WorkerLostError) as raised:
        run_head(scheduled(calls, URLS[:2], **SPREAD), calls, chain(nodes))
    assert all(url in str(raised.value) for url in URLS[:2])


def test_what_came_along_with_the_report_is_not_lost(nodes):
    calls = FakeCalls(RunReport(), inline=frozenset({1, 2, 3}))
    scheduler = scheduled(calls, URLS[:3], **SPREAD)
    (settled,) = scheduler.settle_head(chain(nodes))
    calls.held.clear()
    for url in URLS[:3]:
        scheduler.lose(WorkerLostError("gone", url=url))
    inputs, read = scheduler.inputs_of(settled, settled.stage.tree)
    check(calls, inputs)
    assert scheduler.is_current(read)
    assert {key.attempt for key in calls.requests} == {0}


def test_an_output_that_was_made_again_is_no_longer_current(nodes):
    """What the head has read does not count once anything below was made again."""
    calls = FakeCalls(RunReport())
    scheduler = scheduled(calls, URLS[:3], **SPREAD)
    (settled,) = scheduler.settle_head(chain(nodes))
    _, read = scheduler.inputs_of(settled, settled.stage.tree)
    assert scheduler.is_current(read)
    (third,) = settled.inputs.values()
    (second,) = third.inputs.values()
    (first,) = second.inputs.values()
    scheduler.lose(WorkerLostError("gone", url=first.tasks[2].output.url))
    scheduler._ensure(first.tasks[2])
    assert first.tasks[2].attempts == 2
    assert not scheduler.is_current(read)


@dataclass
class RestlessCalls(FakeCalls):
    """Stage 1 has one row, which its first attempt gives to one task of stage 2, its next to another."""

    first_is_done: threading.Event = field(default_factory=threading.Event)

    def run_task(self, url, request, time_limit):
        key = request.output
        if (key.stage, key.task, key.attempt) == (2, 1, 0):
            assert self.first_is_done.wait(10)
            (lost, *_) = (s.url for s in sources([request.inputs]))
            with self.lock:
                self.held.pop(lost, None)
                self.dead.add(lost)
        report = super().run_task(url, request, time_limit)
        if key.stage == 2 and key.task == 0:
            self.first_is_done.set()
        return report

    def _report(self, request):
        report = super()._report(request)
        if request.output.stage != 2:
            return report
        (made_from,) = {s.output.attempt for s in sources([request.inputs])}
        rows = int(request.output.task == (1 if made_from == 0 else 0))
        parts = tuple(PartitionReport(rows, rows, rows * 100) for _ in report.partitions)
        return dataclasses.replace(report, partitions=parts, files=((),) * len(parts))


def test_of_mixed_attempts_nothing_is_taken_for_empty(nodes):
    """Each task of the build side had no row of the attempt that it read, yet there always is one."""
    stages = Stages(nodes)
    first = stages.stage(SHUFFLE, partitions=2)
    build = stages.stage(BROADCAST, first)
    calls = RestlessCalls(RunReport())
    taken_for_empty = []

    def empty(tree):
        taken_for_empty.append(tree)
        return tree

    scheduler = scheduled(calls, URLS[:3], empty=empty, **{**SPREAD, "files_per_task": 3})
    run_head(scheduler, calls, stages.head(stages.stage(COALESCE, build)))
    assert calls.report.retries
    assert not taken_for_empty


def test_without_workers_an_error_names_them_all(nodes):
    losses = [Loss(url, 2, how) for url, how in zip(URLS, (BEFORE, AFTER, EMPTIED), strict=False)]
    calls = FakeCalls(RunReport(), losses)
    with pytest.raises(ResolverError) as raised:
        run_head(scheduled(calls, URLS[:2], **SPREAD), calls, chain(nodes))
    assert all(url in str(raised.value) for url in URLS[:2])


def test_nothing_is_started_once_the_query_is_over(nodes):
    calls = FakeCalls(RunReport())
    scheduler = scheduled(calls, URLS[:3])
    scheduler.end()
    with pytest.raises(WorkerLostError, match="is over"):
        scheduler.settle_head(chain(nodes))
    assert calls.requests == {}
    assert calls.is_over


shapes = st.recursive(
    st.tuples(st.sampled_from([SHUFFLE, COALESCE, BROADCAST]), st.just(())),
    lambda below: st.tuples(
        st.sampled_from([SHUFFLE, COALESCE, BROADCAST]), st.lists(below, min_size=1, max_size=3)
    ),
    max_leaves=5,
)
schedules = st.lists(
    st.builds(
        Loss,
        st.sampled_from(URLS[1:]),
        st.integers(1, 6),
        st.sampled_from([BEFORE, AFTER, EMPTIED, REFUSED]),
    ),
    max_size=4,
    unique_by=lambda loss: (loss.url, loss.call),
)


def built(stages, shape):
    boundary, below = shape
    return stages.stage(boundary, *(built(stages, child) for child in below))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    below=st.lists(shapes, min_size=1, max_size=2),
    losses=schedules,
    inline=st.frozensets(st.integers(1, 6), max_size=3),
    lost_late=st.lists(st.sampled_from(URLS[1:]), max_size=2),
    options=st.sampled_from([SPREAD, {"bytes_per_task": 200}, {}]),
)
def test_no_answer_is_made_of_mixed_attempts(nodes, below, losses, inline, lost_late, options):
    """Whatever is lost and when: while the first worker lives, the one whole answer."""
    stages = Stages(nodes)
    head = stages.head(*(built(stages, shape) for shape in below))
    calls = FakeCalls(RunReport(), losses, inline)
    late = iter(lost_late)

    def lose_late():
        url = next(late, None)
        if url is not None:
            with calls.lock:
                calls.held.pop(url, None)
            scheduler.lose(WorkerLostError("gone while the head read", url=url))

    scheduler = scheduled(calls, URLS, **options)
    inputs = run_head(scheduler, calls, head, lose_late)
    check(calls, inputs)


IN_PIECES = {**SPREAD, "stream_bytes": 1}


def in_pieces(nodes):
    """The chain, planned for four pieces on three workers."""
    stages = Stages(nodes, partitions=12)
    first = stages.stage(SHUFFLE)
    second = stages.stage(SHUFFLE, first)
    return stages.head(stages.stage(COALESCE, second))


def test_pieces_run_when_they_are_asked_for(nodes):
    calls = FakeCalls(RunReport())
    scheduler = scheduled(calls, URLS[:3], **IN_PIECES)
    heads = scheduler.settle_head(in_pieces(nodes), 4)
    assert Counter(key.stage for key in calls.requests) == {1: 3, 2: 3}, "the last has not run"
    assert [task.tree.partitions for task in calls.report.stages[3].tasks] == [1] * 12
    assert [task.tree.partitions for task in calls.report.stages[2].tasks] == [12] * 3
    pieces = []
    for number, head in enumerate(heads, 1):
        pieces.append(read_head(scheduler, calls, head))
        assert Counter(key.stage for key in calls.requests)[3] == 3 * number
    assert len(pieces) == 4
    check_pieces(calls, pieces)


@pytest.mark.parametrize(
    ("pieces", "options", "wanted"),
    [
        (1, {}, 1),
        (9, {}, 4),  # each has a partition for every slot
        (2, {}, 2),
        (4, {"stream_bytes": 1_800}, 2),  # of 3 tasks with 12 partitions of 100 bytes
        (4, {"stream_bytes": 1 << 20}, 1),
    ],
)
def test_there_are_as_many_pieces_as_are_worth_it(nodes, pieces, options, wanted):
    calls = FakeCalls(RunReport())
    scheduler = scheduled(calls, URLS[:3], **{**IN_PIECES, **options})
    assert len(scheduler.settle_head(in_pieces(nodes), pieces)) == wanted


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_might_not_come_out_the_same_is_read_whole(nodes, number):
    """Rows of the first piece may have been read when a worker with the input of others is lost."""

    def limited(stage):
        tree = Tree(stage.tree.node, stage.tree.line, tuple(map(below, stage.tree.children)))
        line = f"{tree.line}, fetch=7" if stage.number == number else tree.line
        return dataclasses.replace(stage, tree=dataclasses.replace(tree, line=line))

    def below(tree):
        if tree.source is not None:
            return dataclasses.replace(tree, source=limited(tree.source))
        return tree.over(*map(below, tree.children))

    calls = FakeCalls(RunReport())
    heads = scheduled(calls, URLS[:3], **IN_PIECES).settle_head(limited(in_pieces(nodes)), 4)
    assert len(heads) == (4 if number == 3 else 1), "the last stage itself runs once"
    slots = [task.tree.partitions for task in calls.report.stages[3].tasks]
    assert slots == ([1] * 12 if number == 3 else [1] * 3), "each has one partition at a time"


def test_what_the_coordinator_runs_of_a_plan_for_pieces_has_no_more_partitions_than_slots(nodes):
    calls = FakeCalls(RunReport())
    options = {**IN_PIECES, "coordinator_threshold": 1 << 30}
    (head,) = scheduled(calls, URLS[:3], **options).settle_head(in_pieces(nodes), 4)
    assert head.stage.tree.partitions == 3


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    below=st.lists(shapes, min_size=1, max_size=2),
    losses=schedules,
    inline=st.frozensets(st.integers(1, 6), max_size=3),
    lost_late=st.lists(st.sampled_from([None, *URLS[1:]]), max_size=4),
    lost_while_read=st.lists(st.sampled_from(URLS[1:]), max_size=1),
)
def test_no_piece_is_made_of_mixed_attempts(
    nodes, below, losses, inline, lost_late, lost_while_read
):
    """Whatever is lost before, between and while pieces are read."""
    stages = Stages(nodes, partitions=12)
    head = stages.head(stages.stage(COALESCE, *(built(stages, shape) for shape in below)))
    calls = FakeCalls(RunReport(), losses, inline)
    scheduler = scheduled(calls, URLS, **IN_PIECES)

    def lose_next(urls):
        url = next(urls, None)
        if url is not None:
            with calls.lock:
                calls.held.pop(url, None)
                calls.dead.add(url)
            scheduler.lose(WorkerLostError("gone", url=url))

    between, during = iter(lost_late), iter(lost_while_read)
    pieces = []
    for piece in scheduler.settle_head(head, 3):
        lose_next(between)
        pieces.append(read_head(scheduler, calls, piece, lambda: lose_next(during)))
    event(f"{len(pieces)} pieces")
    check_pieces(calls, pieces)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(query=st.sampled_from(sorted(QUERIES)), losses=schedules, broadcasts=st.booleans())
def test_no_real_plan_is_answered_from_mixed_attempts(planning, query, losses, broadcasts):
    """The stages of TPC-H, with joins that are broadcast or shuffled while they run."""
    plan = real_plan(planning, query)
    calls = FakeCalls(RunReport(), losses)
    threshold = {} if broadcasts else {"broadcast_threshold": 0}
    scheduler = scheduled(calls, URLS, number=len(plan.stages) + 1, **SPREAD, **threshold)
    check(calls, run_head(scheduler, calls, plan.head))


_PLANS: dict = {}


def real_plan(planning, query):
    if query not in _PLANS:
        workers = [WorkerSlots(url, 1) for url in URLS]
        _PLANS[query] = DistributedPhysicalOptimizerRule().distribute(
            planning.sql(QUERIES[query]).execution_plan(), planning, workers
        )
    return _PLANS[query]
