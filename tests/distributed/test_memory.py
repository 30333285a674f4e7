"""A worker's memory does not follow the size of a shuffle: output is on disk."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from resolver import DefaultChannelResolver
from resolver.distributed import LocalCluster, SessionStateBuilder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROWS = 600_000
WORKERS = 2
# Both sides are shuffled, and only the small one is held.
JOIN = "SELECT count(payload) AS n FROM small JOIN big ON small.k = big.k"
SHUFFLED = {
    "broadcast_threshold": 0,
    "bytes_per_task": 0,
    "scan_bytes_per_task": 0,
    "coordinator_threshold": 0,
}


def write(folder: Path, rows: int) -> None:
    (folder / "big").mkdir(parents=True)
    (folder / "small").mkdir()
    for part in range(4):
        keys = pa.array(range(part * rows // 4, (part + 1) * rows // 4))
        payload = pc.utf8_lpad(keys.cast(pa.string()), 100, "0")
        table = pa.table({"k": keys, "payload": payload})
        pq.write_table(table, folder / "big" / f"{part}.parquet", row_group_size=50_000)
    pq.write_table(pa.table({"k": range(10)}), folder / "small" / "0.parquet")


def held(pid: int) -> int:
    """Bytes of memory of the process, without the files that are mapped into it."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class Peaks:
    """The most that any of these processes held while the ``with`` block ran."""

    def __init__(self, pids):
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.most = 0

    def _watch(self):
        while not self._over.wait(0.005):
            self.most = max(self.most, *map(held, self._pids))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exception):
        self._over.set()
        self._thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask")
def test_ten_times_the_shuffle_takes_no_ten_times_the_memory(tmp_path, monkeypatch):
    # What is freed is given back at once, or it would look as if it were held.
    monkeypatch.setenv("MIMALLOC_PURGE_DELAY", "0")
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    peaks, written = [], []
    with LocalCluster(workers=WORKERS) as cluster, DefaultChannelResolver() as resolver:
        builder = SessionStateBuilder()
        for name, value in SHUFFLED.items():
            builder.with_distributed_option(name, value)
        session = cluster.session(resolver, builder=builder)
        for times in (1, 10):
            write(tmp_path / str(times), times * ROWS)
            for table in ("big", "small"):
                session.deregister_table(table)
                session.register_parquet(table, str(tmp_path / str(times) / table))
            with Peaks([process.pid for process in cluster.processes]) as seen:
                head = session._start(session.sql(JOIN))
                (batch,) = head.stream()
                head.close()
            assert batch.to_pyarrow().to_pydict() == {"n": [10]}
            peaks.append(seen.most)
            written.append(head.report.bytes / WORKERS)
    grown, more = peaks[1] - peaks[0], written[1] - written[0]
    assert written[1] > 8 * written[0]
    assert grown < more / 3, f"{grown:,} bytes more held of {more:,.0f} more shuffled"
