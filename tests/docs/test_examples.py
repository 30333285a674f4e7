"""Every Python block of the README and of docs/ runs, in a folder with TPC-H's lineitem."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


def blocks() -> list[object]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1)) + 1
            found.append(pytest.param(match.group(1), id=f"{page.name}:{line}"))
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    tool = Path(sys.executable).with_name("tpchgen-cli")
    command = [str(tool) if tool.exists() else shutil.which("tpchgen-cli") or "tpchgen-cli"]
    command += ["parquet", "-s", "0.01", "--parts=4", "--tables=lineitem"]
    subprocess.run([*command, f"--output-dir={folder}"], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("source", blocks())
def test_the_example_runs(source: str, folder: Path) -> None:
    # A process of its own: an example may close what is shared, and starts workers.
    script = folder / "example.py"
    script.write_text(f"if __name__ == '__main__':\n{_indented(source)}")
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


def test_there_are_examples() -> None:
    assert len(blocks()) >= 8


def _indented(source: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in source.split("\n"))
