"""Reads and writes CSV files that have a line for each instance of a dataclass or for each mapping."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from blt_kernels._files import whole_file

Row = TypeVar("Row")

OF_CELL: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    float | None: lambda cell: float(cell) if cell else None,
    tuple[float, ...]: lambda cell: tuple(map(float, cell.split())),
}


def cell_of(value: object, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(cell_of(x, digits) for x in value)
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def names_of(kind: type) -> list[str]:
    """Return the names of the fields of a dataclass, in order."""
    return [field.name for field in fields(kind)]


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Return the lines of a file as instances of `kind`, none if there is no file. Other columns are left out."""
    if not path.exists():
        return []
    types = get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as file:
        return [
            kind(**{name: OF_CELL[types[name]](row[name]) for name in names_of(kind)}) for row in csv.DictReader(file)
        ]


def write_rows(path: Path, columns: Sequence[Any], rows: Iterable[Mapping[Any, Any]], digits: int = 6) -> None:
    """Write a file. A `float` has so many significant digits, and a space is between the numbers of a tuple."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: cell_of(value, digits) for name, value in row.items()})
