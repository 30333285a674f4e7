"""Settings of a session, end to end: what a query gives depends on them, on workers too."""

from __future__ import annotations

import datafusion
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from resolver.distributed import SessionStateBuilder
from tests.support.distributed import rows

# Read from rows, on workers: nothing that planning could have folded.
LOCAL_TIME = "SELECT id, to_unixtime(local) AS at, local::timestamptz AS t FROM times"
ZONES = ["UTC", "+05:00", "-08:00", "America/New_York"]


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    """Four files of local times."""
    folder = tmp_path_factory.mktemp("times")
    for part in range(4):
        table = pa.table(
            {
                "id": range(part * 100, part * 100 + 100),
                "local": [f"2026-0{part + 1}-01T{hour % 24:02}:30:00" for hour in range(100)],
            }
        )
        parquet.write_table(table, folder / f"{part}.parquet")
    return str(folder)


@pytest.fixture
def spread(cluster, times):
    """A session whose stages all run on workers."""
    builder = SessionStateBuilder()
    for name in (
        "broadcast_threshold",
        "bytes_per_task",
        "scan_bytes_per_task",
        "coordinator_threshold",
    ):
        builder.with_distributed_option(name, 0)
    session = cluster.session(builder=builder)
    session.register_parquet("times", times)
    return session


def both(spread, times, setting):
    """The session, and single-node DataFusion, with the same setting."""
    single = datafusion.SessionContext()
    single.register_parquet("times", times)
    for session in (spread, single):
        session.sql(setting).collect()
    return spread, single


def test_workers_read_times_in_the_time_zone_of_the_session(spread, times):
    answers = set()
    for zone in ZONES:
        _, single = both(spread, times, f"SET datafusion.execution.time_zone = '{zone}'")
        found = rows(spread.sql(LOCAL_TIME).to_arrow_table())
        assert found == rows(single.sql(LOCAL_TIME).to_arrow_table())
        answers.add(tuple(found))
    assert len(answers) == len(ZONES), "the answer does not depend on the setting"


def test_a_time_zone_counts_below_a_shuffle_too(spread, times):
    query = "SELECT to_unixtime(local) / 86400 AS day, count(*) AS n FROM times GROUP BY 1"
    _, single = both(spread, times, "SET datafusion.execution.time_zone = '+05:30'")
    assert rows(spread.sql(query).to_arrow_table()) == rows(single.sql(query).to_arrow_table())
    assert len(spread.sql(query).distributed_plan().stages) > 1


@pytest.mark.parametrize("size", [7, 50])
def test_workers_make_batches_of_the_size_of_the_session(spread, size):
    spread.sql(f"SET datafusion.execution.batch_size = {size}").collect()
    head = spread._start(spread.sql("SELECT id, local FROM times WHERE id >= 0"))
    try:
        batches = [batch.to_pyarrow() for batch in head.stream()]
        partitions = [
            partition
            for stage in head.report.stages.values()
            for task in stage.tasks
            for partition in task.report.partitions
        ]
    finally:
        head.close()
    assert sum(batch.num_rows for batch in batches) == 400
    assert partitions
    for partition in partitions:
        assert partition.batches >= partition.rows / size
