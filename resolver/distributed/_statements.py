"""Where one SQL statement ends and the next begins; nothing else about SQL.

DataFusion takes one statement at a time. This knows only what can hide a semicolon:
strings, quoted names and comments. Whether a statement makes sense is DataFusion's to
say, also of one whose quotes do not end.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["split"]

_TOKEN: Final = re.compile(
    r"""
      (?P<end> ; )
    | (?P<comment> --[^\n]* )
    | (?P<block> /\* )
    | (?<!\w) [eE] '(?: [^'\\] | \\. | '' )*'  # an escape string may hold \'
    | '[^']*'                                  # a doubled quote is two strings side by side
    | "[^"]*"
    | `[^`]*`
    | (?P<tag> \$\w*\$ ) .*? (?P=tag)
    """,
    re.VERBOSE | re.DOTALL,
)
_BLOCK_EDGE: Final = re.compile(r"/\*|\*/")


def split(text: str) -> list[str]:
    """The statements of ``text`` in order, without the semicolons and without empty ones.

    What holds only comments is empty.
    """
    statements = []
    start = position = 0
    has_code = False
    while (match := _TOKEN.search(text, position)) is not None:
        has_code = has_code or bool(text[position : match.start()].strip())
        position = match.end()
        if match["end"]:
            if has_code:
                statements.append(text[start : match.start()].strip())
            start, has_code = position, False
        elif match["block"]:
            position = _end_of_block(text, position)
        elif not match["comment"]:
            has_code = True
    if has_code or text[position:].strip():
        statements.append(text[start:].strip())
    return statements


def _end_of_block(text: str, position: int) -> int:
    """Past the comment whose opening ends at ``position``; comments nest."""
    depth = 1
    while depth:
        edge = _BLOCK_EDGE.search(text, position)
        if edge is None:
            return len(text)
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return position
