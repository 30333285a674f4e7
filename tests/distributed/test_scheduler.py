"""What the scheduler asks workers for while they are lost under its hands, without any worker.

The plans are DataFusion's; what a task gives, and when who is gone, is decided here. Each
output remembers the attempts that it was made from, so that a mixture would show.
"""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resolver.distributed import DistributedPhysicalOptimizerRule, WorkerLostError
from resolver.distributed._inputs import InputLostError
from resolver.distributed._options import DistributedOptions
from resolver.distributed._report import RunReport
from resolver.distributed._scheduler import Scheduler
from resolver.distributed._tree import Boundary
from resolver.distributed._wire import NodeMetrics, PartitionReport, TaskReport
from resolver.distributed._workers import WorkerSlots

QUERY = "0" * 32
SCHEMA = pa.schema([("a", pa.int64())]).serialize().to_pybytes()
WORKERS = [WorkerSlots(f"http://127.0.0.1:{port}", 1) for port in (1, 2, 3, 4)]
QUERIES = {
    "groups": "SELECT l_suppkey, sum(l_tax) FROM lineitem GROUP BY 1",
    "join": "SELECT * FROM lineitem JOIN orders ON o_orderkey = l_orderkey",
    "groups of a join": """
        SELECT c_custkey, count(*) FROM customer JOIN orders ON o_custkey = c_custkey
        GROUP BY c_custkey""",
    "semi join": """
        SELECT o_custkey, count(*) FROM orders WHERE EXISTS
        (SELECT 1 FROM lineitem WHERE l_orderkey = o_orderkey) GROUP BY 1""",
    "joins": """
        SELECT n_name, sum(l_tax) FROM lineitem JOIN orders ON o_orderkey = l_orderkey
        JOIN customer ON c_custkey = o_custkey JOIN nation ON n_nationkey = c_nationkey
        FULL JOIN supplier ON s_suppkey = l_suppkey GROUP BY n_name""",
    "a row beside all": """
        SELECT l_orderkey FROM lineitem
        WHERE l_tax > (SELECT avg(l_tax) FROM lineitem WHERE l_quantity > 3)""",
}


class Recorded(RunReport):
    """A report that can be asked what was started."""

    def task_tree(self, key):
        return self.stages[key.stage].tasks[key.task].tree


class FakeWorkers:
    """Answers for all workers. ``fates`` are what happens at each call, in their order."""

    def __init__(self, report, sizes, fates, kept):
        self.report = report
        self.sizes = sizes
        self.fates = list(fates)
        self.kept = kept
        self.lock = threading.Lock()
        self.gone = set()
        self.made_from = {}
        self.where = {}
        self.head = set()
        self.calls = 0
        self.is_over = False

    def run_task(self, url, request, _time_limit):
        with self.lock:
            self.calls += 1
            read = self.check_inputs(request)
            fate = self.fates.pop(0) if self.fates else 0
            alive = [worker.url for worker in WORKERS if worker.url not in self.gone]
            if len(alive) > 1:
                self.lose(fate, url, alive)
            if url in self.gone:
                raise WorkerLostError("it is gone", url=url)
            for source in read.values():
                if source.url in self.gone and not source.files:
                    raise InputLostError("its worker is gone", url=source.url)
            assert request.output not in self.made_from, "an attempt was made twice"
            self.made_from[request.output] = set(read)
            self.where[request.output] = url
            return self.answer(request.output)

    def lose(self, fate, url, alive):
        """0: nobody; 1: who has the task; others: one who may hold what was made before."""
        if fate == 1:
            self.gone.add(url)
        elif fate:
            self.gone.add(alive[fate % len(alive)])

    def answer(self, key):
        count = self.report.task_tree(key).partitions
        size = self.sizes[key.stage % len(self.sizes)]
        files = ((b"",),) * count if self.kept and key.stage % 2 else None
        nodes = (NodeMetrics(10 * size, 0.0, 0),)
        return TaskReport((PartitionReport(size, 1, size),) * count, SCHEMA, 0.0, 0, nodes, files)

    def check_inputs(self, request):
        """The sources by key, if they are all there is and made from one another."""
        tree = self.report.task_tree(request.output)
        leaves = {leaf.source.number: leaf for leaf in tree.walk() if leaf.source is not None}
        assert {each.number for each in request.inputs} == set(leaves)
        read = {}
        for each in request.inputs:
            tasks = range(len(self.report.stages[each.number].tasks))
            for sources in each.partitions:
                keys = [source.output for source in sources]
                assert {key.stage for key in keys} == {each.number}
                if leaves[each.number].source.boundary is not Boundary.COALESCE:
                    assert {key.task for key in keys} == set(tasks)
                read.update(zip(keys, sources, strict=True))
        self.check_consistent(read)
        return read

    def check_consistent(self, keys):
        """No two attempts at one task are behind ``keys``, however far behind."""
        attempts = {}
        waiting = list(keys)
        while waiting:
            key = waiting.pop()
            assert attempts.setdefault((key.stage, key.task), key) == key, "a mixture of attempts"
            waiting += self.made_from[key]


