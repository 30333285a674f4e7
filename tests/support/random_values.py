"""Random expressions over the columns of a relation: values, conditions, aggregates, windows.

Everything here has one right value, whatever order rows come in: what depends on order is
only made over a relation whose key is known, and names that key. Whole queries are
``random_sql``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from hypothesis import strategies as st

__all__ = ["GROUPABLE", "LITERALS", "SORTABLE", "Expressions", "Relation", "Value"]

LITERALS: Final[dict[str, tuple[str, ...]]] = {
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
"""Constants of every kind of column."""
SORTABLE: Final = tuple(kind for kind in LITERALS if kind not in ("list", "struct", "map"))
GROUPABLE: Final = tuple(kind for kind in LITERALS if kind != "map")

_NO_RANGE: Final = ("clock", "fixed")  # DataFusion has no default frame over these
_COMPARISONS: Final = ("=", "<", "<>", ">=", "IS DISTINCT FROM", "IS NOT DISTINCT FROM")
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
    """What stands in FROM. ``key``: columns that no two rows share; empty when none is known."""

    text: str
    columns: tuple[Value, ...]
    key: tuple[str, ...] = ()

    def of(self, *kinds: str) -> list[Value]:
        """The exact columns of ``kinds``."""
        return [column for column in self.columns if column.exact and column.kind in kinds]


@functools.cache
def _sampled(choices: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    return st.sampled_from(choices)


@functools.cache
def _integers(least: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(least, most)


class Expressions:
    """Writes expressions by the choices that ``draw`` makes."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    # -- choices: the first, or the least, is what hypothesis shrinks to --------------------

    def one(self, *choices: Any) -> Any:
        return self._draw(_sampled(choices))

    def number(self, least: int, most: int) -> int:
        return self._draw(_integers(least, most))

    def rarely(self, one_in: int) -> bool:
        return self.number(1, one_in) == one_in

    def shuffled(self, items: Sequence[str]) -> list[str]:
        return self._draw(st.permutations(items))

    # -- values ----------------------------------------------------------------------------

    def any_kind(self, relation: Relation, among: Sequence[str] = tuple(LITERALS)) -> str:
        kinds = dict.fromkeys(column.kind for column in relation.columns if column.kind in among)
        return self.one(*kinds) if kinds else "int"

    def value(self, relation: Relation, kind: str) -> Value:
        """An exact expression of ``kind``: most often a column."""
        columns = relation.of(kind)
        literals = tuple(Value(text, kind) for text in LITERALS[kind])
        form = self.number(0, 6)
        if not columns or form == 6:
            return self.one(*literals)
        if form == 4 and (made := self._made(relation, columns, kind)):
            return Value(made, kind)
        if form == 5:
            first, second = self.one(*columns).text, self.one(*columns, *literals).text
            if self.number(0, 2) == 0:
                return Value(f"coalesce({first}, {second})", kind)
            otherwise = self.one(f" ELSE {second}", "")
            condition = self.condition(relation)
            return Value(f"CASE WHEN {condition} THEN {first}{otherwise} END", kind)
        return self.one(*columns)

    def _made(self, relation: Relation, columns: Sequence[Value], kind: str) -> str:
        """A value by the operators of its kind; empty for a kind that has none here."""
        first, second = self.one(*columns).text, self.one(*columns).text
        forms: list[str] = []
        match kind:
            case "int":
                forms = [f"{first} + 1", f"{first} % 7", f"CAST({first} AS BIGINT) - {second}"]
                forms += [f"nullif({first}, 1)", f"greatest({first}, {second})"]
                forms += [f"length({column.text})" for column in relation.of("text")[:1]]
                forms += [f"extract(year FROM {column.text})" for column in relation.of("date")[:1]]
                forms += [f"{column.text}['a']" for column in relation.of("struct")[:1]]
            case "decimal":
                forms = [f"{first} + 1", f"-({first})", f"nullif({first}, 1.5)"]
            case "float":
                forms = [f"-({first})", f"{first} * 2", f"abs({first})"]
            case "text":
                forms = [f"upper({first})", f"{first} || '!'", f"substr({first}, 1, 1)"]
            case "bool":
                forms = [f"NOT {first}", f"{first} IS NOT TRUE", f"({first} AND {second})"]
            case "date":
                forms = [
                    f"{first} + INTERVAL '1 day'",
                    f"CAST(date_trunc('month', {first}) AS DATE)",
                ]
            case "stamp":
                forms = [f"{first} - INTERVAL '1 month'", f"date_trunc('day', {first})"]
            case "list":
                forms = [f"array_sort({first})", f"array_append({first}, 1)"]
        return self.one(*forms) if forms else ""

    # -- conditions ------------------------------------------------------------------------

    def condition(self, relation: Relation) -> str:
        """True, false or NULL for a row of ``relation``; nothing but the row decides."""
        no = self.one("", "NOT ")
        match self.number(0, 7):
            case 0:
                return self._comparison(relation)
            case 1:
                return f"{self.one(*relation.columns).text} IS {no}NULL"
            case 2:
                both = self.one("AND", "OR")
                left, right = self._comparison(relation), self._comparison(relation)
                return f"(({left}) {both} ({right}))"
            case 3:
                return f"NOT ({self._comparison(relation)})"
            case 4:
                text, pattern = self.value(relation, "text").text, self.one("a%", "%b%", "_", "")
                return f"{text} {no}LIKE '{pattern}'"
            case 5:
                number, among = (
                    self.value(relation, "int").text,
                    self.one("1, 2", "3, NULL", "1, 2, 5"),
                )
                return f"{number} {no}IN ({among})"
            case 6:
                number, range_ = self.value(relation, "int").text, self.one("0 AND 3", "2 AND 100")
                return f"{number} {no}BETWEEN {range_}"
        return self.value(relation, "bool").text

    def _comparison(self, relation: Relation) -> str:
        kind = self.any_kind(relation, SORTABLE)
        left, right = self.value(relation, kind).text, self.value(relation, kind).text
        return f"{left} {self.one(*_COMPARISONS)} {right}"

    def link(self, left: Relation, right: Relation, operator: str) -> str:
        """Compares a column of each, most often those called k."""
        kinds = {column.kind for column in left.of(*SORTABLE)}
        usable = sorted(kinds & {column.kind for column in right.of(*SORTABLE)})
        if not usable:
            return "TRUE"
        kind = "int" if "int" in usable and not self.rarely(4) else self.one(*usable)
        sides = []
        for relation in (left, right):
            columns = [column.text for column in relation.of(kind)]
            keys = [text for text in columns if text.endswith(".k")]
            sides.append(keys[0] if keys and not self.rarely(3) else self.one(*columns))
        return f"{sides[0]} {operator} {sides[1]}"

    # -- aggregates and windows ------------------------------------------------------------

    def aggregate(self, relation: Relation, kind: str) -> Value:
        """An aggregate that gives ``kind``."""
        of = self.value(relation, "int" if kind in ("float", "list") else kind).text
        order = ", ".join(relation.key)
        forms = [f"min({of})", f"max({of})"]
        match kind:
            case "int":
                any_column = self.one(*relation.of(*SORTABLE) or [Value("1", "int")]).text
                forms = ["count(*)", f"count({any_column})", f"sum({of})", *forms]
                forms += [f"sum(DISTINCT {of})", f"bit_xor({of})", f"median({of})"]
                forms += [f"count(DISTINCT {any_column})"] * 2
            case "float":
                forms = [f"avg({of})", f"stddev({of})", f"var_pop({of})"]
            case "decimal":
                forms += [f"sum({of})", f"avg({of})"]
            case "bool":
                forms = [f"bool_and({of})", f"bool_or({of})"]
            case "list":
                forms = [f"array_agg({of} ORDER BY {order or f'{of} + 0'})"]
            case "text" if order:
                forms += [f"string_agg({of}, ',' ORDER BY {order})"]
                forms += [f"first_value({of} ORDER BY {order})"]
        only = f" FILTER (WHERE {self.condition(relation)})" if self.rarely(6) else ""
        return Value(self.one(*forms) + only, kind, exact=kind != "float")

    def window(self, relation: Relation) -> Value:
        """A window function that gives an int."""
        exact = relation.of(*SORTABLE)
        number = self.value(relation, "int").text
        by = f"PARTITION BY {self.one(*exact).text} " if exact and self.number(0, 2) else ""
        if relation.key and self.number(0, 2):
            total = f"({by}ORDER BY {', '.join(relation.key)}"
            frame = f"{total} {self.one(*_FRAMES)})"
            forms = [f"row_number() OVER {total})", f"ntile(3) OVER {total})"]
            forms += [f"lag({number}) OVER {total})", f"lead({number}, 2) OVER {total})"]
            functions = ("sum", "count", "min", "first_value", "last_value")
            forms += [f"{function}({number}) OVER {frame}" for function in functions]
        else:
            # Rows that compare equal get the same from any of these.
            columns = [column for column in exact if column.kind not in _NO_RANGE]
            way = self.one("", " DESC")
            order = f"ORDER BY {self.one(*columns).text}{way}" if columns else ""
            forms = [f"sum({number}) OVER ({by}{order})", f"count(*) OVER ({by})"]
            forms += [f"max({number}) OVER ({by})"]
            if order:
                forms += [f"rank() OVER ({by}{order})", f"dense_rank() OVER ({by}{order})"]
        return Value(self.one(*forms), "int")
