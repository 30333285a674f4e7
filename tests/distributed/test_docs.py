"""The trees that the page shows are those that are printed."""

from __future__ import annotations

import re
from pathlib import Path

import resolver
from resolver.distributed import DistributedPhysicalOptimizerRule

PAGE = Path(resolver.__file__).parents[1] / "docs" / "distributed.md"


def test_the_trees_of_the_page_are_real(planning):
    urls = re.findall(r"t\d @ (http://[\d.:]+)", PAGE.read_text())
    query = "SELECT l_shipmode, count(*) AS n FROM lineitem GROUP BY l_shipmode"
    plan = DistributedPhysicalOptimizerRule().distribute(
        planning.sql(query).execution_plan(), planning, urls
    )
    assert f"```\n{plan}\n```" in PAGE.read_text()
