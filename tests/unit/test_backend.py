"""Which implementation is live, and that it never changes in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from resolver import DefaultChannelResolver, _backend
from tests.support.implementations import load

SHOW = (
    "from resolver import _backend; print(_backend.IMPLEMENTATION, _backend.ClientCache.__module__)"
)
WITHOUT_EXTENSION = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "resolver._cache":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""
WITH_BROKEN_EXTENSION = WITHOUT_EXTENSION.replace(
    """raise ModuleNotFoundError(f"No module named {name!r}", name=name)""",
    """raise ImportError("undefined symbol: PyMutex_Lock", name=name)""",
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "RESOLVER_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env | environment,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_the_live_implementation_is_the_one_that_was_asked_for():
    asked = os.environ.get("RESOLVER_BACKEND") or "compiled"
    assert asked == _backend.IMPLEMENTATION, "the extension fell back; build it"
    module = load(_backend.IMPLEMENTATION)
    assert _backend.ClientCache is module.ClientCache
    assert _backend.fast_hits is module.fast_hits
    assert _backend.leak is module.leak
    assert issubclass(DefaultChannelResolver, module.ClientCache)


def test_the_environment_forces_the_twin():
    assert run(SHOW, RESOLVER_BACKEND="python").stdout.split() == ["python", "resolver._cache_py"]


def test_the_extension_comes_first():
    load("compiled")
    for environment in ({}, {"RESOLVER_BACKEND": ""}, {"RESOLVER_BACKEND": "compiled"}):
        assert run(SHOW, **environment).stdout.split() == ["compiled", "resolver._cache"]


def test_without_the_extension_the_twin_takes_over():
    assert run(WITHOUT_EXTENSION + SHOW).stdout.split() == ["python", "resolver._cache_py"]


def test_without_the_extension_asking_for_it_is_an_error():
    result = run(WITHOUT_EXTENSION + SHOW, RESOLVER_BACKEND="compiled")
    assert result.returncode == 1
    assert "ImportError: RESOLVER_BACKEND=compiled, but" in result.stderr


@pytest.mark.parametrize("environment", [{}, {"RESOLVER_BACKEND": "compiled"}])
def test_an_extension_that_does_not_load_is_an_error_in_any_case(environment):
    result = run(WITH_BROKEN_EXTENSION + SHOW, **environment)
    assert result.returncode == 1
    assert "undefined symbol" in result.stderr


def test_an_unknown_choice_is_an_error():
    result = run(SHOW, RESOLVER_BACKEND="rust")
    assert result.returncode == 1
    assert "'rust'" in result.stderr
