"""LocalCluster: ready when it says so, and nothing left behind, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import resolver
from resolver import DefaultChannelResolver
from resolver.distributed import (
    ClusterStartError,
    LocalCluster,
    SessionStateBuilder,
    WorkerResolver,
)
from resolver.distributed._calls import worker_info
from resolver.distributed._tpch import QUERIES
from tests.support.distributed import eventually, names

REPOSITORY = Path(resolver.__file__).parents[1]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary directory of this process and of its workers."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def alive(pid):
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


def test_workers_are_ready_when_it_has_started(cluster):
    assert isinstance(cluster, WorkerResolver)
    assert len(set(cluster.get_urls())) == len(cluster.processes) == 3
    with DefaultChannelResolver() as resolver:
        pids = [worker_info(resolver, url)["pid"] for url in cluster.get_urls()]
    assert pids == [process.pid for process in cluster.processes]
    assert cluster.get_urls()[0] in repr(cluster)


def test_nothing_is_left_after_it(temporary, register):
    with LocalCluster(workers=2) as cluster:
        session = cluster.session()
        register(session)
        stream = session.sql("SELECT * FROM lineitem WHERE l_quantity < 3").execute_stream()
        next(stream)
        assert names(temporary) != []
    assert [process.returncode for process in cluster.processes] == [0, 0]
    assert names(temporary) == []
    cluster.close()


def test_nothing_is_left_after_an_error(temporary):
    with pytest.raises(ZeroDivisionError), LocalCluster(workers=1) as cluster:
        raise ZeroDivisionError
    assert cluster.processes[0].returncode == 0
    assert names(temporary) == []


def test_nothing_is_left_after_it_was_forgotten(temporary):
    cluster = LocalCluster(workers=1).start()
    process = cluster.processes[0]
    del cluster
    eventually(lambda: process.returncode is not None)
    assert names(temporary) == []


def test_a_killed_and_a_stopped_worker_are_cleaned_up_too(temporary, monkeypatch):
    monkeypatch.setattr("resolver.distributed._cluster._STOP_TIMEOUT", 0.5)
    with LocalCluster(workers=2) as cluster:
        cluster.processes[0].kill()
        os.kill(cluster.processes[1].pid, signal.SIGSTOP)
    assert [process.returncode for process in cluster.processes] == [-signal.SIGKILL] * 2
    assert names(temporary) == []


OWNER = """
import sys, threading
from resolver.distributed import LocalCluster

def main():
    cluster = LocalCluster(workers=2).start()
    session = cluster.session()
    session.register_parquet("lineitem", {table!r})
    stream = session.sql("SELECT * FROM lineitem WHERE l_quantity < 9").execute_stream()
    next(stream)
    {before}
    print(*(process.pid for process in cluster.processes), flush=True)
    threading.Event().wait()

main()
"""


STARTING = """
import threading
from resolver.distributed import LocalCluster

def wait(cluster):
    print(*(process.pid for process in cluster.processes), flush=True)
    threading.Event().wait()

