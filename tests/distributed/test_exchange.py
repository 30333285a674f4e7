"""Stage output on disk: written, found again, released, and never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from resolver.distributed._directory import LockedDirectory
from resolver.distributed._exchange import (
    Exchange,
    ExchangeFullError,
    PartitionWriter,
    QueryReleasedError,
    read,
)
from resolver.distributed._wire import OutputKey, PartitionTicket
from tests.support.distributed import eventually, names

QUERY = "0" * 32
KEY = OutputKey(QUERY, 1, 0, 0)


@pytest.fixture
def exchange(tmp_path):
    exchange = Exchange(tmp_path)
    yield exchange
    exchange.close()


def named(stem, rest):
    """A file of the task that ``stem`` belongs to."""
    return stem.with_name(f"{stem.name}-{rest}")


def store(exchange, key, batch):
    with exchange.task(key) as stem:
        writer = PartitionWriter(stem, 0, batch.schema)
        writer.write(batch)
        exchange.publish(key, [writer.finish()])


def test_output_is_found_by_its_key(exchange):
    batch = pa.record_batch({"a": [1, 2, 3]})
    store(exchange, KEY, batch)
    stored = exchange.partition(PartitionTicket(KEY, 0))
    assert list(read(stored)) == [batch]
    assert (stored.report.rows, stored.report.batches) == (3, 1)
    assert stored.report.bytes == stored.files[0].stat().st_size
    assert exchange.queries() == 1


@pytest.mark.parametrize(
    "ticket",
    [
        PartitionTicket(KEY, 1),
        PartitionTicket(OutputKey(QUERY, 1, 0, 1), 0),
        PartitionTicket(OutputKey("1" * 32, 1, 0, 0), 0),
    ],
)
def test_what_is_not_held_is_not_found(exchange, ticket):
    store(exchange, KEY, pa.record_batch({"a": [1]}))
    with pytest.raises(KeyError):
        exchange.partition(ticket)


def test_differing_dictionaries_survive(exchange):
    """An IPC file holds one dictionary per column; a partition may have many."""
    type_ = pa.dictionary(pa.int32(), pa.string())
    batches = [
        pa.record_batch({"d": pa.array(values).dictionary_encode().cast(type_)})
        for values in (["a", "b"], ["c"], ["b", "d"])
    ]
    with exchange.task(KEY) as stem:
        writer = PartitionWriter(stem, 0, batches[0].schema)
        for batch in batches:
            writer.write(batch)
        exchange.publish(KEY, [writer.finish()])
    stored = exchange.partition(PartitionTicket(KEY, 0))
    assert [batch.to_pylist() for batch in read(stored)] == [batch.to_pylist() for batch in batches]


def test_the_columns_of_a_partition_are_known_without_its_files(exchange):
    batch = pa.record_batch({"a": [1], "b": ["x"]})
    store(exchange, KEY, batch)
    stored = exchange.partition(PartitionTicket(KEY, 0))
    for path in stored.files:
        path.unlink()
    assert stored.schema == batch.schema


def test_row_counts_without_columns_survive(exchange):
    store(exchange, KEY, pa.RecordBatch.from_struct_array(pa.array([{}] * 7, pa.struct([]))))
    (batch,) = read(exchange.partition(PartitionTicket(KEY, 0)))
    assert batch.num_rows == 7


def test_release_removes_output_and_refuses_late_tasks(exchange):
    store(exchange, KEY, pa.record_batch({"a": [1]}))
    exchange.release(QUERY)
    exchange.release(QUERY)
    assert names(exchange.path) == [".lock"]
    with pytest.raises(QueryReleasedError), exchange.task(KEY):
        pass
    with pytest.raises(QueryReleasedError):
        exchange.check_running(QUERY)
    with pytest.raises(KeyError):
        exchange.partition(PartitionTicket(KEY, 0))


def test_a_release_during_a_task_leaves_nothing(exchange):
    with pytest.raises(QueryReleasedError), exchange.task(KEY) as stem:
        exchange.release(QUERY)
        named(stem, "late").write_bytes(b"written by a task that had not noticed yet")
        exchange.publish(KEY, [])
    assert names(exchange.path) == [".lock"]


def test_a_release_at_the_very_end_of_a_task_leaves_nothing(exchange):
    with exchange.task(KEY) as stem:
        exchange.publish(KEY, [])
        exchange.release(QUERY)
        named(stem, "late").touch()
    assert names(exchange.path) == [".lock"]


def test_a_failed_task_leaves_nothing_and_may_run_again(exchange):
    with pytest.raises(ZeroDivisionError), exchange.task(KEY) as stem:
        named(stem, "0").write_bytes(b"half")
        raise ZeroDivisionError
    assert names(exchange.path) == [".lock"]
    store(exchange, KEY, pa.record_batch({"a": [1]}))


def test_what_fails_or_ends_takes_no_files_of_others_along(exchange):
    """Their names begin alike."""
    keys = [OutputKey(QUERY, 1, 0, 10), OutputKey(QUERY, 1, 0, 11), OutputKey("1" * 32, 1, 0, 1)]
    for key in keys:
        store(exchange, key, pa.record_batch({"a": [1]}))
    with pytest.raises(ZeroDivisionError), exchange.task(OutputKey(QUERY, 1, 0, 1)) as stem:
        named(stem, "0").touch()
        raise ZeroDivisionError
    assert len(names(exchange.path)) == 1 + len(keys)
    exchange.release(QUERY)
    assert [path.is_file() for path in exchange.partition(PartitionTicket(keys[2], 0)).files] == [
        True
    ]
    assert len(names(exchange.path)) == 2


def test_a_replayed_task_is_refused(exchange):
    with exchange.task(KEY), pytest.raises(FileExistsError), exchange.task(KEY):
        pass
    store(exchange, OutputKey(QUERY, 1, 1, 0), pa.record_batch({"a": [1]}))
    with pytest.raises(FileExistsError, match="already"), exchange.task(OutputKey(QUERY, 1, 1, 0)):
        pass


def test_the_memory_of_released_queries_is_bounded(exchange, monkeypatch):
    monkeypatch.setattr("resolver.distributed._exchange._REMEMBERED_RELEASES", 2)
    names = [f"{n:032x}" for n in range(3)]
    for name in names:
        exchange.release(name)
    exchange.check_running(names[0])
    with pytest.raises(QueryReleasedError):
        exchange.check_running(names[2])


def test_a_lease_that_has_run_out_ends_a_query_its_running_tasks_included(exchange):
    store(exchange, KEY, pa.record_batch({"a": [1]}))
    assert exchange.sweep() == []
    with exchange.task(OutputKey(QUERY, 1, 1, 0)):
        exchange.touch(QUERY, 0.0)
        exchange.touch("1" * 32, 60.0)
        eventually(lambda: exchange.sweep() == [QUERY])
        with pytest.raises(QueryReleasedError):
            exchange.check_running(QUERY)
    assert exchange.queries() == 1
    assert names(exchange.path) == [".lock"]


def test_using_a_query_keeps_it(exchange):
    exchange.touch(QUERY, 0.0, ahead=60.0)
    assert exchange.sweep() == []
    exchange.touch(QUERY, 60.0)
    exchange.touch(QUERY)
    assert exchange.sweep() == []


def test_only_with_a_lease_is_a_query_kept_before_it_wrote_anything(exchange):
    with pytest.raises(KeyError):
        exchange.touch(QUERY)
    exchange.touch(QUERY, 60.0)
    exchange.release(QUERY)
    for lease in (None, 60.0):
        with pytest.raises((KeyError, QueryReleasedError)):
            exchange.touch(QUERY, lease)
    assert exchange.queries() == 0


def test_abandoned_output_of_a_session_is_swept_too(tmp_path):
    exchange = Exchange(tmp_path, abandoned_after=0.0)
    store(exchange, KEY, pa.record_batch({"a": [1]}))
    eventually(exchange.sweep)
    assert names(exchange.path) == [".lock"]
    exchange.close()


def charged(exchange, key, stem, partition=0, rows=1_000, compression="none"):
    batch = pa.record_batch({"a": range(rows)})
    writer = exchange.writer(key, stem, partition, batch.schema, compression)
    try:
        writer.write(batch)
        return writer.finish()
    finally:
        writer.close()


def test_bytes_are_counted_while_they_are_written_and_until_the_query_ends(exchange):
    with exchange.task(KEY) as stem:
        stored = charged(exchange, KEY, stem)
        assert exchange.bytes == stored.report.bytes == stored.files[0].stat().st_size
        exchange.publish(KEY, [stored])
    assert exchange.bytes > 8_000
    exchange.release(QUERY)
    assert exchange.bytes == 0


def test_bytes_of_many_files_are_counted_with_their_footers(exchange):
    batch = pa.record_batch({"d": pa.array(["a", "b"]).dictionary_encode()})
    with exchange.task(KEY) as stem:
        writer = exchange.writer(KEY, stem, 0, batch.schema)
        for _ in range(3):
            writer.write(batch)
        stored = writer.finish()
        on_disk = sum(path.stat().st_size for path in stored.files)
        assert exchange.bytes == stored.report.bytes == on_disk


def test_bytes_of_a_failed_task_are_given_back(exchange):
    with pytest.raises(ZeroDivisionError), exchange.task(KEY) as stem:
        charged(exchange, KEY, stem)
        raise ZeroDivisionError
    assert exchange.bytes == 0
    with pytest.raises(ZeroDivisionError), exchange.task(KEY) as stem:
        charged(exchange, KEY, stem)
        exchange.release(QUERY)
        raise ZeroDivisionError
    assert exchange.bytes == 0


def test_what_goes_on_after_its_task_has_failed_is_not_counted(exchange):
    with pytest.raises(ZeroDivisionError), exchange.task(KEY) as directory:
        writer = exchange.writer(KEY, directory, 0, pa.schema([("a", pa.int64())]))
        writer.write(pa.record_batch({"a": [1]}))
        raise ZeroDivisionError
    with pytest.raises(QueryReleasedError, match="a task of query"):
        writer.finish()
    assert exchange.bytes == 0


def test_what_was_fetched_may_be_given_back_before_the_query_ends(exchange):
    with exchange.task(KEY):
        exchange.charge(KEY, 1_000)
        exchange.charge(KEY, -1_000)
        assert exchange.bytes == 0
    with pytest.raises(QueryReleasedError):
        exchange.charge(OutputKey("1" * 32, 1, 0, 0), 1)


def test_a_full_exchange_refuses_one_query_and_serves_the_next(tmp_path):
    other = OutputKey("1" * 32, 1, 0, 0)
    exchange = Exchange(tmp_path, quota=20_000)
    store(exchange, KEY, pa.record_batch({"a": [1]}))
    with (
        pytest.raises(ExchangeFullError, match="of exchange_quota=20,000"),
        exchange.task(other) as stem,
    ):
        charged(exchange, other, stem, 0)
        charged(exchange, other, stem, 1, rows=2_000)
    assert exchange.bytes == 0
    assert len(names(exchange.path)) == 2
    assert list(read(exchange.partition(PartitionTicket(KEY, 0))))
    with exchange.task(OutputKey("2" * 32, 1, 0, 0)) as stem:
        charged(exchange, OutputKey("2" * 32, 1, 0, 0), stem, rows=2_000)
    exchange.close()


def test_a_quota_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="exchange_quota"):
        Exchange(tmp_path, quota=0)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_output_is_smaller_and_the_same(exchange, compression):
    with exchange.task(KEY) as stem:
        plain = charged(exchange, KEY, stem, 0)
        small = charged(exchange, KEY, stem, 1, compression=compression)
    assert small.report.bytes < plain.report.bytes
    assert list(read(small)) == list(read(plain))
    assert small.compression == compression


@pytest.mark.parametrize("array", [pa.array, lambda values: pa.array(values).dictionary_encode()])
def test_a_partition_is_read_in_pieces(exchange, array):
    batches = [pa.record_batch({"a": array([n] * 10)}) for n in range(5)]
    size = batches[0].get_total_buffer_size()
    with exchange.task(KEY) as stem:
        writer = PartitionWriter(stem, 0, batches[0].schema)
        for batch in batches:
            writer.write(batch)
        stored = writer.finish()
    values = [batch.to_pylist() for batch in batches]
    assert [b.to_pylist() for b in read(stored)] == values
    assert [b.to_pylist() for b in read(stored, 3)] == values[3:]
    assert [b.to_pylist() for b in read(stored, 1, limit=1)] == values[1:2]
    assert 1 < len(list(read(stored, 1, limit=4 * size))) < 5
    assert list(read(stored, 5)) == []
    assert list(read(stored, 1 << 40)) == []


def test_closing_waits_for_running_tasks_and_removes_everything(tmp_path):
    exchange = Exchange(tmp_path)
    running = threading.Event()

    def task():
        with pytest.raises(QueryReleasedError), exchange.task(KEY):
            running.set()
            while True:
                exchange.check_running(QUERY)

    thread = threading.Thread(target=task)
    thread.start()
    assert running.wait(10)
    exchange.close()
    thread.join(10)
    assert not thread.is_alive()
    assert names(tmp_path) == []
    with pytest.raises(QueryReleasedError), exchange.task(OutputKey("1" * 32, 1, 0, 0)):
        pass


def test_a_directory_goes_with_its_object(tmp_path):
    directory = LockedDirectory("test", tmp_path)
    assert directory.path.name.startswith("resolver-test-")
    assert str(directory.path) in repr(directory)
    del directory
    eventually(lambda: names(tmp_path) == [])


def test_a_directory_of_a_killed_process_is_removed_by_the_next(tmp_path):
    script = (
        "import sys, os\n"
        "from resolver.distributed._directory import LockedDirectory\n"
        f"d = LockedDirectory('test', {str(tmp_path)!r})\n"
        "(d.path / 'output.arrow').write_bytes(b'x')\n"
        "print(d.path, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    left = Path(process.stdout.readline().strip())
    mine = LockedDirectory("test", tmp_path)
    assert left.exists(), "a living process lost its directory"
    process.kill()
    process.communicate()
    assert left.exists()
    other = LockedDirectory("test", tmp_path)
    assert not left.exists()
    assert mine.path.exists()
    assert other.path.exists()
    mine.close()
    other.close()
    assert names(tmp_path) == []


def test_a_forked_child_does_not_remove_what_its_parent_owns(tmp_path):
    script = (
        "import os\n"
        "from resolver.distributed._directory import LockedDirectory\n"
        f"d = LockedDirectory('test', {str(tmp_path)!r})\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    d.close()\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "assert d.path.exists(), 'the child removed it'\n"
        "d.close()\n"
        "assert not d.path.exists()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


@pytest.mark.parametrize("name", ["resolver-venv", "resolver-notes-abcd1234"])
def test_the_directory_of_somebody_else_is_left_alone(tmp_path, name):
    """It has a lock that nobody holds, and a name that begins like ours."""
    theirs = tmp_path / name
    theirs.mkdir()
    (theirs / ".lock").touch()
    (theirs / "precious.txt").write_text("mine")
    Exchange(tmp_path).close()
    assert (theirs / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["ex[1]", "ex*", "ex?x"])
def test_a_directory_that_reads_as_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="TMPDIR"):
        Exchange(tmp_path / name)
    assert names(tmp_path) == []


def test_a_forked_child_removes_nothing_of_its_parent(tmp_path, monkeypatch):
    exchange = Exchange(tmp_path)
    with exchange.task(KEY) as stem:
        named(stem, "file").touch()
        exchange.publish(KEY, ())
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        exchange.release(QUERY)
    assert named(stem, "file").exists()
    exchange.release(QUERY)
    assert not named(stem, "file").exists()
    exchange.close()
