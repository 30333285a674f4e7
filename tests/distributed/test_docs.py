"""Every Python block of the page runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import resolver

PAGE = Path(resolver.__file__).parents[1] / "docs" / "distributed.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_page_runs(block, tpch, monkeypatch, capfd):
    monkeypatch.chdir(tpch)
    exec(compile(block, PAGE.name, "exec"), {"__name__": "page"})
    out = capfd.readouterr().out
    assert "RAIL" in out or "'tax': Decimal" in out


def test_the_trees_of_the_page_are_real(planning):
    from resolver.distributed import DistributedPhysicalOptimizerRule

    urls = re.findall(r"t\d @ (http://[\d.:]+)", PAGE.read_text())
    query = "SELECT l_shipmode, count(*) AS n FROM lineitem GROUP BY l_shipmode"
    plan = DistributedPhysicalOptimizerRule().distribute(
        planning.sql(query).execution_plan(), planning, urls
    )
    assert f"```\n{plan}\n```" in PAGE.read_text()