LocalCluster._wait_until_ready = wait
LocalCluster(workers=2).start()
"""


def owner(temporary, tpch, before="pass"):
    return run_owner(temporary, OWNER.format(table=str(tpch / "lineitem"), before=before))


def run_owner(temporary, script):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    assert names(temporary) != []
    return process, pids


def test_nothing_is_left_after_the_owner_was_killed(temporary, tpch):
    process, pids = owner(temporary, tpch)
    process.kill()
    process.communicate()
    eventually(lambda: not any(map(alive, pids)))
    assert names(temporary) == []


def test_nothing_is_left_after_the_owner_was_killed_while_it_started(temporary):
    process, pids = run_owner(temporary, STARTING)
    process.kill()
    process.communicate()
    eventually(lambda: not any(map(alive, pids)))
    assert names(temporary) == []


def test_a_copy_of_the_pipe_in_another_process_does_not_keep_workers_alive(temporary, tpch):
    """A fork of the owner holds the pipes too; the workers see that their parent changed."""
    before = "import os, time; os.fork() or (time.sleep(60), os._exit(0))"
    process, pids = owner(temporary, tpch, before)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (forked,) = {int(pid) for pid in children} - set(pids)
    process.kill()
    process.wait()
    eventually(lambda: not any(map(alive, pids)))
    assert alive(forked), "the copy of the pipe was not open after all"
    os.kill(forked, signal.SIGKILL)
    process.stdout.close()
    eventually(lambda: names(temporary) == [])


def test_ctrl_c_is_the_owners_to_handle(temporary):
    with LocalCluster(workers=1) as cluster, DefaultChannelResolver() as resolver:
        os.kill(cluster.processes[0].pid, signal.SIGINT)
        assert worker_info(resolver, cluster.get_urls()[0])["pid"] == cluster.processes[0].pid


def test_a_forked_child_does_not_stop_the_cluster(temporary):
    script = """
        import os
        from resolver.distributed import LocalCluster
        with LocalCluster(workers=1) as cluster:
            pid = os.fork()
            if pid == 0:
                cluster.close()
                os._exit(0)
            os.waitpid(pid, 0)
            assert cluster.processes[0].poll() is None, "the child stopped it"
    """
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, cwd=REPOSITORY
    )
    assert names(temporary) == []


def test_a_worker_that_fails_to_start_is_told_with_its_stderr(temporary):
    cluster = LocalCluster(workers=2, session_builder="no_such_module:build")
    with pytest.raises(ClusterStartError, match="No module named 'no_such_module'"):
        cluster.start()
    assert all(process.returncode is not None for process in cluster.processes)
    assert names(temporary) == []


def test_a_worker_that_is_not_ready_in_time_is_an_error(temporary, tmp_path):
    (tmp_path / "slow_builder.py").write_text("import sys; sys.stdin.read()\ndef build(q): pass\n")
    cluster = LocalCluster(
        workers=1,
        start_timeout=0.2,
        session_builder="slow_builder:build",
        environment={"PYTHONPATH": str(tmp_path)},
    )
    with pytest.raises(ClusterStartError, match=r"not ready within 0\.2 s"):
        cluster.start()
    assert names(temporary) == []


def test_a_cluster_starts_once_and_needs_a_worker(temporary):
    with pytest.raises(ValueError, match="at least 1"):
        LocalCluster(workers=0)
    cluster = LocalCluster(workers=1)
    with pytest.raises(RuntimeError, match="not been started"):
        cluster.session()
    cluster.close()
    with cluster, pytest.raises(RuntimeError, match="once"):
        cluster.start()


def test_a_custom_resolver_is_registered_on_both_sides(temporary, tmp_path, register):
    (tmp_path / "my_cluster.py").write_text(
        textwrap.dedent(
            """
            from resolver import DefaultChannelResolver

            class MyResolver(DefaultChannelResolver):
                pass

            SHARED = MyResolver()

            def build(query):
                print("more than a pipe holds, which nobody reads" * 10_000)
                return query.builder.with_distributed_channel_resolver(SHARED).build()
            """
        )
    )
    with (
        LocalCluster(
            workers=2,
            session_builder="my_cluster:build",
            environment={"PYTHONPATH": str(tmp_path)},
        ) as cluster,
        DefaultChannelResolver() as mine,
    ):
        builder = SessionStateBuilder().with_options({"datafusion.execution.batch_size": 1_000})
        builder.with_distributed_option("scan_bytes_per_task", 0)
        session = cluster.session(mine, builder=builder)
        register(session)
        assert session.sql(QUERIES[6]).to_arrow_table().num_rows == 1
        assert mine.stats().connects == 2
        for url in cluster.get_urls():
            assert worker_info(mine, url)["resolver"] == "MyResolver"


def test_what_lies_about_in_the_current_directory_is_no_part_of_a_worker(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('this ran in a worker')")
    monkeypatch.chdir(tmp_path)
    with LocalCluster(workers=1) as cluster:
        assert len(cluster.get_urls()) == 1
