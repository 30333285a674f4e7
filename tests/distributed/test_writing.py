"""write_parquet, write_csv and write_json: computed by workers, written as by DataFusion."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datafusion
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import DataFrameWriteOptions, col

from resolver.distributed import DistributedPlan, SessionContext
from resolver.distributed import _spool as spool_module
from resolver.distributed._spool import _spool
from tests.support.distributed import rows
from tests.support.local_workers import SHUFFLES, LocalWorkers

READS = {"parquet": "read_parquet", "csv": "read_csv", "json": "read_json"}
QUERY = "SELECT kind, count(*) AS n, sum(number) AS s FROM t GROUP BY kind"
ORDERED = "SELECT number, name FROM t ORDER BY number DESC"


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWorkers]:
    with LocalWorkers(2, tmp_path_factory.mktemp("workers")) as workers:
        yield workers


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 20,000 rows in all, several batches each."""
    folder = tmp_path_factory.mktemp("t")
    for part in range(2):
        numbers = pa.array(range(part, 20_000, 2), pa.int64())
        table = pa.table(
            {
                "number": numbers,
                "name": [f"name {number}" for number in numbers.to_pylist()],
                "kind": pa.array([f"k{n % 7}" for n in numbers.to_pylist()]).dictionary_encode(),
            },
            schema=pa.schema(
                [
                    pa.field("number", pa.int64(), nullable=False),
                    pa.field("name", pa.string()),
                    pa.field("kind", pa.dictionary(pa.int32(), pa.string())),
                ]
            ),
        )
        pq.write_table(table, folder / f"{part}.parquet")
    return folder


@pytest.fixture
def session(workers: LocalWorkers, files: Path) -> SessionContext:
    session = workers.session(SHUFFLES)
    session.register_parquet("t", files)
    return session


@pytest.fixture
def single(files: Path) -> datafusion.SessionContext:
    single = datafusion.SessionContext()
    single.register_parquet("t", files)
    return single


def written(session: datafusion.SessionContext, query: str, kind: str, path: Path) -> Path:
    frame = session.sql(query)
    if isinstance(session, SessionContext):
        assert isinstance(frame.distributed_plan(), DistributedPlan), frame.distributed_plan()
    options = {"with_header": True} if kind == "csv" else {}
    getattr(frame, f"write_{kind}")(path, **options)
    return path


def read(kind: str, path: Path) -> pa.Table:
    extension = {} if path.is_dir() else {"file_extension": path.suffix}
    return getattr(datafusion.SessionContext(), READS[kind])(path, **extension).to_arrow_table()


def leftovers(session: SessionContext) -> list[str]:
    return [path.name for path in session._exchange_path().iterdir() if path.name.startswith("w")]


@pytest.mark.parametrize("name", ["out", "out.suffix"], ids=["directory", "file"])
@pytest.mark.parametrize("kind", READS)
def test_what_is_written_is_what_datafusion_writes(session, single, tmp_path, kind, name):
    name = name.replace("suffix", kind)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours = written(session, QUERY, kind, tmp_path / "a" / name)
    theirs = written(single, QUERY, kind, tmp_path / "b" / name)
    assert ours.is_dir() == theirs.is_dir()
    assert rows(read(kind, ours)) == rows(read(kind, theirs))
    assert leftovers(session) == []


@pytest.mark.parametrize(
    "query",
    [
        "SELECT number, name, kind FROM t WHERE number % 5 = 0",
        QUERY,
        "SELECT name, struct(name) AS s, [number] AS l FROM t WHERE number < 9 ORDER BY number",
    ],
)
def test_parquet_has_datafusions_own_schema(session, single, tmp_path, query):
    ours = written(session, query, "parquet", tmp_path / "ours.parquet")
    theirs = written(single, query, "parquet", tmp_path / "theirs.parquet")
    assert pq.read_schema(ours).equals(pq.read_schema(theirs), check_metadata=True)
    assert pq.ParquetFile(ours).schema.equals(pq.ParquetFile(theirs).schema)
    assert rows(pq.read_table(ours)) == rows(pq.read_table(theirs))


@pytest.mark.parametrize(
    "query",
    [
        ORDERED,
        # A dictionary column makes a file of every batch: more than nine of them.
        "SELECT number, kind FROM t ORDER BY number DESC",
    ],
)
def test_an_order_is_kept(session, tmp_path, query):
    session.sql("SET datafusion.execution.batch_size = 512")
    path = written(session, query, "parquet", tmp_path / "out.parquet")
    assert pq.read_table(path)["number"].to_pylist() == list(range(19_999, -1, -1))


