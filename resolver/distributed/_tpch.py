"""TPC-H for the demo: its data in a cache folder, and queries 1 and 6.

The data is made by ``tpchgen-cli``, the executable of the package of that name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["PARTS", "QUERIES", "TABLES", "data_folder", "generate"]

PARTS: Final = 6
"""Files per table, so that workers have something to divide among them."""

TABLES: Final = (
    "customer",
    "lineitem",
    "nation",
    "orders",
    "part",
    "partsupp",
    "region",
    "supplier",
)

QUERIES: Final = {
    1: """\
SELECT
    l_returnflag,
    l_linestatus,
    sum(l_quantity) AS sum_qty,
    sum(l_extendedprice) AS sum_base_price,
    sum(l_extendedprice * (1 - l_discount)) AS sum_disc_price,
    sum(l_extendedprice * (1 - l_discount) * (1 + l_tax)) AS sum_charge,
    avg(l_quantity) AS avg_qty,
    avg(l_extendedprice) AS avg_price,
    avg(l_discount) AS avg_disc,
    count(*) AS count_order
FROM lineitem
WHERE l_shipdate <= DATE '1998-12-01' - INTERVAL '90' DAY
GROUP BY l_returnflag, l_linestatus
ORDER BY l_returnflag, l_linestatus""",
    6: """\
SELECT sum(l_extendedprice * l_discount) AS revenue
FROM lineitem
WHERE l_shipdate >= DATE '1994-01-01'
  AND l_shipdate < DATE '1995-01-01'
  AND l_discount BETWEEN 0.05 AND 0.07
  AND l_quantity < 24""",
}


def data_folder(scale_factor: str, data_dir: Path | None = None) -> Path:
    """Where the data of ``scale_factor`` is, or will be: one directory per table."""
    if data_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        data_dir = Path(cache) / "resolver"
    return data_dir.absolute() / f"tpch-sf{scale_factor}-{PARTS}-parts"


def generate(scale_factor: str, folder: Path) -> None:
    """Make the data, and only then give it its name: a folder that exists is complete.

    Raises ``FileNotFoundError`` without ``tpchgen-cli``, ``RuntimeError`` if it fails.
    """
    tool = _tool()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tpch-", dir=folder.parent) as parent:
        fresh = Path(parent) / "data"
        command = [tool, "parquet", "-s", scale_factor, f"--parts={PARTS}"]
        done = subprocess.run(  # noqa: S603  # a known tool, and no shell
            [*command, f"--output-dir={fresh}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"tpchgen-cli failed with code {done.returncode}: {done.stderr}")
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # else somebody else made the same meanwhile
                raise


def _tool() -> str:
    beside = Path(sys.executable).with_name("tpchgen-cli")
    found = str(beside) if beside.exists() else shutil.which("tpchgen-cli")
    if found is None:
        raise FileNotFoundError("the demo needs tpchgen-cli to make data: pip install tpchgen-cli")
    return found
