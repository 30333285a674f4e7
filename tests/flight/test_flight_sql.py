"""A Flight SQL result, read by another project's client and by both of ours: same rows."""

from __future__ import annotations

import asyncio

import pytest

import resolver
from resolver import aio

adbc = pytest.importorskip("adbc_driver_flightsql.dbapi")  # not to be had free-threaded
pytest.importorskip("duckdb")

from tests.support.flight_sql import FlightSqlServer, statement  # noqa: E402

SETUP = (
    "create table t as select i, i % 7 as k, 'name ' || i as s, "
    "case when i % 3 = 0 then null else i / 2.0 end as x, date '2024-01-01' + i::int as d "
    "from range(4500) r(i)"
)
QUERIES = {
    "several endpoints": "select * from t order by i",
    "one row": "select count(*) as n, sum(x) as s from t",
    "no rows": "select * from t where i < 0",
    "groups": "select k, min(s) as first, max(d) as last from t group by k order by k",
    "a long text": "select i from t where s <> '" + "x" * 500 + "' order by i desc",
}


@pytest.fixture(scope="module")
def server():
    with FlightSqlServer(SETUP) as running:
        yield running


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_both_clients_give_the_same_rows(server, query):
    with (
        adbc.connect(f"grpc+tcp://127.0.0.1:{server.port}", autocommit=True) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(query)
        theirs = cursor.fetch_arrow_table()
    with resolver.DefaultChannelResolver() as channels:
        ours = resolver.read(statement(query), channels, url=server.url).read_all()
    for table in (ours, asyncio.run(read_in_asyncio(server, query))):
        assert table.schema.equals(theirs.schema)
        assert table.to_pylist() == theirs.to_pylist()


async def read_in_asyncio(server, query):
    async with aio.DefaultChannelResolver() as channels:
        return await (await aio.read(statement(query), channels, url=server.url)).read_all()


def test_the_result_comes_in_several_endpoints(server):
    before = server.endpoints_given
    with resolver.DefaultChannelResolver() as channels:
        table = resolver.read(
            statement(QUERIES["several endpoints"]), channels, url=server.url
        ).read_all()
    assert server.endpoints_given - before == 5
    assert table["i"].to_pylist() == list(range(4500))
