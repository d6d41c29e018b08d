"""Tables as text: CSV with commas or semicolons, and TSV. The first line names the columns; every cell is text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from fast_ft.common.errors import InputError

DELIMITERS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV"}
#: Columns whose cells are numbers in the layouts that have them; a blank cell is none.
NUMBERS = ("score", "Difficulty", "difficulty")
_HEADER = 1 << 16  # characters within which the first line ends


def delimiter(text: str) -> str | None:
    """Return what stands between the columns of a table's first line, or None where it has fewer than two."""
    columns = {}
    for each in DELIMITERS:
        try:
            columns[each] = len(next(csv.reader(io.StringIO(text[:_HEADER], newline=""), delimiter=each), []))
        except csv.Error:
            columns[each] = 0
    best = max(columns, key=lambda each: columns[each])
    return best if columns[best] > 1 else None


def rows(text: str, name: str, between: str) -> list[dict[str, str]]:
    """Return a table's rows, {column: cell}; blank lines are none. InputError names the row and its line."""
    kind = DELIMITERS[between]
    remedy = "Put a cell that holds a delimiter, a quote or a line break in double quotes, and double its quotes."
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    found: list[dict[str, str]] = []
    try:
        header = _header(next(reader), name)
        for cells in _filled(reader):
            if len(cells) != len(header):
                raise InputError(
                    f"{name}, row {len(found) + 1} (line {reader.line_num}): {len(cells)} cells, where the header of "
                    f"this {kind} file has {len(header)}. {remedy}"
                )
            found.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: not valid {kind}: {error}. {remedy}") from error
    return found


def number(cell: str) -> float | str | None:
    """Return what a cell of NUMBERS means: a number, None for a blank cell, or the text, which is then refused."""
    try:
        return float(cell) if cell.strip() else None
    except ValueError:
        return cell


def _header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    if twice := next((cell for cell in header if header.count(cell) > 1), None):
        raise InputError(f"{name}: two columns are called {twice!r}. Give each column its own name.")
    return header


def _filled(lines: Iterator[list[str]]) -> Iterator[list[str]]:
    return (cells for cells in lines if any(cells))
