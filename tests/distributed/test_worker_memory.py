"""A worker's memory while a shuffle grows: what passes through it is on disk, not in memory."""

from __future__ import annotations

import textwrap
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from resolver.distributed import LocalCluster, SessionStateBuilder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ROWS = 50_000  # in each file, 200 bytes a row: 100 MB and 1 GB
FILES = {"once": 10, "tenfold": 100}
SHUFFLED = {
    "broadcast_threshold": 0,
    "bytes_per_task": 0,
    "scan_bytes_per_task": 0,
    "coordinator_threshold": 0,
}
# Everything is shuffled for the join, and nearly nothing comes out of it.
QUERY = """
    SELECT few.word, big.word FROM few JOIN big ON few.id = big.id WHERE big.word <> 'none'
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A table that is ten times another one, of words that do not compress."""
    folder = tmp_path_factory.mktemp("data")
    words = pa.array([f"{(n * 2_654_435_761) % 2**32:08x}" * 25 for n in range(ROWS)])
    for name, files in FILES.items():
        (folder / name).mkdir()
        for part in range(files):
            ids = pa.array(range(part * ROWS, (part + 1) * ROWS))
            table = pa.table({"id": ids, "word": words})
            parquet.write_table(table, folder / name / f"{part}.parquet", compression="zstd")
    few = pa.table({"id": [1, 2, 3], "word": ["one", "two", "three"]})
    parquet.write_table(few, folder / "few.parquet")
    return folder


def shuffled(data: Path, name: str) -> tuple[int, int]:
    """The bytes that the workers wrote, and the most memory that one of them had."""
    builder = SessionStateBuilder()
    for option, value in SHUFFLED.items():
        builder.with_distributed_option(option, value)
    with LocalCluster(workers=2) as cluster:
        session = cluster.session(builder=builder)
        session.register_parquet("few", str(data / "few.parquet"))
        session.register_parquet("big", str(data / name))
        with Peak([process.pid for process in cluster.processes]) as peak:
            head = session._start(session.sql(textwrap.dedent(QUERY)))
            assert head is not None
            rows = sum(batch.to_pyarrow().num_rows for batch in head.stream())
            head.close()
        assert rows == 3
        return head.report.bytes, peak.bytes


class Peak:
    """The most memory that one of these processes has had, looked at all the time.

    Without the pages of mapped files, which the kernel takes back when it needs them.
    """

    def __init__(self, pids):
        self.bytes = 0
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, *map(anonymous_memory, self._pids))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def anonymous_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def test_memory_stays_flat_while_a_shuffle_grows_tenfold(data):
    small, memory_of_small = shuffled(data, "once")
    large, memory_of_large = shuffled(data, "tenfold")
    assert large > 8 * small, "the shuffle did not grow"
    assert large - small > 800 * 2**20
    # Had a worker kept what it wrote or what it read, it would have grown by half of that.
    assert memory_of_large - memory_of_small < (large - small) / 4
    assert memory_of_large < 2 * memory_of_small
