"""What a Flight client costs per batch: `do_get` through pyarrow, grpcio and grpc.aio.

``python -m benchmarks.clients`` prints ratios to pyarrow's own client, for batches of
1 KB, 1 MB and 64 MB. The server is pyarrow's, in a process of its own, and sends batches
that it holds, so that the clients are what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pyarrow as pa
from pyarrow import flight

from resolver import GrpcConnector
from resolver.aio import GrpcConnector as AioConnector

from .measure import heading, median_ratio, take_turns

PYARROW, GRPCIO, AIO = "pyarrow", "grpcio", "grpc.aio"
SIZES = {"1 KB": 1 << 10, "1 MB": 1 << 20, "64 MB": 1 << 26}
TOTAL = 1 << 30
"""Bytes of one stream; of small batches at most `MOST_BATCHES` are sent."""
MOST_BATCHES = 2_000
AT_LEAST = 0.5
"""Of pyarrow's throughput, for a stream of 1 GB in batches of 1 MB."""


class Server(flight.FlightServerBase):
    """Sends ``count`` times a batch of ``size`` bytes for the ticket ``size,count``."""

    def do_get(
        self, _context: flight.ServerCallContext, ticket: flight.Ticket
    ) -> flight.RecordBatchStream:
        size, count = map(int, ticket.ticket.split(b","))
        batch = pa.record_batch({"n": pa.nulls(size // 8, pa.int64()).fill_null(7)})
        return flight.RecordBatchStream(
            pa.RecordBatchReader.from_batches(batch.schema, [batch] * count)
        )


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """A server in a process of its own; its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.clients", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


@contextlib.contextmanager
def readers(port: int, size: int, count: int) -> Iterator[dict[str, Callable[[], int]]]:
    """Per client: read one stream to its end, and return how many bytes it held."""
    ticket = flight.Ticket(f"{size},{count}")
    url = f"http://127.0.0.1:{port}"

    def with_pyarrow() -> int:
        return sum(chunk.data.nbytes for chunk in plain.do_get(ticket))

    def with_grpcio() -> int:
        return sum(chunk.data.nbytes for chunk in blocking.do_get(ticket))

    async def read() -> int:
        return sum([chunk.data.nbytes async for chunk in await awaited.do_get(ticket)])

    with (
        flight.connect(url.replace("http", "grpc")) as plain,
        GrpcConnector().connect(url) as blocking,
        asyncio.Runner() as runner,
    ):
        awaited = runner.run(AioConnector().connect(url))
        yield {
            PYARROW: with_pyarrow,
            GRPCIO: with_grpcio,
            AIO: lambda: runner.run(read()),
        }
        runner.run(awaited.close())


def measure(*, turns: int = 5, total: int = TOTAL) -> dict[str, dict[str, float]]:
    """Throughput over pyarrow's, by size of batch and client; median of turns."""
    ratios = {}
    with serving() as port:
        for name, size in SIZES.items():
            count = max(1, min(total // size, MOST_BATCHES))
            with readers(port, size, count) as runs:
                times = take_turns(runs, turns=turns)
            ratios[name] = {who: median_ratio(times[PYARROW], times[who]) for who in runs}
    return ratios


def main() -> None:
    """Serve, or print the table."""
    if "--serve" in sys.argv:
        with Server("grpc://127.0.0.1:0") as server:
            print(server.port, flush=True)
            sys.stdin.read()
        return
    print(heading())
    for size, row in measure().items():
        cells = "  ".join(f"{who} {ratio:5.2f}x" for who, ratio in row.items())
        print(f"batches of {size:>5}: {cells}")


if __name__ == "__main__":
    main()
