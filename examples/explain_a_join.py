"""Two tables, a join, and how to read what explain() prints.

Shows the staged plan before the query runs, and with analyze=True what measured sizes
made of it: the small side of the join is sent to every task, and the big one stays.

    python examples/explain_a_join.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from resolver.distributed import LocalCluster

QUERY = """
    SELECT name, count(*) AS orders, sum(price) AS total
    FROM orders JOIN customers ON customer = id
    GROUP BY name ORDER BY name
"""


def make_data(folder: Path) -> None:
    """Three customers, and 120,000 orders of theirs in three files."""
    (folder / "orders").mkdir()
    for part in range(3):
        numbers = range(part * 40_000, (part + 1) * 40_000)
        orders = pa.table(
            {"customer": [n % 3 for n in numbers], "price": [n % 100 for n in numbers]}
        )
        pq.write_table(orders, folder / "orders" / f"{part}.parquet")
    customers = pa.table({"id": [0, 1, 2], "name": ["Ada", "Grace", "Mary"]})
    pq.write_table(customers, folder / "customers.parquet")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, LocalCluster(workers=2) as cluster:
        make_data(Path(folder))
        ctx = cluster.session()
        ctx.register_parquet("orders", f"{folder}/orders")
        ctx.register_parquet("customers", f"{folder}/customers.parquet")
        query = ctx.sql(QUERY)

        print("As planned: a shuffle under each side of the join, and one for the groups.\n")
        query.explain()
        print("\nAs it ran: 'decided: broadcast' is the join's small side.\n")
        query.explain(analyze=True)
        query.show()

        picture = Path(folder) / "plan.svg"
        query.explain(format="svg", file=picture)
        print(f"The same as a picture: {picture.stat().st_size} bytes of SVG.")


if __name__ == "__main__":
    main()
