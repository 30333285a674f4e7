"""A coordinator that is killed leaves workers that hold nothing and run nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from resolver import DefaultChannelResolver
from resolver.distributed import LocalCluster
from resolver.distributed._calls import worker_info
from tests.support.distributed import TABLES, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOP = Path(__file__).parents[2]
SCRIPT = """
    import sys
    from resolver import DefaultChannelResolver
    from resolver.distributed import (
        DistributedPhysicalOptimizerRule, SessionContext, SessionStateBuilder, StaticWorkerResolver,
    )
    folder, query, *urls = sys.argv[1:]
    builder = (
        SessionStateBuilder()
        .with_distributed_worker_resolver(StaticWorkerResolver(urls))
        .with_physical_optimizer_rule(DistributedPhysicalOptimizerRule())
        .with_distributed_channel_resolver(DefaultChannelResolver())
    )
    options = dict(lease=2.0, broadcast_threshold=0, bytes_per_task=0, scan_bytes_per_task=0)
    for name, value in options.items():
        builder.with_distributed_option(name, value)
    ctx = SessionContext(builder.build())
    for table in {tables}:
        ctx.register_parquet(table, f"{{folder}}/{{table}}")
    ctx.sql(query).collect()
"""
# The shuffles are soon done; the join of everything with everything never is.
ENDLESS = (
    "SELECT sum(sin(a.l_extendedprice * b.l_extendedprice)) AS n FROM lineitem a "
    "JOIN lineitem b ON a.l_linenumber = b.l_linenumber AND a.l_tax <> b.l_tax + 1"
)


def test_the_workers_of_a_killed_coordinator_end_its_query(tpch, tmp_path):
    with LocalCluster(workers=2) as cluster, DefaultChannelResolver() as resolver:
        urls = list(cluster.get_urls())

        def workers():
            return [worker_info(resolver, url) for url in urls]

        script = textwrap.dedent(SCRIPT).format(tables=TABLES)
        coordinator = subprocess.Popen(
            [sys.executable, "-c", script, str(tpch), ENDLESS, *urls],
            env={**os.environ, "PYTHONPATH": str(TOP), "TMPDIR": str(tmp_path)},
        )
        try:
            # In the middle: output is held, and tasks that read it run.
            eventually(
                lambda: all(w["running"] and w["exchange_bytes"] for w in workers()), seconds=60
            )
        finally:
            coordinator.kill()
            coordinator.wait()
        eventually(
            lambda: not any(w["running"] or w["queries"] or w["exchange_bytes"] for w in workers()),
            seconds=60,
        )
        assert [process.poll() for process in cluster.processes] == [None, None]
