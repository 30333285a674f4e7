"""A worker is killed while a query runs, and the answer is still whole.

Shows that a lost worker costs its tasks and not the query: they run again on the others,
and a warning says so. The next query is planned for those that are left, because the
worker resolver names no others.

    python examples/retry_after_kill.py
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from resolver import DefaultChannelResolver
from resolver.distributed import (
    DistributedPhysicalOptimizerRule,
    LocalCluster,
    SessionContext,
    SessionStateBuilder,
)

QUERY = "SELECT k, count(*) AS n FROM t GROUP BY k ORDER BY n DESC, k LIMIT 3"


class LivingWorkers:
    """A WorkerResolver that names the processes of a cluster that still run."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    def get_urls(self) -> list[str]:
        alive = zip(self._cluster.get_urls(), self._cluster.processes, strict=True)
        return [url for url, process in alive if process.poll() is None]


def kill_once(process: subprocess.Popen[str]):
    """For ``show(progress=...)``, which tells when a stage starts and when a task is done."""

    def told(progress) -> None:
        if process.poll() is None:
            process.kill()
            process.wait()
            print(f"killed process {process.pid} as stage {progress.stage} began")

    return told


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    with tempfile.TemporaryDirectory() as folder, LocalCluster(workers=3) as cluster:
        for part in range(3):
            table = pa.table({"k": [n % (1_000 + part) for n in range(200_000)]})
            pq.write_table(table, Path(folder) / f"{part}.parquet")
        state = (
            SessionStateBuilder()
            .with_distributed_worker_resolver(LivingWorkers(cluster))
            .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
            .with_distributed_channel_resolver(DefaultChannelResolver())
            .with_distributed_option("coordinator_threshold", 0)  # all stages on workers
            .with_distributed_option("scan_bytes_per_task", 0)  # and on all of them
            .build()
        )
        ctx = SessionContext(state)
        ctx.register_parquet("t", folder)

        query = ctx.sql(QUERY)
        before = query.to_pylist()
        query.show(progress=kill_once(cluster.processes[0]))
        assert query.to_pylist() == before, "a row was lost"
        print(f"the same rows; now on {len(query.distributed_plan().urls)} workers")


if __name__ == "__main__":
    main()
