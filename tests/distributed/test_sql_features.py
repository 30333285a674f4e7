"""What SQL can do, feature by feature, against single-node DataFusion.

Over the tables of TPC-H and the small ones of ``random_tables``, which have every type
and source, empty files, NULLs and skew. An ORDER BY that ends a query is total, and its
order is checked. Whether a query is spread over workers is not asked here; that its rows
are right is.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable, Iterator

import datafusion
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from resolver.distributed import SessionContext
from tests.support.answers import difference
from tests.support.local_workers import BROADCASTS, DEFAULTS, SHUFFLES, LocalWorkers
from tests.support.random_tables import TableSet

SMALL_FILES = {"optimizer__repartition_file_min_size": 1}
WAYS = {
    "as it comes": DEFAULTS,
    "shuffles": SHUFFLES.but(execution__batch_size=100, **SMALL_FILES),
    "broadcasts": BROADCASTS.but(execution__batch_size=100, **SMALL_FILES),
}

BOUNDARIES = {
    "scan": "SELECT l_orderkey, l_comment FROM lineitem WHERE l_quantity < 2",
    "hash shuffle": "SELECT l_suppkey, count(*) AS n, sum(l_tax) AS t FROM lineitem GROUP BY 1",
    "coalesce": "SELECT count(*) AS n, min(l_comment) AS c FROM lineitem",
    "merge": "SELECT o_orderkey, o_comment FROM orders WHERE o_custkey < 50 ORDER BY o_orderkey",
    "broadcast": "SELECT l_orderkey, p_name FROM lineitem JOIN part ON l_partkey = p_partkey WHERE p_size = 1",
    "two shuffles": "SELECT n, count(*) AS m FROM (SELECT l_orderkey, count(*) AS n FROM lineitem GROUP BY 1) GROUP BY n",
    "shuffles on both sides": "SELECT count(*) AS n, sum(l_tax) AS t FROM lineitem JOIN orders ON l_orderkey = o_orderkey",
    "chain of joins": (
        "SELECT n_name, sum(l_extendedprice * (1 - l_discount)) AS revenue "
        "FROM customer JOIN orders ON c_custkey = o_custkey JOIN lineitem ON l_orderkey = o_orderkey "
        "JOIN supplier ON l_suppkey = s_suppkey AND c_nationkey = s_nationkey "
        "JOIN nation ON s_nationkey = n_nationkey JOIN region ON n_regionkey = r_regionkey "
        "WHERE r_name = 'ASIA' GROUP BY n_name"
    ),
    "no columns": "SELECT count(*) AS n FROM (SELECT 1 FROM lineitem JOIN nation ON l_suppkey = n_nationkey)",
    "nothing but a limit": "SELECT count(*) AS n FROM (SELECT l_tax FROM lineitem LIMIT 33)",
}

JOINS = {
    **{
        f"{word.lower()}, {side}": f"SELECT {columns} FROM {tables[0]} AS a {word} JOIN {tables[1]} AS b ON a.k = b.k{extra}"
        for word, columns in (
            ("INNER", "*"),
            ("LEFT", "*"),
            ("RIGHT", "*"),
            ("FULL", "*"),
            ("LEFT SEMI", "a.*"),
            ("LEFT ANTI", "a.*"),
            ("RIGHT SEMI", "b.*"),
            ("RIGHT ANTI", "b.*"),
        )
        for side, tables, extra in (
            ("big with small", ("some_facts", "some_notes"), ""),
            ("small with big", ("some_notes", "some_facts"), ""),
            ("with a filter", ("some_facts", "some_notes"), " AND a.i > b.i"),
            ("with nothing", ("some_facts", "no_notes"), ""),
            ("nothing with", ("no_notes", "some_facts"), ""),
        )
    },
    "on two keys": "SELECT * FROM some_facts AS a JOIN some_notes AS b ON a.k = b.k AND a.s = b.s",
    "on an expression": "SELECT * FROM some_facts AS a JOIN some_notes AS b ON a.k + 1 = b.k * 2",
    "on NULL keys": "SELECT * FROM some_facts AS a JOIN some_notes AS b ON a.k IS NOT DISTINCT FROM b.k",
    "on keys of different types": "SELECT a.i, b.i FROM some_facts AS a JOIN dims AS d ON a.k = d.u8 JOIN some_notes AS b ON a.s = b.s",
    "on a dictionary": "SELECT a.id, b.id FROM facts AS a JOIN notes AS b ON a.y = b.s",
    "on a decimal": "SELECT a.id, b.id FROM facts AS a JOIN dims AS b ON a.m = b.m",
    "on a float with NaN and zeros": "SELECT a.id, b.id FROM facts AS a JOIN notes AS b ON a.f = b.f",
    "using": "SELECT k, count(*) AS n FROM some_facts JOIN some_notes USING (k) GROUP BY k",
    "full using": "SELECT k, count(*) AS n FROM some_facts FULL JOIN some_notes USING (k) GROUP BY k",
    "natural": "SELECT count(*) AS n FROM nation NATURAL JOIN (SELECT n_nationkey FROM nation WHERE n_regionkey > 1) AS some",
    "self": "SELECT a.i, b.i FROM some_facts AS a JOIN some_facts AS b ON a.k = b.k AND a.i < b.i",
    "cross": "SELECT a.i, b.i FROM some_facts AS a CROSS JOIN some_notes AS b",
    "cross with one row": "SELECT count(*) AS n FROM lineitem, (SELECT avg(l_tax) AS t FROM lineitem) WHERE l_tax > t",
    "inequality": "SELECT a.i, b.i FROM some_facts AS a JOIN some_notes AS b ON a.i < b.i",
    "left inequality": "SELECT a.i, b.i FROM some_facts AS a LEFT JOIN some_notes AS b ON a.i < b.i AND b.k > 2",
    "full inequality": "SELECT a.i, b.i FROM some_facts AS a FULL JOIN some_notes AS b ON a.i + 40 < b.i",
    "right inequality": "SELECT a.i, b.i FROM some_facts AS a RIGHT JOIN some_notes AS b ON a.i > b.i * 9",
    "left on nothing": "SELECT a.i, b.i FROM some_facts AS a LEFT JOIN no_notes AS b ON TRUE",
    "full on a constant": "SELECT a.i, b.i FROM some_facts AS a FULL JOIN some_notes AS b ON FALSE",
    "three full joins": (
        "SELECT a.k, b.k, c.k, count(*) AS n FROM some_facts AS a FULL JOIN some_notes AS b "
        "ON a.k = b.k FULL JOIN dims AS c ON b.k = c.k GROUP BY 1, 2, 3"
    ),
    "join of groups": (
        "SELECT a.k, n, m FROM (SELECT k, count(*) AS n FROM facts GROUP BY k) AS a "
        "FULL JOIN (SELECT k, count(*) AS m FROM dims GROUP BY k) AS b ON a.k = b.k"
    ),
    "lateral": "SELECT a.i, n FROM some_facts AS a, LATERAL (SELECT count(*) AS n FROM dims WHERE dims.k = a.k)",
}

AGGREGATES = {
    "many": (
        "SELECT k, count(*) AS a, count(s) AS b, sum(m) AS c, avg(m) AS d, min(d) AS e, max(ts) AS f, "
        "bool_and(b) AS g, bool_or(b) AS h, stddev(i16) AS i, var_pop(i16) AS j, median(i16) AS l, "
        "bit_and(u8) AS n, bit_xor(i8) AS o, corr(i8, i16) AS p FROM facts GROUP BY k"
    ),
    "of nothing": "SELECT count(*) AS n, sum(k) AS s, min(s) AS m, array_agg(s) AS a FROM nothing",
    "of nothing, by key": "SELECT k, count(*) AS n FROM nothing GROUP BY k",
    "distinct": "SELECT DISTINCT l_shipmode, l_returnflag FROM lineitem",
    "distinct on": "SELECT DISTINCT ON (k) k, id FROM facts ORDER BY k, id",
    "count distinct": "SELECT count(DISTINCT l_suppkey) AS n, count(DISTINCT l_shipmode) AS m FROM lineitem",
    "distinct by key": "SELECT l_shipmode, count(DISTINCT l_suppkey) AS n, sum(DISTINCT l_tax) AS t, avg(l_tax) AS a FROM lineitem GROUP BY 1",
    "filter": "SELECT k, count(*) FILTER (WHERE b) AS n, sum(m) FILTER (WHERE s LIKE 'a%') AS t FROM facts GROUP BY k",
    "having": "SELECT l_suppkey, count(*) AS n FROM lineitem GROUP BY 1 HAVING count(*) > 610",
    "grouping sets": "SELECT k, s, b, count(*) AS n, grouping(k) AS g FROM facts GROUP BY GROUPING SETS ((k, s), (b), ())",
    "rollup": "SELECT l_returnflag, l_shipmode, sum(l_tax) AS t FROM lineitem GROUP BY ROLLUP (l_returnflag, l_shipmode)",
    "cube": "SELECT k, b, count(DISTINCT s) AS n FROM facts GROUP BY CUBE (k, b)",
    "cube of nothing": "SELECT k, s, count(*) AS n FROM nothing GROUP BY CUBE (k, s)",
    "ordered": "SELECT k, array_agg(id ORDER BY id DESC) AS a, string_agg(s, ',' ORDER BY id) AS t FROM facts GROUP BY k",
    "ordered, all": "SELECT first_value(s ORDER BY id) AS f, last_value(s ORDER BY id) AS l, nth_value(s, 3 ORDER BY id) AS n FROM facts",
    "by every type": (
        "SELECT b, f, m, d, ts, u64, y, x, tm, tz, dur, l, st, count(*) AS n FROM facts "
        "GROUP BY b, f, m, d, ts, u64, y, x, tm, tz, dur, l, st"
    ),
    "of every type": (
        "SELECT max(f) AS a, min(m) AS b, max(d) AS c, min(ts) AS d, max(u64) AS e, min(y) AS f, max(x) AS g, "
        "min(tm) AS h, max(tz) AS i, min(dur) AS j, max(wide) AS l, min(ls) AS n, max(b) AS o FROM facts"
    ),
    "decimals": "SELECT k, sum(wide) AS a, avg(wide) AS b, sum(m * m) AS c, sum(m) / count(*) AS d FROM facts GROUP BY k",
    # No min() or max() over NaN: DataFusion's answer depends on the order of the rows.
    "floats with NaN": "SELECT f, count(*) AS n, count(f32) AS a FROM facts GROUP BY f",
}

WINDOWS = {
    "row numbers by key": "SELECT id, row_number() OVER (PARTITION BY k ORDER BY id) AS n FROM facts",
    "ranks": "SELECT id, rank() OVER (PARTITION BY k ORDER BY s) AS r, dense_rank() OVER (ORDER BY s) AS d FROM facts",
    "over all rows": "SELECT id, count(*) OVER () AS n, sum(m) OVER () AS t FROM facts",
    "frame": "SELECT id, sum(m) OVER (PARTITION BY k ORDER BY id ROWS BETWEEN 2 PRECEDING AND 1 FOLLOWING) AS t FROM facts",
    "range": "SELECT id, count(*) OVER (ORDER BY i16 RANGE BETWEEN 2 PRECEDING AND CURRENT ROW) AS n FROM facts",
    "groups": "SELECT id, count(*) OVER (ORDER BY k GROUPS BETWEEN 1 PRECEDING AND CURRENT ROW) AS n FROM facts",
    "lag and lead": "SELECT id, lag(s) OVER (ORDER BY id) AS a, lead(s, 2, 'end') OVER (PARTITION BY k ORDER BY id) AS b FROM facts",
    "of some rows": "SELECT id, sum(m) FILTER (WHERE b) OVER (PARTITION BY k) AS a, count(*) FILTER (WHERE b) OVER (ORDER BY id) AS n FROM facts",
    "of some values": "SELECT id, lag(s) IGNORE NULLS OVER (ORDER BY id) AS a, first_value(s) IGNORE NULLS OVER (PARTITION BY k ORDER BY id) AS n FROM facts",
    "both ways": "SELECT id, lag(s, 2, '?') OVER (ORDER BY id) AS a, lag(s, 2, '?') OVER (ORDER BY id DESC) AS n FROM facts",
    "by a constant": "SELECT id, sum(m) OVER (PARTITION BY k ORDER BY id) AS a, count(*) OVER (PARTITION BY k) AS n FROM facts WHERE k = 2",
    "two partitionings": "SELECT id, sum(m) OVER (PARTITION BY k) AS a, max(id) OVER (PARTITION BY s) AS b FROM facts",
    "over groups": "SELECT k, rank() OVER (ORDER BY count(*) DESC) AS r FROM facts GROUP BY k",
    "filtered": "SELECT * FROM (SELECT l_orderkey, l_linenumber, row_number() OVER (PARTITION BY l_suppkey ORDER BY l_orderkey, l_linenumber) AS n FROM lineitem) WHERE n = 1",
    "of nothing": "SELECT k, row_number() OVER (PARTITION BY s ORDER BY id) AS n FROM nothing",
    "joined": "SELECT a.id, n FROM facts AS a JOIN (SELECT id, row_number() OVER (ORDER BY id) AS n FROM dims) AS b ON a.k = b.n",
}

ORDERS = {
    "sort": "SELECT id, s, k FROM facts ORDER BY k DESC NULLS LAST, id",
    "sort by every type": "SELECT id FROM facts ORDER BY b, f, m, d, ts, u64, y, x, tm, tz, dur, id",
    "top k": "SELECT l_orderkey, l_linenumber, l_comment FROM lineitem ORDER BY 1 DESC, 2 LIMIT 7",
    "offset": "SELECT l_orderkey, l_linenumber FROM lineitem ORDER BY 1, 2 LIMIT 7 OFFSET 9",
    "offset alone": "SELECT id FROM facts ORDER BY id OFFSET 20",
    "offset past the end": "SELECT id FROM facts ORDER BY id OFFSET 2000",
    "limit zero": "SELECT id FROM facts ORDER BY id LIMIT 0",
    "limit in a subquery": "SELECT count(*) AS n FROM (SELECT k FROM facts LIMIT 10 OFFSET 3)",
    "top k, joined": "SELECT a.id AS i, b.id AS j FROM facts AS a JOIN dims AS b ON a.k = b.k ORDER BY i, j LIMIT 9",
    "top k below a join": "SELECT a.id, t.id FROM facts AS a JOIN (SELECT * FROM dims ORDER BY id DESC LIMIT 5) AS t ON a.k = t.k",
    "top k of groups": "SELECT l_suppkey, count(*) AS n FROM lineitem GROUP BY 1 ORDER BY n DESC, 1 LIMIT 5",
    "top k of a union": "SELECT * FROM (SELECT id, s FROM facts UNION ALL SELECT id + 100, s FROM dims) ORDER BY id DESC LIMIT 30",
    "sort of nothing": "SELECT id FROM nothing ORDER BY id",
}

SETS = {
    "union all": "SELECT id, s FROM facts UNION ALL SELECT id, s FROM dims UNION ALL SELECT 7, 'x'",
    "union": "SELECT k, s FROM facts UNION SELECT k, s FROM dims",
    "union of different widths": "SELECT i8 AS v FROM facts UNION ALL SELECT i16 FROM facts UNION ALL SELECT id FROM dims",
    "union by name": "SELECT k, s FROM facts UNION ALL BY NAME SELECT s, k, id FROM dims",
    "union of groups": "SELECT k, count(*) AS n FROM facts GROUP BY k UNION ALL SELECT k, max(id) FROM dims GROUP BY k",
    "union under a group": "SELECT k, count(*) AS n FROM (SELECT k FROM facts UNION ALL SELECT k FROM dims) GROUP BY k",
    "union under a join": "SELECT a.k, b.id FROM (SELECT k FROM facts UNION ALL SELECT k FROM notes) AS a JOIN dims AS b ON a.k = b.k",
    "union of joins": (
        "SELECT a.id FROM facts AS a JOIN dims AS b ON a.k = b.k UNION ALL "
        "SELECT a.id FROM facts AS a LEFT JOIN notes AS b ON a.s = b.s"
    ),
    "union of limits": "(SELECT id FROM facts ORDER BY id LIMIT 3) UNION ALL (SELECT id FROM dims ORDER BY id DESC LIMIT 2)",
    "union with nothing": "SELECT k, s FROM nothing UNION ALL SELECT k, s FROM dims",
    "union of all sources": " UNION ALL ".join(
        f"SELECT id, k, s FROM {table}"
        for table in ("facts", "dims", "parts", "notes", "lines", "docs", "pages", "nothing")
    ),
    "intersect": "SELECT k, s FROM facts INTERSECT SELECT k, s FROM notes",
    "intersect all": "SELECT k FROM facts INTERSECT ALL SELECT k FROM notes",
    "except": "SELECT k, s FROM facts EXCEPT SELECT k, s FROM notes",
    "except all": "SELECT k FROM facts EXCEPT ALL SELECT k FROM notes",
    "except itself": "SELECT k FROM facts EXCEPT SELECT k FROM facts",
}

SUBQUERIES = {
    "scalar": "SELECT id FROM facts WHERE id > (SELECT avg(id) FROM facts)",
    "scalar of no rows": "SELECT id, (SELECT max(k) FROM nothing) AS n FROM dims",
    "scalar in a projection": "SELECT id, (SELECT max(id) FROM dims) - id AS n FROM facts",
    "two scalars": "SELECT id FROM facts WHERE id BETWEEN (SELECT min(k) FROM dims) AND (SELECT max(k) FROM notes)",
    "correlated scalar": "SELECT id, (SELECT max(d.id) FROM dims AS d WHERE d.k = o.k) AS n FROM facts AS o",
    "correlated count": "SELECT id, (SELECT count(*) FROM dims AS d WHERE d.k = o.k) AS n FROM facts AS o",
    "correlated comparison": "SELECT id FROM facts AS o WHERE m > (SELECT avg(m) FROM facts AS g WHERE g.k = o.k)",
    "exists": "SELECT id FROM facts AS o WHERE EXISTS (SELECT 1 FROM dims AS d WHERE d.k = o.k AND d.id > o.id)",
    "not exists": "SELECT id FROM facts AS o WHERE NOT EXISTS (SELECT 1 FROM dims AS d WHERE d.k = o.k)",
    "not exists, big inner": "SELECT n_name FROM nation WHERE NOT EXISTS (SELECT 1 FROM supplier JOIN lineitem ON s_suppkey = l_suppkey WHERE s_nationkey = n_nationkey)",
    "exists or": "SELECT id FROM facts AS o WHERE b OR EXISTS (SELECT 1 FROM dims AS d WHERE d.k = o.k)",
    "uncorrelated exists": "SELECT id FROM dims WHERE EXISTS (SELECT 1 FROM facts WHERE k = 99)",
    "in": "SELECT id FROM facts WHERE k IN (SELECT k FROM notes)",
    "not in": "SELECT id FROM facts WHERE k NOT IN (SELECT k FROM dims WHERE k > 3)",
    "not in, with NULL": "SELECT id FROM facts WHERE k NOT IN (SELECT k FROM notes)",
    "not in nothing": "SELECT id FROM facts WHERE k NOT IN (SELECT k FROM nothing)",
    "in or": "SELECT id FROM facts WHERE k IN (SELECT k FROM notes WHERE k > 3) OR b",
    "not in or": "SELECT id FROM facts WHERE k NOT IN (SELECT k FROM notes) OR b",
    "correlated in": "SELECT id FROM facts AS o WHERE s IN (SELECT s FROM dims AS d WHERE d.k = o.k)",
}

NAMED = {
    "cte": "WITH a AS (SELECT k, count(*) AS n FROM facts GROUP BY k) SELECT * FROM a WHERE n > 1",
    "cte used twice": "WITH a AS (SELECT k, count(*) AS n FROM facts GROUP BY k) SELECT x.k, y.n FROM a AS x JOIN a AS y ON x.n = y.n",
    "cte upon cte": "WITH a AS (SELECT k FROM facts WHERE b), c AS (SELECT k, count(*) AS n FROM a GROUP BY k) SELECT * FROM c, (SELECT count(*) AS m FROM a)",
    "view": "SELECT k, s, count(*) AS n FROM joined GROUP BY k, s",
    "view joined with itself": "SELECT a.k, a.n, b.s FROM grouped AS a JOIN grouped AS b ON a.n = b.n",
    "recursive": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 20) SELECT n FROM r",
    "recursive over a table": (
        "WITH RECURSIVE r(i, k) AS (SELECT id, k FROM dims WHERE id = 0 UNION ALL "
        "SELECT d.id, d.k FROM r JOIN dims AS d ON d.id = r.i + 1 WHERE d.id < 6) SELECT * FROM r"
    ),
    "recursive joined": (
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 6) "
        "SELECT n, count(id) AS c FROM r LEFT JOIN facts ON k = n GROUP BY n"
    ),
    "values": "VALUES (1, 'a'), (2, NULL), (NULL, 'c')",
    "values joined": "SELECT facts.id, v.w FROM facts JOIN (VALUES (1, 'one'), (2, 'two')) AS v(k, w) ON facts.k = v.k",
    "no table": "SELECT 1 AS one, 'a' AS a, NULL AS n",
    "series": "SELECT value AS n FROM generate_series(1, 20, 3)",
    "series joined": "SELECT g.value AS n, count(id) AS c FROM generate_series(0, 9) AS g LEFT JOIN facts ON k = g.value GROUP BY 1",
}

TYPES = {
    "every column": "SELECT * FROM facts",
    "every column of every source": (
        "SELECT a.*, b.*, c.*, d.*, e.*, g.*, h.* FROM facts AS a JOIN dims AS b ON a.id = b.id "
        "JOIN parts AS c ON b.id = c.id JOIN notes AS d ON c.id = d.id JOIN lines AS e ON d.id = e.id "
        "JOIN docs AS g ON e.id = g.id JOIN pages AS h ON g.id = h.id"
    ),
    "every column through a sort": "SELECT * FROM facts ORDER BY id",
    "every column through a join": "SELECT a.* FROM facts AS a JOIN dims AS b ON a.k = b.k",
    "unnest": "SELECT id, unnest(l) AS v FROM facts",
    "unnest and group": "SELECT v, count(*) AS n FROM (SELECT unnest(l) AS v FROM facts) GROUP BY v",
    "unnest a struct": "SELECT id, unnest(st) FROM docs",
    "list of groups": "SELECT k, array_length(array_agg(st ORDER BY id)) AS n FROM facts GROUP BY k",
    "struct fields": "SELECT st['a'] AS a, st['b'] AS b, count(*) AS n FROM facts GROUP BY 1, 2",
    "map": "SELECT id, map_keys(mp) AS a, map_extract(mp, 'a') AS b FROM facts",
    "nested made": "SELECT k, struct(count(*) AS n, [min(s), max(s)] AS l) AS v FROM facts GROUP BY k",
    "dictionary": "SELECT y, count(*) AS n, min(y) AS m FROM facts GROUP BY y",
    "nested dictionary": "SELECT [y] AS l, struct(y) AS t FROM facts",
    "casts": "SELECT CAST(k AS VARCHAR) AS a, CAST(d AS TIMESTAMP) AS b, TRY_CAST(s AS INT) AS c, CAST(m AS DOUBLE) AS e FROM facts",
    "dates": "SELECT date_trunc('month', d) AS a, extract(year FROM ts) AS b, d + INTERVAL '1 month' AS c, count(*) AS n FROM facts GROUP BY 1, 2, 3",
    "conditions": "SELECT CASE WHEN k > 2 THEN 'big' WHEN k IS NULL THEN NULL ELSE 'small' END AS c, coalesce(s, y, '?') AS s FROM facts",
    "NULL": "SELECT NULL AS n, k FROM facts GROUP BY k",
    "NULL logic": "SELECT id FROM facts WHERE NOT (k > 2 OR b) OR (s = 'a') IS UNKNOWN",
}

SOURCES = {
    f"{name} {source}": query.format(source)
    for source in (
        "facts",
        "parts",
        "notes",
        "lines",
        "docs",
        "pages",
        "one_file",
        "big_parquet",
        "big_csv",
        "zipped_csv",
        "big_json",
    )
    for name, query in {
        "rows of": "SELECT * FROM {}",
        "groups of": "SELECT k, count(*) AS n, min(s) AS s FROM {} GROUP BY k",
        "join with": "SELECT a.id, b.s FROM {} AS a JOIN dims AS b ON a.k = b.k AND a.id < 40",
    }.items()
} | {
    "hive partition": "SELECT p, count(*) AS n FROM parts WHERE p = 'b' GROUP BY p",
    "hive partitions as keys": "SELECT a.p, b.id FROM parts AS a JOIN facts AS b ON a.p = b.s",
    "only the partition column": "SELECT p FROM parts",
}

FEATURES = {
    f"{title}: {name}": query
    for title, queries in {
        "boundary": BOUNDARIES,
        "join": JOINS,
        "aggregate": AGGREGATES,
        "window": WINDOWS,
        "order": ORDERS,
        "set": SETS,
        "subquery": SUBQUERIES,
        "named": NAMED,
        "type": TYPES,
        "source": SOURCES,
    }.items()
    for name, query in queries.items()
}


@pytest.fixture(scope="module")
def register_all(
    register: Callable[[datafusion.SessionContext], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[datafusion.SessionContext], None]:
    """Registers the tables of TPC-H and every other one of these queries."""
    folder = tmp_path_factory.mktemp("features")
    tables = TableSet(2, folder / "set")
    big = pa.table(
        {
            "id": range(2000),
            "k": pa.array([n % 7 or None for n in range(2000)], pa.int32()),
            "s": [f"text {n % 31}" for n in range(2000)],
        }
    )
    pyarrow.parquet.write_table(big.slice(0, 30), folder / "one.parquet")
    pyarrow.parquet.write_table(big, folder / "big.parquet", row_group_size=100)
    pyarrow.csv.write_csv(big, folder / "big.csv")
    (folder / "zipped.csv.gz").write_bytes(gzip.compress((folder / "big.csv").read_bytes()))
    lines = [
        f'{{"id": {r["id"]}, "k": {r["k"] or "null"}, "s": "{r["s"]}"}}\n' for r in big.to_pylist()
    ]
    (folder / "big.json").write_text("".join(lines))

    def register_all(session: datafusion.SessionContext) -> None:
        register(session)
        tables.register(session)
        session.register_parquet("one_file", folder / "one.parquet")
        session.register_parquet("big_parquet", folder / "big.parquet")
        session.register_csv("big_csv", folder / "big.csv")
        session.register_csv(
            "zipped_csv",
            folder / "zipped.csv.gz",
            file_extension=".csv.gz",
            file_compression_type="gzip",
        )
        session.register_json("big_json", folder / "big.json")
        for name, query in {
            "some_facts": "SELECT id AS i, k, s FROM facts WHERE id < 40",
            "some_notes": "SELECT id AS i, k, s FROM notes WHERE id < 12",
            "no_notes": "SELECT id AS i, k, s FROM notes WHERE id < 0",
        }.items():
            session.sql(f"CREATE VIEW {name} AS {query}").collect()

    return register_all


@pytest.fixture(scope="module")
def expected(
    register_all: Callable[[datafusion.SessionContext], None],
) -> Callable[[str], pa.Table]:
    """The answer of single-node DataFusion."""
    session = datafusion.SessionContext()
    register_all(session)

    @functools.cache
    def expected(query: str) -> pa.Table:
        return session.sql(query).to_arrow_table()

    return expected


@pytest.fixture(scope="module")
def sessions(
    register_all: Callable[[datafusion.SessionContext], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], SessionContext]]:
    """A session on three workers for each of the WAYS."""
    with LocalWorkers(3, tmp_path_factory.mktemp("workers")) as workers:

        @functools.cache
        def sessions(way: str) -> SessionContext:
            session = workers.session(WAYS[way])
            register_all(session)
            return session

        yield sessions


@pytest.mark.parametrize("query", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("way", WAYS)
def test_it_gives_datafusions_answer(sessions, expected, way, query):
    frame = sessions(way).sql(query)
    ordered = "ORDER BY" in query.rpartition(")")[2]
    found = difference(frame.to_arrow_table(), expected(query), ordered=ordered)
    assert not found, f"{found}\n{query}\n{frame.distributed_plan().display(None)}"
