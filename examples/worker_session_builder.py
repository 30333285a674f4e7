"""Workers with a session builder: their own resolver, a function, and a tenant's header.

Shows both places in which a ChannelResolver is registered, a Python function that both
sides know by name, and a header that follows a query to every worker. This file is the
program that starts queries, and the module whose build() the workers import:

    python examples/worker_session_builder.py
    python -m resolver worker --session-builder worker_session_builder:build
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datafusion import udf

from resolver import DefaultChannelResolver, FlightConnector
from resolver.distributed import (
    DistributedError,
    LocalCluster,
    SessionState,
    SessionStateBuilder,
    WorkerQueryContext,
)

# Once per process: a resolver made in build() would be one per query, and connect for each.
RESOLVER = DefaultChannelResolver(FlightConnector(connect_timeout=2.0))
TENANTS = {"blue", "green"}


def cents(prices: pa.Array) -> pa.Array:
    return pc.cast(pc.round(pc.multiply(prices, 100.0)), pa.int64())


CENTS = udf(cents, [pa.float64()], pa.int64(), "immutable", "cents")


def build(query: WorkerQueryContext) -> SessionState:
    """The session of one query on a worker. What it raises fails the query."""
    tenant = query.headers.get("x-tenant")
    if tenant is not None and tenant not in TENANTS:
        raise PermissionError(f"there is no tenant {tenant!r}")
    return query.builder.with_distributed_channel_resolver(RESOLVER).with_udf(CENTS).build()


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(workers=2, session_builder="worker_session_builder:build") as cluster,
    ):
        for part in range(2):
            prices = pa.table({"price": [n / 4 for n in range(1_000)]})
            pq.write_table(prices, Path(folder) / f"{part}.parquet")

        for tenant in ("blue", "red"):
            builder = SessionStateBuilder().with_udf(CENTS)
            builder.with_distributed_passthrough_headers({"x-tenant": tenant})
            ctx = cluster.session(RESOLVER, builder=builder)
            ctx.register_parquet("sales", folder)
            try:
                total = ctx.sql("SELECT sum(cents(price)) AS total FROM sales").to_pylist()
            except DistributedError as error:
                print(f"{tenant}: refused: {error}")
            else:
                print(f"{tenant}: {total[0]['total']} cents")


if __name__ == "__main__":
    main()