@pytest.fixture(scope="module")
def plans(planning):
    rule = DistributedPhysicalOptimizerRule()
    return {
        name: rule.distribute(planning.sql(query).execution_plan(), planning, WORKERS)
        for name, query in QUERIES.items()
    }


def scheduled(plan, workers, **options):
    """A scheduler of ``plan`` on fake workers."""
    return Scheduler(
        QUERY,
        workers=WORKERS,
        calls=workers,
        options=DistributedOptions(scan_bytes_per_task=0, bytes_per_task=0, **options),
        settings={},
        passthrough=[],
        empty=lambda tree: tree,
        first_new_number=len(plan.stages) + 1,
        report=workers.report,
    )


def run(plan, sizes, fates, kept=False, **options):
    """The workers and the report of a query that was run to its head."""
    report = Recorded()
    workers = FakeWorkers(report, sizes, fates, kept)
    scheduler = scheduled(plan, workers, **options)
    head = scheduler.settle_head(plan.head)
    inputs, read = scheduler.inputs_of(head, head.stage.tree)
    assert scheduler.is_current(read)
    workers.head = {key for _, key in read}
    workers.check_consistent(workers.head)
    given = {source.output for i in inputs for sources in i.partitions for source in sources}
    assert given == workers.head
    return workers, report


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(QUERIES)),
    sizes=st.lists(st.sampled_from([10, 10**9]), min_size=1, max_size=5),
    fates=st.lists(st.integers(0, 7), max_size=30),
    kept=st.booleans(),
    small=st.booleans(),
)
def test_no_task_is_given_a_mixture_of_attempts(plans, name, sizes, fates, kept, small):
    workers, report = run(
        plans[name], sizes, fates, kept, coordinator_threshold=1 << 20 if small else 0
    )
    assert len(workers.gone) < len(WORKERS)
    # What counts in the end is held by somebody who is there, or went along with its report.
    assert report.tasks <= workers.calls


def test_without_losses_every_task_runs_once(plans):
    for plan in plans.values():
        workers, report = run(plan, [10**9], [])
        assert workers.calls == report.tasks
        assert not report.retries


def test_output_that_is_lost_is_made_again_and_nothing_else(plans):
    """The last call finds its worker gone, and with it what the stages before had left there."""
    plan = plans["join"]
    undisturbed, _ = run(plan, [10**9], [], coordinator_threshold=0)
    workers, report = run(
        plan, [10**9], [0] * (undisturbed.calls - 1) + [1], coordinator_threshold=0
    )
    (gone,) = workers.gone
    assert report.retries
    # What the head reads is elsewhere, and so is what was made again.
    assert all(workers.where[key] != gone for key in workers.head)
    again = {key for key in workers.made_from if key.attempt}
    assert again
    assert all(workers.where[key] != gone for key in again)
    # A task that had lost nothing ran once.
    kept = {key for key in workers.made_from if key.stage == 1 and workers.where[key] != gone}
    assert {key.attempt for key in kept - again} == {0}


def test_a_task_is_not_tried_for_ever(plans):
    with pytest.raises(WorkerLostError, match="was started 2 times"):
        run(plans["groups"], [10], [1, 1, 1, 1, 1], task_retries=1)


def test_the_last_worker_lost_ends_the_query(plans):
    report = Recorded()
    workers = FakeWorkers(report, [10], [], kept=False)
    workers.gone = {worker.url for worker in WORKERS}
    plan = plans["groups"]
    scheduler = scheduled(plan, workers, task_retries=100)
    with pytest.raises(WorkerLostError, match="no worker of") as raised:
        scheduler.settle_head(plan.head)
    assert all(worker.url in str(raised.value) for worker in WORKERS)


def test_nothing_starts_once_the_query_is_over(plans):
    report = Recorded()
    workers = FakeWorkers(report, [10], [], kept=False)
    plan = plans["groups"]
    scheduler = scheduled(plan, workers)
    scheduler.end()
    with pytest.raises(WorkerLostError, match="is over"):
        scheduler.settle_head(plan.head)
    assert workers.calls == 0
