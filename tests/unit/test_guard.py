"""The guard of the hit's speed: what it lets pass, and what it does not."""

from __future__ import annotations

import json

import pytest

from benchmarks import guard


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Sets what is counted and what is committed; returns the baseline's path."""
    path = tmp_path / "baseline.json"
    monkeypatch.setattr(guard, "BASELINE", path)

    def set_counts(
        *, resolver: float, dict_get: float, ratio: float | None = None, awaited: float = 500
    ):
        counts = {"resolver": resolver, "dict.get": dict_get}
        counts |= {"awaited resolver": awaited, "awaited coroutine": 1_000}
        monkeypatch.setattr(guard, "instructions_per_lookup", lambda: counts)
        if ratio is not None:
            entry = {"ratio": ratio, "awaited ratio": 0.5}
            path.write_text(json.dumps({guard.key(): entry}))
        return path

    return set_counts


def test_growth_within_the_tolerance_passes(counted, capsys):
    counted(resolver=312, dict_get=300, ratio=1.0)
    assert guard.main([]) == 0
    assert "resolver 312, dict.get 300; ratio 1.040" in capsys.readouterr().out


def test_growth_beyond_the_tolerance_fails(counted, capsys):
    counted(resolver=318, dict_get=300, ratio=1.0)
    assert guard.main([]) == 1
    assert "MORE THAN 1.050" in capsys.readouterr().out


def test_growth_of_the_awaited_hit_alone_fails(counted, capsys):
    counted(resolver=300, dict_get=300, ratio=1.0, awaited=526)
    assert guard.main([]) == 1
    said = capsys.readouterr().out
    assert "ratio: within 1.050" in said
    assert "awaited ratio: MORE THAN 0.525" in said


def test_a_baseline_of_one_of_the_two_is_no_success(counted, capsys):
    path = counted(resolver=300, dict_get=300)
    path.write_text(json.dumps({guard.key(): {"ratio": 1.0}}))
    assert guard.main([]) == 2


def test_a_missing_baseline_is_no_success(counted, capsys):
    counted(resolver=1, dict_get=300)
    assert guard.main([]) == 2
    assert "nothing was compared" in capsys.readouterr().err


def test_another_interpreters_baseline_is_not_used(counted, capsys):
    path = counted(resolver=300, dict_get=300)
    path.write_text(json.dumps({"cpython-2.7-x86_64-compiled": {"ratio": 9.0}}))
    assert guard.main([]) == 2
    assert guard.key() in capsys.readouterr().err


def test_update_keeps_the_entries_of_others(counted):
    path = counted(resolver=330, dict_get=300)
    path.write_text(json.dumps({"other": {"ratio": 9.0}}))
    assert guard.main(["--update"]) == 0
    entries = json.loads(path.read_text())
    assert entries["other"] == {"ratio": 9.0}
    assert entries[guard.key()]["ratio"] == 1.1
    counted(resolver=330, dict_get=300)
    assert guard.main([]) == 0


def test_without_valgrind_it_says_so_and_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(guard.shutil, "which", lambda _name: None)
    assert guard.main([]) == 2
    assert "valgrind is not installed" in capsys.readouterr().err


def test_the_committed_baseline_names_this_scheme_of_keys():
    entries = guard.read_baseline()
    assert entries, "no baseline is committed"
    for name, entry in entries.items():
        assert name.endswith(("-compiled", "-python"))
        for ratio, (ours, theirs) in guard.RATIOS.items():
            assert entry[ratio] == pytest.approx(entry[ours] / entry[theirs], abs=1e-3)
