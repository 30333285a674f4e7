"""A cluster that does not come up shows what its worker had to say."""

from __future__ import annotations

import textwrap

import pytest

from resolver.distributed import ClusterStartError, LocalCluster


def started(tmp_path, source, **options):
    (tmp_path / "broken_builder.py").write_text(textwrap.dedent(source))
    environment = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    cluster = LocalCluster(
        workers=1, session_builder="broken_builder:build", environment=environment, **options
    )
    with pytest.raises(ClusterStartError) as failed:
        cluster.start()
    assert cluster.processes[0].returncode is not None
    return str(failed.value)


def test_what_a_worker_printed_is_shown(tmp_path):
    message = started(
        tmp_path,
        """
        import sys
        print("reading the blue settings")
        print("the red settings are odd", file=sys.stderr)
        raise RuntimeError("no settings are left")
        """,
    )
    for part in ("worker 0", "reading the blue settings", "the red settings are odd"):
        assert part in message
    assert "no settings are left" in message
    assert "python -m resolver worker" in message


def test_what_a_worker_printed_is_clipped_to_its_end(tmp_path):
    message = started(
        tmp_path,
        """
        import sys
        print("x" * 100_000 + " the end of stdout")
        print("y" * 100_000, file=sys.stderr)
        raise RuntimeError("the end of stderr")
        """,
    )
    assert "the end of stdout" in message
    assert "the end of stderr" in message
    assert len(message) < 20_000


def test_a_worker_that_is_late_shows_what_it_printed_so_far(tmp_path):
    message = started(
        tmp_path,
        """
        import sys
        print("waiting for the lights to go green", file=sys.stderr, flush=True)
        sys.stdin.read()
        """,
        start_timeout=8.0,
    )
    assert "was not ready within 8 s" in message
    assert "waiting for the lights to go green" in message


def test_a_builder_that_is_not_there_is_named(tmp_path):
    assert "build" in started(tmp_path, "other = 1")
