"""What the pages tell a reader to type: every command is accepted, and queries are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from resolver.cli import _parser

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted((TOP / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def typed() -> list[tuple[str, list[str]]]:
    """Each command of the blocks that show any, in words, with the page that it is on."""
    found = []
    for page in PAGES:
        for language, block in _BLOCK.findall(page.read_text()):
            if language not in ("", "console"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                command = line.removeprefix("$ ")
                if command.startswith(("python ", "pip ", "make ")):
                    found.append((page.name, shlex.split(command, comments=True)))
    return found


def of(*start: str) -> list[object]:
    return [
        pytest.param(words, id=f"{page}: {' '.join(words[:4])}")
        for page, words in typed()
        if tuple(words[: len(start)]) == start
    ]


@pytest.mark.parametrize("words", of("python", "-m", "resolver"))
def test_the_command_line_accepts(words):
    if words[-1] == "--help":
        with pytest.raises(SystemExit, match="0"):
            _parser().parse_args(words[3:])
    else:
        assert callable(_parser().parse_args(words[3:]).command)


@pytest.mark.parametrize("words", of("python", "-m", "resolver", "sql"))
def test_the_query_runs(words, tmp_path):
    tool = Path(sys.executable).with_name("tpchgen-cli")
    make = [str(tool) if tool.exists() else shutil.which("tpchgen-cli") or "tpchgen-cli"]
    make += ["parquet", "-s", "0.01", "--parts=2", "--tables=lineitem"]
    subprocess.run([*make, f"--output-dir={tmp_path}"], check=True, capture_output=True)
    finished = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert finished.returncode == 0, finished.stderr
    assert "7 rows in" in finished.stdout, "TPC-H has seven ways of shipping"


@pytest.mark.parametrize("words", of("pip", "install"))
def test_there_is_such_an_extra(words):
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"[\w-]+", (words[2].partition("[")[2]))
    assert set(extras) <= set(project["optional-dependencies"])
    assert words[2].startswith("."), "it is installed from a checkout"


def test_every_target_of_make_that_a_page_names_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for _, words in typed() if words[0] == "make"}
    for page in PAGES:
        named |= set(re.findall(r"`make ([a-z-]+)", _CODE.sub("", page.read_text())))
    assert named
    assert named <= targets


def test_commands_are_found():
    assert len(of("python", "-m", "resolver", "sql")) == 2
    assert of("python", "-m", "resolver", "worker")
    assert of("pip", "install")
