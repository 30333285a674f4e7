"""Random queries over the tables of ``random_tables``, as a hypothesis strategy.

Every query has one right answer, as a multiset of rows: a limit, a frame of rows or an
aggregate that depends on order stands over a total order, nothing is random or depends on
the clock, and what depends on the order of summing floats is only ever shown, never
compared, grouped or sorted by. A query may still fail, by a type that an operator does
not take; few do. Hypothesis makes a failing query small: of all choices the first is the
plainest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from hypothesis import strategies as st

from tests.support.random_tables import SETS, TABLES, VIEWS

__all__ = ["Query", "queries"]

_LITERALS: Final[dict[str, tuple[str, ...]]] = {
    "int": ("1", "0", "2", "3", "7", "-1", "100", "CAST(NULL AS INT)"),
    "unsigned": ("arrow_cast(1, 'UInt8')", "arrow_cast(200, 'UInt32')"),
    "huge": ("arrow_cast(1, 'UInt64')", "arrow_cast(9223372036854775808, 'UInt64')"),
    "float": ("0.5", "CAST(0 AS DOUBLE)", "-1.5e0", "CAST('NaN' AS DOUBLE)"),
    "decimal": ("CAST(1.5 AS DECIMAL(9, 2))", "CAST(0 AS DECIMAL(9, 2))"),
    "bool": ("TRUE", "FALSE", "CAST(NULL AS BOOLEAN)"),
    "text": ("'a'", "'b'", "''", "'A%'", "'äß'", "CAST(NULL AS VARCHAR)"),
    "fixed": ("arrow_cast(X'6162', 'FixedSizeBinary(2)')",),
    "bytes": ("X'6162'", "X''"),
    "date": ("DATE '2024-02-29'", "DATE '1999-01-01'"),
    "time": ("TIME '12:30:00'", "TIME '00:00:00'"),
    "clock": ("arrow_cast('12:30:00', 'Time32(Millisecond)')",),
    "stamp": ("TIMESTAMP '2024-02-28T13:30:00'", "TIMESTAMP '1999-01-01T00:00:00'"),
    "zoned": ("arrow_cast('2024-02-28T13:30:00Z', 'Timestamp(Microsecond, Some(\"UTC\"))')",),
    "span": ("arrow_cast(3600000000, 'Duration(Microsecond)')",),
    "list": ("[1]", "[1, 2, NULL]"),
    "struct": ("named_struct('a', 1, 'b', 'x')",),
    "map": ("map(['a'], [1])",),
}
_SORTABLE: Final = tuple(kind for kind in _LITERALS if kind not in ("list", "struct", "map"))
_GROUPABLE: Final = tuple(kind for kind in _LITERALS if kind != "map")
_NO_RANGE: Final = ("clock", "fixed")  # DataFusion has no default frame over these
_COMPARISONS: Final = ("=", "<", "<>", ">=", "IS DISTINCT FROM", "IS NOT DISTINCT FROM")
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
_MOSTLY_ROWS: Final = (0, 1, 2, 1, 2, 2, 1, len(SETS) - 1)
_FRAMES: Final = (
    "ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW",
    "ROWS BETWEEN 2 PRECEDING AND 1 FOLLOWING",
    "ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING",
    "ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING",
)


@dataclass(frozen=True)
class Value:
    """An expression. One that is not ``exact`` may differ in its last bits from run to run."""

    text: str
    kind: str
    exact: bool = True


@dataclass(frozen=True)
class Relation:
    """What stands in FROM. ``key``: columns that no two rows share, or none known."""

    text: str
    columns: tuple[Value, ...]
    key: tuple[str, ...] = ()


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

    @property
    def sortable(self) -> bool:
        return all(column.exact and column.kind in _SORTABLE for column in self.columns)


@st.composite
def queries(draw: st.DrawFn) -> Query:
    """Queries of every kind, each with the number of the table set to run it over."""
    tables = draw(_sampled(_MOSTLY_ROWS))
    writer = _Writer(draw)
    select = writer.query(2)
    order, ordered = writer.order(select)
    return Query(tables, writer.ctes() + select.text + order, ordered)


@functools.cache
def _sampled(choices: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    return st.sampled_from(choices)


@functools.cache
def _integers(least: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(least, most)


class _Writer:
    """Writes one query. ``depth`` is how much deeper a method may nest."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._names = 0
        self._ctes: list[str] = []
        self._recursive = False
        self._shared: list[tuple[str, tuple[tuple[str, str, bool], ...]]] = []

    # -- choices -------------------------------------------------------------------------

    def one(self, *choices: Any) -> Any:
        return self._draw(_sampled(choices))

    def number(self, least: int, most: int) -> int:
        return self._draw(_integers(least, most))

    def rarely(self, one_in: int) -> bool:
        return self.number(1, one_in) == one_in

    def name(self, letter: str) -> str:
        self._names += 1
        return f"{letter}{self._names}"

    def ctes(self) -> str:
        if not self._ctes:
            return ""
        return ("WITH RECURSIVE " if self._recursive else "WITH ") + ", ".join(self._ctes) + " "

    # -- queries -------------------------------------------------------------------------

    def query(self, depth: int, kinds: Sequence[str] | None = None) -> _Select:
        """A query without an ORDER BY of its own, of columns of ``kinds`` if these are given."""
        if depth and kinds is None and self.rarely(5):
            self.share(depth)
        form = self.number(0, 9)
        if depth and form == 9:
            return self.set_operation(depth, kinds)
        if form in (6, 7, 8):
            return self.grouped(depth, kinds)
        if form == 5 and kinds is None:
            return self.windowed(depth)
        return self.plain(depth, kinds)

    def share(self, depth: int) -> None:
        """A common table expression, to be used any number of times."""
        name = self.name("w")
        if self.rarely(4):
            self._recursive = True
            most = self.number(0, 9)
            self._ctes.append(
                f"{name}(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM {name} WHERE n < {most})"
            )
            self._shared.append((name, (("n", "int", True),)))
            return
        select = self.query(depth - 1)
        self._ctes.append(f"{name} AS ({select.text})")
        columns = tuple((c.text, c.kind, c.exact) for c in select.columns)
        self._shared.append((name, columns))

    def items(self, values: Sequence[Value]) -> tuple[str, tuple[Value, ...]]:
        columns = tuple(replace(value, text=self.name("c")) for value in values)
        text = ", ".join(f"{v.text} AS {c.text}" for v, c in zip(values, columns, strict=True))
        return text, columns

    def plain(self, depth: int, kinds: Sequence[str] | None) -> _Select:
        relation = self.relation(depth)
        if kinds is None:
            count = self.number(1, 4)
            values = [self.value(relation, depth, self.any_kind(relation)) for _ in range(count)]
        else:
            values = [self.value(relation, depth, kind) for kind in kinds]
        text, columns = self.items(values)
        where = self.where(relation, depth)
        select = _Select("", columns)
        distinct = ""
        if all(c.exact and c.kind in _GROUPABLE for c in columns) and self.rarely(5):
            distinct = "DISTINCT "
        text = f"SELECT {distinct}{text} FROM {relation.text}{where}"
        if not distinct and relation.key and self.rarely(5):
            text += self.sorting(relation, relation.key) + self.limit()
            return replace(select, text=f"SELECT * FROM ({text})")
        return replace(select, text=text)

    def grouped(self, depth: int, kinds: Sequence[str] | None) -> _Select:
        relation = self.relation(depth)
        wanted = kinds or [
            self.one("int", "decimal", "text", "float", "bool", "date", "list", "stamp", "huge")
            for _ in range(self.number(1, 3))
        ]
        aggregates = [self.aggregate(relation, depth, kind) for kind in wanted]
        keys = [] if kinds else self.group_keys(relation, depth)
        text, columns = self.items([*keys, *aggregates])
        text = f"SELECT {text} FROM {relation.text}{self.where(relation, depth)}"
        if keys:
            names = ", ".join(key.text for key in keys)
            form = self.one(
                "{}", "{}", "{}", "ROLLUP ({})", "CUBE ({})", "GROUPING SETS (({}), ())"
            )
            text += " GROUP BY " + form.format(names)
        if self.rarely(4):
            text += f" HAVING {self.one('count(*) > 1', 'min(1) = 1', 'count(*) < 0')}"
        return _Select(text, columns)

    def group_keys(self, relation: Relation, depth: int) -> list[Value]:
        columns = [c for c in relation.columns if c.exact and c.kind in _GROUPABLE]
        keys: dict[str, Value] = {}
        for _ in range(self.number(0, 3)):
            if not columns:
                break
            key = self.one(*columns)
            if self.rarely(6):
                key = self.value(relation, 0, self.one("int", "text", "bool"))
                if not key.exact or not any(c.text in key.text for c in columns):
                    continue
            keys[key.text] = key
        return list(keys.values())

    def windowed(self, depth: int) -> _Select:
        relation = self.relation(depth)
        kept = [self.value(relation, 0, self.any_kind(relation)) for _ in range(self.number(0, 2))]
        count = self.number(1, 2)
        text, columns = self.items([*kept, *(self.window(relation) for _ in range(count))])
        return _Select(f"SELECT {text} FROM {relation.text}{self.where(relation, depth)}", columns)

    def set_operation(self, depth: int, kinds: Sequence[str] | None) -> _Select:
        wanted = kinds or [
            self.one("int", "text", "decimal", "date", "bool", "float", "stamp")
            for _ in range(self.number(1, 3))
        ]
        parts = [self.query(depth - 1, wanted) for _ in range(self.number(2, 3))]
        exact = all(column.exact for part in parts for column in part.columns)
        word = "UNION ALL"
        if exact:
            word = self.one("UNION ALL", "UNION", "INTERSECT", "EXCEPT", "UNION ALL")
        text = f" {word} ".join(f"({part.text})" for part in parts)
        columns = tuple(Value(first.text, first.kind, exact) for first in parts[0].columns)
        # The branches' columns meet under the names of the first.
        return _Select(f"SELECT * FROM ({text})", columns)

    # -- FROM and WHERE ------------------------------------------------------------------

    def relation(self, depth: int) -> Relation:
        relation = self.leaf(depth)
        for _ in range(self.one(0, 0, 1, 1, 2) if depth else self.one(0, 0, 1)):
            relation = self.join(relation, self.leaf(depth))
        if self.rarely(12):
            relation = self.unnested(relation)
        return relation

    def leaf(self, depth: int) -> Relation:
        alias = self.name("t")
        form = self.number(0, 11)
        if self._shared and form in (8, 9, 10):
            name, shared = self.one(*self._shared)
            columns = tuple(Value(f"{alias}.{n}", kind, exact) for n, kind, exact in shared)
            return Relation(f"{name} AS {alias}", columns)
        if depth and form == 9:
            select = self.query(depth - 1)
            columns = tuple(replace(c, text=f"{alias}.{c.text}") for c in select.columns)
            return Relation(f"({select.text}) AS {alias}", columns)
        if form == 10:
            view = self.one(*VIEWS)
            columns = tuple(Value(f"{alias}.{name}", kind) for name, kind in view.kinds)
            return Relation(f"{view.name} AS {alias}", columns)
        if form == 11:
            ints, texts = self.literals("int"), self.literals("text")
            rows = ", ".join(
                f"({self.one(*ints).text}, {self.one(*texts).text})"
                for _ in range(self.number(1, 3))
            )
            columns = (Value(f"{alias}.k", "int"), Value(f"{alias}.s", "text"))
            return Relation(f"(VALUES {rows}) AS {alias}(k, s)", columns)
        table = self.one(*TABLES)
        columns = tuple(Value(f"{alias}.{c.name}", c.kind) for c in table.columns)
        return Relation(f"{table.name} AS {alias}", columns, (f"{alias}.id",))

    def join(self, left: Relation, right: Relation) -> Relation:
        both = Relation(
            "", left.columns + right.columns, (left.key + right.key) * bool(left.key and right.key)
        )
        if self.rarely(12):
            return replace(both, text=f"{left.text} CROSS JOIN {right.text}")
        conditions = [self.pair(left, right, "=") for _ in range(self.one(1, 1, 2))]
        if self.rarely(4):
            unequal = self.pair(left, right, self.one("<", ">=", "<>"))
            conditions = [*conditions[1:], unequal]
        if self.rarely(6):
            conditions.append(self.predicate(both, 0))
        word = self.one(*_JOINS)
        joined = replace(
            both, text=f"{left.text} {word} {right.text} ON {' AND '.join(conditions)}"
        )
        if word.startswith("LEFT ") and "JOIN" not in word[4:9]:
            return replace(left, text=joined.text)
        if word.startswith("RIGHT ") and "JOIN" not in word[5:10]:
            return replace(right, text=joined.text)
        return joined

    def pair(self, left: Relation, right: Relation, operator: str) -> str:
        """A comparison of a column of each side, most often of the columns called k."""
        kinds = {c.kind for c in left.columns if c.exact} & {
            c.kind for c in right.columns if c.exact
        }
        usable = sorted(kinds & set(_SORTABLE))
        if not usable:
            return "TRUE"
        kind = "int" if "int" in usable and not self.rarely(4) else self.one(*usable)
        sides = []
        for relation in (left, right):
            columns = [c.text for c in relation.columns if c.kind == kind and c.exact]
            keys = [text for text in columns if text.endswith(".k")]
            sides.append(keys[0] if keys and not self.rarely(3) else self.one(*columns))
        return f"{sides[0]} {operator} {sides[1]}"

    def unnested(self, relation: Relation) -> Relation:
        lists = [c.text for c in relation.columns if c.kind == "list" and c.exact]
        if not lists:
            return relation
        alias = self.name("u")
        rest = [c for c in relation.columns if c.kind in ("int", "text")][:3]
        text, columns = self.items(rest)
        column = self.name("c")
        text = ", ".join([*([text] if text else []), f"unnest({self.one(*lists)}) AS {column}"])
        return Relation(
            f"(SELECT {text} FROM {relation.text}) AS {alias}",
            tuple(replace(c, text=f"{alias}.{c.text}") for c in (*columns, Value(column, "int"))),
        )

    def where(self, relation: Relation, depth: int) -> str:
        return f" WHERE {self.predicate(relation, depth)}" if self.number(0, 1) else ""

    def predicate(self, relation: Relation, depth: int) -> str:
        """True, false or NULL for a row of ``relation``."""
        form = self.number(0, 9)
        if form == 0:
            return self.comparison(relation)
        if form == 1:
            negated = self.one("", "NOT ")
            return f"{self.column(relation).text} IS {negated}NULL"
        if form == 2:
            both = self.one("AND", "OR")
            return f"(({self.comparison(relation)}) {both} ({self.comparison(relation)}))"
        if form == 3:
            return f"NOT ({self.comparison(relation)})"
        if form == 4:
            text = self.value(relation, 0, "text").text
            pattern = self.one("a%", "%b%", "_", "")
            return f"{text} {self.one('', 'NOT ')}LIKE '{pattern}'"
        if form == 5:
            value = self.value(relation, 0, "int").text
            return f"{value} {self.one('', 'NOT ')}IN ({self.one('1, 2', '3, NULL', '1, 2, 5, 7')})"
        if form == 6:
            value = self.value(relation, 0, "int").text
            return f"{value} {self.one('', 'NOT ')}BETWEEN {self.one('0 AND 3', '2 AND 100')}"
        if form == 7 or not depth:
            return self.value(relation, 0, "bool").text
        return self.subquery(relation)

    def comparison(self, relation: Relation) -> str:
        kind = self.any_kind(relation, _SORTABLE)
        left, right = (self.value(relation, 0, kind).text for _ in range(2))
        return f"{left} {self.one(*_COMPARISONS)} {right}"

    def subquery(self, relation: Relation) -> str:
        inner = self.leaf(0)
        form = self.number(0, 5)
        # Of a scalar subquery DataFusion takes no other link.
        linked = self.pair(relation, inner, "=" if form > 1 else self.one("=", "=", "<"))
        if self.rarely(3):
            linked += f" AND {self.predicate(inner, 0)}"
        ints = [c.text for c in inner.columns if c.kind == "int" and c.exact]
        outer = self.value(relation, 0, "int")
        if form < 2 or not ints or not outer.exact:
            return f"{self.one('', 'NOT ')}EXISTS (SELECT 1 FROM {inner.text} WHERE {linked})"
        column = self.one(*ints)
        if form < 4:
            where = f" WHERE {self.predicate(inner, 0)}" if self.number(0, 1) else ""
            negated = self.one("", "NOT ")
            return f"{outer.text} {negated}IN (SELECT {column} FROM {inner.text}{where})"
        where = f" WHERE {linked}" if form == 4 else ""
        return (
            f"{outer.text} >= (SELECT {self.one('min', 'max')}({column}) FROM {inner.text}{where})"
        )

    # -- expressions ---------------------------------------------------------------------

    def any_kind(self, relation: Relation, among: Sequence[str] = tuple(_LITERALS)) -> str:
        kinds = dict.fromkeys(c.kind for c in relation.columns if c.kind in among)
        return self.one(*kinds) if kinds else "int"

    def column(self, relation: Relation) -> Value:
        return self.one(*relation.columns)

    def value(self, relation: Relation, depth: int, kind: str) -> Value:
        """An exact expression of ``kind``, or a column of it that is only to be shown."""
        columns = [c for c in relation.columns if c.kind == kind and c.exact]
        form = self.number(0, 6)
        if columns and form < 4:
            return self.one(*columns)
        if form == 4 and columns and (made := self.made(relation, columns, kind)):
            return Value(made, kind)
        if form == 5 and columns:
            first, second = self.one(*columns).text, self.one(*columns, *self.literals(kind)).text
            return Value(
                self.one(
                    f"coalesce({first}, {second})",
                    f"CASE WHEN {self.predicate(relation, 0)} THEN {first} ELSE {second} END",
                    f"CASE WHEN {self.predicate(relation, 0)} THEN {first} END",
                ),
                kind,
            )
        return self.one(*self.literals(kind))

    def literals(self, kind: str) -> tuple[Value, ...]:
        return tuple(Value(text, kind) for text in _LITERALS[kind])

    def made(self, relation: Relation, columns: Sequence[Value], kind: str) -> str:
        """An expression of ``kind`` by the operators of its own; empty for a kind without."""
        first, second = self.one(*columns).text, self.one(*columns).text
        match kind:
            case "int":
                texts = [c.text for c in relation.columns if c.kind == "text"]
                forms = [f"{first} + 1", f"{first} % 7", f"CAST({first} AS BIGINT) - {second}"]
                forms += [f"nullif({first}, 1)", f"greatest({first}, {second})"]
                forms += [f"length({text})" for text in texts[:1]]
                return self.one(*forms)
            case "decimal":
                return self.one(f"{first} + 1", f"-({first})", f"nullif({first}, 1.5)")
            case "float":
                return self.one(f"-({first})", f"{first} * 2", f"abs({first})")
            case "text":
                return self.one(f"upper({first})", f"{first} || '!'", f"substr({first}, 1, 1)")
            case "bool":
                return self.one(f"NOT {first}", f"{first} IS NOT TRUE", f"({first} AND {second})")
            case "date":
                return self.one(
                    f"{first} + INTERVAL '1 day'", f"CAST(date_trunc('month', {first}) AS DATE)"
                )
            case "stamp":
                return self.one(f"{first} - INTERVAL '1 month'", f"date_trunc('day', {first})")
            case "list":
                return self.one(f"array_sort({first})", f"array_append({first}, 1)")
        return ""

    def aggregate(self, relation: Relation, depth: int, kind: str) -> Value:
        """An aggregate that gives ``kind``."""
        condition = f" FILTER (WHERE {self.predicate(relation, 0)})" if self.rarely(6) else ""
        of = {k: self.value(relation, 0, k).text for k in ((kind,) if kind != "list" else ())}
        exact = True
        match kind:
            case "int":
                column = self.one(
                    *[c for c in relation.columns if c.kind in _SORTABLE] or [Value("1", "int")]
                )
                forms = ["count(*)", f"count({column.text})", f"sum({of[kind]})"]
                forms += [f"min({of[kind]})", f"max({of[kind]})", f"sum(DISTINCT {of[kind]})"]
                forms += [f"bit_xor({of[kind]})", f"median({of[kind]})"]
                if column.exact:
                    forms += [f"count(DISTINCT {column.text})"] * 2
            case "float":
                value = self.value(relation, 0, "int").text
                forms = [f"avg({value})", f"stddev({value})", f"var_pop({value})"]
                exact = False
            case "decimal":
                forms = [
                    f"sum({of[kind]})",
                    f"avg({of[kind]})",
                    f"min({of[kind]})",
                    f"max({of[kind]})",
                ]
            case "bool":
                forms = [f"bool_and({of[kind]})", f"bool_or({of[kind]})", "count(*) > 2"]
            case "list":
                value, order = self.value(relation, 0, "int").text, ", ".join(relation.key)
                if not order:
                    order = value
                forms = [
                    f"array_agg({value} ORDER BY {order})",
                    f"array_agg({value} ORDER BY {order})",
                ]
                if not relation.key:
                    forms = [f"array_agg({value} ORDER BY {value})"]
            case "text":
                forms = [f"min({of[kind]})", f"max({of[kind]})"]
                if relation.key:
                    order = ", ".join(relation.key)
                    forms += [f"string_agg({of[kind]}, ',' ORDER BY {order})"]
                    forms += [f"first_value({of[kind]} ORDER BY {order})"]
            case _:
                forms = [f"min({of[kind]})", f"max({of[kind]})"]
        text = self.one(*forms)
        return Value(text if text == "count(*) > 2" else text + condition, kind, exact)

    def window(self, relation: Relation) -> Value:
        exact = [c for c in relation.columns if c.exact and c.kind in _SORTABLE]
        number = self.value(relation, 0, "int").text
        by = f"PARTITION BY {self.one(*exact).text} " if exact and self.number(0, 2) else ""
        if relation.key and self.number(0, 2):
            order = "ORDER BY " + ", ".join(relation.key)
            frame = f" {self.one(*_FRAMES)}"
            text = self.one(
                f"row_number() OVER ({by}{order})",
                f"sum({number}) OVER ({by}{order}{frame})",
                f"count({number}) OVER ({by}{order}{frame})",
                f"lag({number}) OVER ({by}{order})",
                f"lead({number}, 2) OVER ({by}{order})",
                f"first_value({number}) OVER ({by}{order}{frame})",
                f"min({number}) OVER ({by}{order}{frame})",
                f"ntile(3) OVER ({by}{order})",
            )
            return Value(text, "int")
        ranged = [c for c in exact if c.kind not in _NO_RANGE]
        order = f"ORDER BY {self.one(*ranged).text}{self.one('', ' DESC')}" if ranged else ""
        forms = [f"sum({number}) OVER ({by}{order})", f"count(*) OVER ({by})"]
        forms += [f"max({number}) OVER ({by})"]
        if order:
            forms += [f"rank() OVER ({by}{order})", f"dense_rank() OVER ({by}{order})"]
        return Value(self.one(*forms), "int")

    # -- ORDER BY and LIMIT --------------------------------------------------------------

    def order(self, select: _Select) -> tuple[str, bool]:
        if not select.sortable or not self.rarely(2):
            return "", False
        return self.sorting(None, [c.text for c in select.columns]) + self.limit(), True

    def sorting(self, relation: Relation | None, total: Sequence[str]) -> str:
        """By every one of ``total``, after one sortable column of ``relation`` perhaps."""
        names = list(total)
        if relation is None:
            names = self._draw(st.permutations(names))
        else:
            sortable = [c.text for c in relation.columns if c.exact and c.kind in _SORTABLE]
            names = [self.one(*sortable), *names] if self.number(0, 1) else names
        way = self.one("", " DESC", " NULLS FIRST", " DESC NULLS LAST")
        return " ORDER BY " + ", ".join(name + way for name in names)

    def limit(self) -> str:
        return self.one("", " LIMIT 3", " LIMIT 10 OFFSET 2", " LIMIT 100", " LIMIT 0", " OFFSET 4")
