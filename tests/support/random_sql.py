"""Random queries over the tables of ``random_tables``, as a hypothesis strategy.

Every query has one right answer, as a multiset of rows: a limit, a frame of rows or an
aggregate that depends on order stands over a total order, nothing is random or depends on
the clock, and what depends on the order of summing floats is only ever shown, never
compared, grouped or sorted by. A query may still fail, by a type that an operator does
not take; few do. Hypothesis makes a failing query small: of all choices the first is the
plainest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from hypothesis import strategies as st

from tests.support.random_tables import SETS, TABLES, VIEWS
from tests.support.random_values import GROUPABLE, SORTABLE, Expressions, Relation, Value

__all__ = ["Query", "queries"]

_MOSTLY_ROWS: Final = (0, 1, 2, 1, 2, 2, 1, len(SETS) - 1)
_JOINS: Final = (
    "JOIN",
    "LEFT JOIN",
    "RIGHT JOIN",
    "FULL JOIN",
    "LEFT SEMI JOIN",
    "LEFT ANTI JOIN",
    "RIGHT SEMI JOIN",
    "RIGHT ANTI JOIN",
)
_GROUPINGS: Final = (*["{}"] * 4, "ROLLUP ({})", "CUBE ({})", "GROUPING SETS (({}), ())")
_COMBINED: Final = ("int", "text", "decimal", "date", "bool", "float", "stamp")
_AGGREGATED: Final = (*_COMBINED, "list", "huge")


@dataclass(frozen=True)
class Query:
    """A query and the table set it is for. ``ordered``: it sorts its rows totally."""

    tables: int
    text: str
    ordered: bool


@dataclass(frozen=True)
class _Select:
    text: str
    columns: tuple[Value, ...]

    def named(self, alias: str) -> tuple[Value, ...]:
        """The columns of this query, called ``alias``."""
        return tuple(replace(column, text=f"{alias}.{column.text}") for column in self.columns)


@st.composite
def queries(draw: st.DrawFn) -> Query:
    """Queries of every kind, each with the number of the table set to run it over."""
    writer = _Writer(draw)
    tables = writer.one(*_MOSTLY_ROWS)
    select = writer.query(2)
    order, ordered = writer.order(select)
    return Query(tables, writer.shared() + select.text + order, ordered)


class _Writer(Expressions):
    """Writes one query. ``depth`` is how much deeper a method may nest queries."""

    def __init__(self, draw: st.DrawFn) -> None:
        super().__init__(draw)
        self._names = 0
        self._with: dict[str, str] = {}
        self._shared: dict[str, _Select] = {}

    def name(self, letter: str) -> str:
        self._names += 1
        return f"{letter}{self._names}"

    # -- WITH --------------------------------------------------------------------------------

    def shared(self) -> str:
        """The WITH clause."""
        if not self._with:
            return ""
        return "WITH RECURSIVE " + ", ".join(f"{n} AS ({q})" for n, q in self._with.items()) + " "

    def share(self, depth: int) -> None:
        """A common table expression, for every FROM from here on to use."""
        if self.rarely(4):
            name, most = self.name("w"), self.number(0, 9)
            select = _Select(
                f"SELECT 1 AS n UNION ALL SELECT n + 1 FROM {name} WHERE n < {most}",
                (Value("n", "int"),),
            )
        else:
            select = self.query(depth - 1)
            name = self.name("w")
        self._with[name] = select.text
        self._shared[name] = select

    # -- queries -----------------------------------------------------------------------------

    def query(self, depth: int, kinds: Sequence[str] = ()) -> _Select:
        """A query without an ORDER BY of its own, of columns of ``kinds`` if these are given."""
        if depth and not kinds and self.rarely(5):
            self.share(depth)
        form = self.number(0, 9)
        if form == 9 and depth:
            return self.combined(depth, kinds)
        if form in (6, 7, 8):
            return self.grouped(depth, kinds)
        if form == 5 and not kinds:
            return self.windowed(depth)
        return self.plain(depth, kinds)

    def items(self, values: Sequence[Value]) -> tuple[str, tuple[Value, ...]]:
        columns = tuple(replace(value, text=self.name("c")) for value in values)
        text = ", ".join(f"{v.text} AS {c.text}" for v, c in zip(values, columns, strict=True))
        return text, columns

    def plain(self, depth: int, kinds: Sequence[str]) -> _Select:
        relation = self.relation(depth)
        wanted = kinds or [self.any_kind(relation) for _ in range(self.number(1, 4))]
        values = [self.shown(relation, kind, depth) for kind in wanted]
        text, columns = self.items(values)
        text = f"{text} FROM {relation.text}{self.where(relation, depth)}"
        if relation.key and self.rarely(5):
            sortable = [column.text for column in relation.of(*SORTABLE)]
            first = [self.one(*sortable)] if self.number(0, 1) else []
            text += self.sorting([*first, *relation.key]) + self.limit()
            return _Select(f"SELECT * FROM (SELECT {text})", columns)
        plain = all(column.exact and column.kind in GROUPABLE for column in columns)
        return _Select(f"SELECT {'DISTINCT ' if plain and self.rarely(5) else ''}{text}", columns)

    def shown(self, relation: Relation, kind: str, depth: int) -> Value:
        """A value of the SELECT list."""
        inexact = [c for c in relation.columns if c.kind == kind and not c.exact]
        if inexact:
            return self.one(*inexact)
        if depth and kind == "int" and self.rarely(10):
            return Value(self.scalar(relation), kind)
        return self.value(relation, kind)

    def grouped(self, depth: int, kinds: Sequence[str]) -> _Select:
        relation = self.relation(depth)
        wanted = kinds or [self.one(*_AGGREGATED) for _ in range(self.number(1, 3))]
        aggregates = [self.aggregate(relation, kind) for kind in wanted]
        keys = [] if kinds else self.group_keys(relation)
        names = ", ".join(key.text for key in keys)
        form = self.one(*_GROUPINGS) if keys else ""
        if form not in ("{}", "") and self.rarely(3):
            aggregates.append(Value(f"grouping({keys[0].text})", "int"))
        text, columns = self.items([*keys, *aggregates])
        text = f"SELECT {text} FROM {relation.text}{self.where(relation, depth)}"
        if keys:
            text += " GROUP BY " + form.format(names)
        if self.rarely(4):
            text += f" HAVING {self.one('count(*) > 1', 'min(1) = 1', 'count(*) < 0')}"
        return _Select(text, columns)

    def group_keys(self, relation: Relation) -> list[Value]:
        columns = relation.of(*GROUPABLE)
        keys = [self.one(*columns) for _ in range(self.number(0, 3)) if columns]
        if keys and self.rarely(6):
            key = self.value(relation, self.one("int", "text", "bool"))
            if any(column.text in key.text for column in relation.columns):
                keys[0] = key
        return list({key.text: key for key in keys}.values())

    def windowed(self, depth: int) -> _Select:
        relation = self.relation(depth)
        kept = [self.value(relation, self.any_kind(relation)) for _ in range(self.number(0, 2))]
        made = [self.window(relation) for _ in range(self.number(1, 2))]
        text, columns = self.items([*kept, *made])
        return _Select(f"SELECT {text} FROM {relation.text}{self.where(relation, depth)}", columns)

    def combined(self, depth: int, kinds: Sequence[str]) -> _Select:
        wanted = kinds or [self.one(*_COMBINED) for _ in range(self.number(1, 3))]
        parts = [self.query(depth - 1, wanted) for _ in range(self.number(2, 3))]
        exact = [
            all(column.exact for column in columns)
            for columns in zip(*[p.columns for p in parts], strict=True)
        ]
        word = self.one("UNION ALL", "UNION", "INTERSECT", "EXCEPT") if all(exact) else "UNION ALL"
        text = f" {word} ".join(f"({part.text})" for part in parts)
        columns = [replace(c, exact=e) for c, e in zip(parts[0].columns, exact, strict=True)]
        return _Select(f"SELECT * FROM ({text})", tuple(columns))

    # -- FROM --------------------------------------------------------------------------------

    def relation(self, depth: int) -> Relation:
        relation = self.leaf(depth)
        for _ in range(self.one(0, 0, 1, 1, 2) if depth else self.one(0, 0, 1)):
            relation = self.join(relation, self.leaf(depth))
        return self.unnested(relation) if self.rarely(12) else relation

    def leaf(self, depth: int) -> Relation:
        alias = self.name("t")
        form = self.number(0, 11)
        if self._shared and form in (5, 6, 7, 8):
            name = self.one(*self._shared)
            return Relation(f"{name} AS {alias}", self._shared[name].named(alias))
        if depth and form == 9:
            select = self.query(depth - 1)
            return Relation(f"({select.text}) AS {alias}", select.named(alias))
        if form == 10:
            view = self.one(*VIEWS)
            columns = tuple(Value(f"{alias}.{name}", kind) for name, kind in view.kinds)
            return Relation(f"{view.name} AS {alias}", columns)
        if form == 11:
            empty = Relation("", ())
            rows = [
                f"({self.value(empty, 'int').text}, {self.value(empty, 'text').text})"
                for _ in range(self.number(1, 3))
            ]
            columns = (Value(f"{alias}.k", "int"), Value(f"{alias}.s", "text"))
            return Relation(f"(VALUES {', '.join(rows)}) AS {alias}(k, s)", columns)
        table = self.one(*TABLES[:4], *TABLES)
        columns = tuple(Value(f"{alias}.{c.name}", c.kind) for c in table.columns)
        return Relation(f"{table.name} AS {alias}", columns, (f"{alias}.id",))

    def join(self, left: Relation, right: Relation) -> Relation:
        key = left.key + right.key if left.key and right.key else ()
        both = Relation("", left.columns + right.columns, key)
        if self.rarely(12):
            return replace(both, text=f"{left.text} CROSS JOIN {right.text}")
        word = self.one(*_JOINS)
        text = f"{left.text} {word} {right.text} {self.on(left, right, both)}"
        if word.startswith(("LEFT SEMI", "LEFT ANTI")):
            return replace(left, text=text)
        if word.startswith(("RIGHT SEMI", "RIGHT ANTI")):
            return replace(right, text=text)
        return replace(both, text=text)

    def on(self, left: Relation, right: Relation, both: Relation) -> str:
        keys = [[c.text for c in side.of("int") if c.text.endswith(".k")] for side in (left, right)]
        if all(len(key) == 1 for key in keys) and self.rarely(8):
            return "USING (k)"
        conditions = [self.link(left, right, "=") for _ in range(self.one(1, 1, 2))]
        if self.rarely(4):
            conditions[0] = self.link(left, right, self.one("<", ">=", "<>"))
        if self.rarely(6):
            conditions.append(self.condition(both))
        return "ON " + " AND ".join(conditions)

    def unnested(self, relation: Relation) -> Relation:
        lists = relation.of("list")
        if not lists:
            return relation
        alias, element = self.name("u"), Value(self.name("c"), "int")
        text, columns = self.items(relation.of("int", "text")[:3])
        text = ", ".join(filter(None, [text, f"unnest({self.one(*lists).text}) AS {element.text}"]))
        select = _Select(f"SELECT {text} FROM {relation.text}", (*columns, element))
        return Relation(f"({select.text}) AS {alias}", select.named(alias))

    # -- WHERE -------------------------------------------------------------------------------

    def where(self, relation: Relation, depth: int) -> str:
        if not self.number(0, 1):
            return ""
        if depth and self.rarely(3):
            subquery = self.subquery(relation)
            return f" WHERE {subquery}" + self.one("", "", f" OR {self.condition(relation)}")
        return f" WHERE {self.condition(relation)}"

    def subquery(self, relation: Relation) -> str:
        """A condition on ``relation`` that other rows decide."""
        no = self.one("", "NOT ")
        form = self.number(0, 2)
        if form == 0:
            inner = self.leaf(0)
            link = self.link(relation, inner, self.one("=", "=", "<"))
            more = f" AND {self.condition(inner)}" if self.rarely(3) else ""
            return f"{no}EXISTS (SELECT 1 FROM {inner.text} WHERE {link}{more})"
        if form == 1:
            inner = self.leaf(0)
            where = self.where(inner, 0)
            column = self.value(inner, "int").text
            return f"{self.value(relation, 'int').text} {no}IN (SELECT {column} FROM {inner.text}{where})"
        return f"{self.value(relation, 'int').text} >= {self.scalar(relation)}"

    def scalar(self, relation: Relation) -> str:
        """A subquery that gives one int, perhaps another for each row of ``relation``."""
        inner = self.leaf(0)
        # Of a scalar subquery DataFusion takes no other link than "=".
        where = f" WHERE {self.link(relation, inner, '=')}" if self.number(0, 1) else ""
        aggregate = self.one("max({})", "min({})", "count({})", "sum({})")
        column = self.one(*inner.of("int"), Value("1", "int")).text
        return f"(SELECT {aggregate.format(column)} FROM {inner.text}{where})"

    # -- ORDER BY and LIMIT ------------------------------------------------------------------

    def order(self, select: _Select) -> tuple[str, bool]:
        if not all(column.exact and column.kind in SORTABLE for column in select.columns):
            return "", False
        if not self.rarely(2):
            return "", False
        names = self.shuffled([column.text for column in select.columns])
        return self.sorting(names) + self.limit(), True

    def sorting(self, names: Sequence[str]) -> str:
        way = self.one("", " DESC", " NULLS FIRST", " DESC NULLS LAST")
        return " ORDER BY " + ", ".join(name + way for name in names)

    def limit(self) -> str:
        return self.one("", " LIMIT 3", " LIMIT 10 OFFSET 2", " LIMIT 100", " LIMIT 0", " OFFSET 4")
