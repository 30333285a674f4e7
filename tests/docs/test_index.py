"""The index of docs/ names every page, every program and every file to deploy with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
DOCS = TOP / "docs"
INDEX = DOCS / "README.md"
_LINK = re.compile(r"\]\((?!https?://)([^)#]+)?(?:#([^)]*))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

PAGES = sorted(DOCS.glob("*.md"))
SHOWN = [
    *(page for page in PAGES if page != INDEX),
    *sorted((TOP / "examples").glob("*.py")),
    *sorted((DOCS / "deploy").iterdir()),
]


def links(page: Path) -> list[tuple[Path, str]]:
    """The files, and places in them, that a page links to."""
    return [
        ((page.parent / file).resolve() if file else page, anchor)
        for file, anchor in _LINK.findall(page.read_text())
    ]


def anchors(page: Path) -> set[str]:
    """What a link into a page may end with, as GitHub makes it from headings."""
    text = _CODE.sub("", page.read_text())
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in _HEADING.findall(text)
    }


def test_the_readme_leads_to_the_index():
    assert INDEX in [target for target, _ in links(TOP / "README.md")]


@pytest.mark.parametrize("shown", SHOWN, ids=lambda path: path.name)
def test_the_index_names(shown):
    assert shown in [target for target, _ in links(INDEX)]


@pytest.mark.parametrize("page", [TOP / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_into_a_page_find_their_place(page):
    for target, anchor in links(page):
        assert target.exists(), f"{page.name} links to {target.name}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_one_title(page):
    text = _CODE.sub("", page.read_text())
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
