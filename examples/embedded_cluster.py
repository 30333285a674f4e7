"""Distributed SQL inside one program: worker processes that start and end with it.

Shows LocalCluster, a token that keeps other users of this machine out, a result that
streams, and what the workers say about themselves.

    python examples/embedded_cluster.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from resolver.distributed import LocalCluster


def make_data(folder: Path) -> None:
    """Four files of measurements: more files than workers, so that all have some."""
    for part in range(4):
        hours = pa.array([hour for hour in range(24) for _ in range(2_000)])
        degrees = pa.array([(hour * 7 + part) % 31 for hour in hours.to_pylist()])
        pq.write_table(pa.table({"hour": hours, "degrees": degrees}), folder / f"{part}.parquet")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, LocalCluster(workers=2, token=True) as cluster:
        make_data(Path(folder))
        ctx = cluster.session()
        ctx.register_parquet("weather", folder)

        warmest = ctx.sql(
            "SELECT hour, avg(degrees) AS mean, count(*) AS n FROM weather "
            "GROUP BY hour ORDER BY mean DESC, hour LIMIT 3"
        )
        warmest.show()

        hot = ctx.table("weather").filter("degrees > 25")  # the DataFrame API, too
        rows = sum(batch.to_pyarrow().num_rows for batch in hot.execute_stream())
        print(f"{rows} hot hours, counted while they came in")
        print(f"computed by {', '.join(warmest.distributed_plan().urls)}")


if __name__ == "__main__":
    main()
