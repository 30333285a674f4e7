"""Arrows point down: who may import whom, and what `import resolver` brings along."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import resolver

PACKAGE = Path(resolver.__file__).parent
LAYERS = (  # from the top; a module imports only from layers below its own
    ("resolver.__main__",),
    ("resolver.cli",),
    ("resolver._cli_files", "resolver._cli_signals"),
    ("resolver.distributed",),
    ("resolver.testing",),
    ("resolver.aio",),
    ("resolver",),
    ("resolver.layers",),
    ("resolver._read",),
    ("resolver._endpoints", "resolver._fetch", "resolver._grpc", "resolver._resolver"),
    ("resolver._grpc_client", "resolver._grpc_options"),
    ("resolver._flight", "resolver._flight_calls"),
    ("resolver._handshake",),
    ("resolver._tls",),
    ("resolver._background", "resolver._checks", "resolver._pem"),
    ("resolver._flight_batches",),
    ("resolver._flight_wire", "resolver._retrying"),
    (
        "resolver._backend",
        "resolver._diagnosis",
        "resolver._failures",
        "resolver._fork",
        "resolver._headers",
        "resolver._presets",
        "resolver._single_flight",
    ),
    ("resolver._buffer", "resolver._cache", "resolver._cache_py", "resolver._shared_errors"),
    ("resolver._urls",),
    ("resolver._errors",),
)
SUBPACKAGES = ("resolver.aio", "resolver.distributed", "resolver.layers", "resolver.testing")


def sources() -> dict[str, str]:
    """Python source by module name; the compiled module has none and imports nothing."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text()
    return found


def imported(name: str, source: str, known: set[str], *, typing: bool = True) -> Iterator[str]:
    """Modules of `known` that `source` imports, at whatever depth; `typing` ones only if asked."""
    package = name if name in packages(known) else name.rpartition(".")[0]
    tree = ast.parse(source)
    skipped = set() if typing else {id(node) for node in typing_only(tree)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in known else base for target in submodules]
        else:
            continue
        yield from (target for target in targets if target in known)


def typing_only(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                yield from ast.walk(statement)


def packages(known: set[str]) -> set[str]:
    return {name for name in known if any(other.startswith(f"{name}.") for other in known)}


def layer(name: str) -> int:
    top = next((sub for sub in SUBPACKAGES if name == sub or name.startswith(f"{sub}.")), name)
    for depth, names in enumerate(LAYERS):
        if top in names:
            return depth
    raise AssertionError(f"{name} has no layer; give it one in {Path(__file__).name}")


def upward(modules: dict[str, str]) -> list[str]:
    known = {*modules, "resolver._cache", "resolver.aio._hits"}
    found = []
    for name, source in modules.items():
        for target in imported(name, source, known):
            inside = layer(name) == layer(target) and name.startswith(SUBPACKAGES)
            if not (inside or layer(name) < layer(target)):
                found.append(f"{name} imports {target}")
    return found


def test_no_module_imports_one_above_it():
    assert upward(sources()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("resolver._errors", "from ._urls import parse_worker_url"),
        ("resolver._urls", "from . import _resolver"),
        ("resolver._flight", "import resolver._resolver"),
        ("resolver._background", "def f():\n    from resolver import _flight"),
        ("resolver._resolver", "from resolver.testing import FakeConnector"),
        ("resolver.testing._fake", "from ..distributed import LocalCluster"),
    ],
)
def test_an_arrow_that_points_up_is_found(name, line):
    modules = sources()
    modules[name] += f"\n{line}\n"
    assert len(upward(modules)) == 1


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_a_subpackage_has_no_cycle(package):
    modules = {name: text for name, text in sources().items() if name.startswith(package)}
    known = set(modules) - {package}
    graph = {
        name: set(imported(name, text, known, typing=False)) - {name}
        for name, text in modules.items()
        if name != package
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as cycle:
        pytest.fail(f"modules import one another: {cycle.args[1]}")


def added_by_import(module: str, *, after: str) -> set[str]:
    """Top-level names of what importing `module` loads that `after` has not loaded."""
    code = (
        f"import sys, json, {after}; before = set(sys.modules); import {module}; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_import_resolver_loads_nothing_beyond_pyarrow_and_the_standard_library():
    added = added_by_import("resolver", after="pyarrow.flight")
    added = {name for name in added if not name.startswith("_cython_")}  # Cython's own types
    # Not grpc, which turns the GIL back on; not datafusion, which takes its time.
    assert added - set(sys.stdlib_module_names) == {"resolver"}


def test_import_resolver_does_not_load_its_own_extras():
    code = "import sys, resolver; print([n for n in sys.modules if n.startswith('resolver.')])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    loaded = set(ast.literal_eval(done.stdout))
    assert "resolver._resolver" in loaded
    assert not {name for name in loaded if name.startswith((*SUBPACKAGES, "resolver.cli"))}


def test_import_resolver_starts_no_thread():
    code = "import threading, resolver; print(threading.active_count())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "1"
