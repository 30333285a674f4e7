"""A stream of batches through pyarrow's client, over grpcio and over grpc.aio."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("grpc")

from .clients import AIO, GRPCIO, PYARROW, SIZES, readers, serving

COUNT = 4


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving() as port:
        yield port


@pytest.mark.benchmark(group="do_get")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("client", [PYARROW, GRPCIO, AIO])
def bench_do_get(benchmark: Callable[..., object], port: int, client: str, size: str) -> None:
    with readers(port, SIZES[size], COUNT) as runs:
        assert benchmark(runs[client]) >= COUNT * SIZES[size]