def test_the_users_arguments_reach_the_writer(session, tmp_path):
    frame = session.sql("SELECT number, name, kind FROM t WHERE number < 1000")
    frame.write_parquet(tmp_path / "z.parquet", "gzip", 3)
    column = pq.ParquetFile(tmp_path / "z.parquet").metadata.row_group(0).column(0)
    assert column.compression == "GZIP"
    options = DataFrameWriteOptions(partition_by=["kind"], sort_by=col("number").sort())
    frame.write_csv(tmp_path / "parts", True, options)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        f"kind=k{k}" for k in range(7)
    ]
    (part,) = (tmp_path / "parts" / "kind=k3").iterdir()
    first, *lines = part.read_text().splitlines()
    assert first == "number,name"
    assert [int(line.partition(",")[0]) for line in lines] == list(range(3, 1000, 7))
    frame.write_json(tmp_path / "one", DataFrameWriteOptions(single_file_output=True))
    assert len((tmp_path / "one").read_text().splitlines()) == 1000
    frame.write_parquet(
        tmp_path / "own.parquet", datafusion.ParquetWriterOptions(created_by="a test")
    )
    assert pq.ParquetFile(tmp_path / "own.parquet").metadata.created_by == "a test"


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("name", ["out", "out.suffix"], ids=["directory", "file"])
def test_no_rows_are_written_as_datafusion_writes_them(session, single, tmp_path, kind, name):
    query = "SELECT kind, count(*) AS n FROM t WHERE number < 0 GROUP BY kind"
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    name = name.replace("suffix", kind)
    written(session, query, kind, ours / name)
    written(single, query, kind, theirs / name)
    assert [path.name for path in ours.rglob("*")] == [path.name for path in theirs.rglob("*")]
    if (theirs / name).is_file():
        assert (ours / name).read_bytes()[:4] == (theirs / name).read_bytes()[:4]


def test_two_columns_of_one_name_are_written(session, single, tmp_path):
    query = "SELECT a.name, b.name FROM t AS a JOIN t AS b USING (number) WHERE a.number < 9"
    session.sql(query).write_csv(tmp_path / "ours.csv")
    single.sql(query).write_csv(tmp_path / "theirs.csv")
    lines = (tmp_path / "ours.csv").read_text().splitlines()
    assert sorted(lines) == sorted((tmp_path / "theirs.csv").read_text().splitlines())
    assert len(lines) == 9


def test_a_query_that_fails_writes_nothing(session, tmp_path):
    frame = session.sql("SELECT kind, sum(1 / (number - 7)) AS s FROM t GROUP BY kind")
    assert isinstance(frame.distributed_plan(), DistributedPlan)
    with pytest.raises(Exception, match="Divide by zero"):
        frame.write_parquet(tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []
    assert leftovers(session) == []


def test_a_place_that_cannot_be_written_leaves_nothing_behind(session, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match="writes"):
        session.sql(QUERY).write_csv(tmp_path / "file" / "out.csv")
    assert leftovers(session) == []


def test_files_for_the_writer_are_in_the_sessions_own_directory(session, tmp_path, monkeypatch):
    seen = []
    real = spool_module._spool

    def spy(stream: Any, stem: Path, stop: threading.Event) -> None:
        real(stream, stem, stop)
        seen.extend(stem.parent.iterdir())

    monkeypatch.setattr(spool_module, "_spool", spy)
    session.sql(QUERY).write_csv(tmp_path / "out.csv")
    assert seen
    assert {path.parent.parent for path in seen} == {session._exchange_path()}
    assert not any(path.exists() for path in seen)


class Item:
    """As a RecordBatchStream gives them."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    def to_pyarrow(self) -> pa.RecordBatch:
        return self._batch


def test_spooling_holds_one_batch_at_a_time(tmp_path):
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[Item]:
        nonlocal most
        for number in range(20):
            item = Item(pa.record_batch({"a": [number] * 100}))
            alive.add(item)
            gc.collect()
            most = max(most, len(alive))
            yield item
            del item

    _spool(stream(), tmp_path / "0", threading.Event())
    assert most <= 2
    table = datafusion.SessionContext().read_arrow(tmp_path).to_arrow_table()
    assert table.num_rows == 2000


def test_spooling_ends_when_another_partition_failed(tmp_path):
    stop = threading.Event()

    def stream() -> Iterator[Item]:
        yield Item(pa.record_batch({"a": [1]}))
        stop.set()
        yield Item(pa.record_batch({"a": [2]}))
        raise AssertionError("nobody asked for this batch")

    _spool(stream(), tmp_path / "0", stop)
    assert stop.is_set()
