"""``--table NAME=PATH``: which format a path has, and how a session gets it as a table.

Goes by the extension of a file, or of the files inside a directory. Reading is
DataFusion's; files are opened here only to find the one that it could not read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from datafusion import CsvReadOptions
from pyarrow import parquet

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datafusion

__all__ = ["EXTENSIONS", "NamedTable"]

EXTENSIONS: Final = (".parquet", ".csv", ".json", ".ndjson", ".arrow")
"""Of the files that can be tables, in lower case."""


@dataclass(frozen=True, slots=True)
class NamedTable:
    """A table of files of one extension.

    ``name`` as SQL has it: case counts only inside double quotes. ``extension`` as the
    files are spelt. ``partition_columns`` are those that directories called
    ``column=value`` stand for; their values are strings.
    """

    name: str
    path: Path
    extension: str
    partition_columns: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> NamedTable:
        """From ``NAME=PATH``. Raises ``ValueError`` saying what to give instead."""
        name, equals, given = text.partition("=")
        if not (name and equals and given):
            raise ValueError(f"--table takes NAME=PATH, not {text!r}")
        path = Path(given).absolute()
        if path.is_file():
            extension = path.suffix
            if extension.lower() not in EXTENSIONS:
                raise ValueError(f"{given} is no {_known()} file, going by its extension")
            return cls(name, path, extension)
        if not path.is_dir():
            raise ValueError(f"table {name}: there is no file or directory {given}")
        files = sorted(_data_files(path))
        found = sorted({file.suffix for file in files if file.suffix.lower() in EXTENSIONS})
        if len(found) != 1:
            has = f"has no {_known()} files; give a file, or a directory of such"
            if found:
                has = f"has both {' and '.join(found)} files; give each format its own directory"
            raise ValueError(f"table {name}: directory {given} {has}")
        first = next(file for file in files if file.suffix == found[0])
        pieces = first.relative_to(path).parts[:-1]
        columns = tuple(piece.partition("=")[0] for piece in pieces if "=" in piece)
        return cls(name, path, found[0], columns)

    def register(self, session: datafusion.SessionContext) -> None:
        """Make it a table of ``session``. Raises ``ValueError`` that names the file."""
        try:
            self._register(session)
        except Exception as error:  # DataFusion raises nothing more special
            raise ValueError(f"{self._culprit()}: {error}") from error

    def _culprit(self) -> Path:
        """The first Parquet file whose footer cannot be read, if there is one."""
        if self.path.is_dir() and self.extension.lower() == ".parquet":
            for file in sorted(_data_files(self.path)):
                try:
                    if file.suffix == self.extension:
                        parquet.read_metadata(file)
                except (OSError, pa.ArrowException):
                    return file
        return self.path

    def _register(self, session: datafusion.SessionContext) -> None:
        path = str(self.path)
        columns: list[tuple[str, Any]] = [(name, pa.string()) for name in self.partition_columns]
        more: dict[str, Any] = {"file_extension": self.extension}
        match self.extension.lower():
            case ".parquet":
                session.register_parquet(self.name, path, columns, **more)
            case ".csv":
                options = CsvReadOptions(table_partition_cols=columns, **more)
                session.register_csv(self.name, path, options=options)
            case ".arrow":
                session.register_arrow(self.name, path, table_partition_cols=columns, **more)
            case _:
                session.register_json(self.name, path, table_partition_cols=columns, **more)


def _data_files(directory: Path) -> Iterator[Path]:
    """The files below ``directory`` that DataFusion reads: none that is hidden."""
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith((".", "_"))]
        yield from (Path(parent, name) for name in files if not name.startswith((".", "_")))


def _known() -> str:
    return ", ".join(EXTENSIONS[:-1]) + " or " + EXTENSIONS[-1]
