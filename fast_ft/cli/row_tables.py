"""What `data --list` and `data --why` print: every row taken, the rows passed over, and what became of one row."""

from __future__ import annotations

from typing import Any

from fast_ft.cli.tables import stages_of
from fast_ft.common.streams import new_console
from fast_ft.common.text_safety import plain
from fast_ft.common.wording import counted
from fast_ft.data.formats import strip_lead
from fast_ft.data.prepare import SelectedData
from fast_ft.data.why import left_out, why
from fast_ft.recipe.schema import Recipe


def print_list(prepared: SelectedData) -> None:
    """Print every selected row in a line: its id, its stages, its metrics, and its prompt as far as the width goes."""
    stages, measured = stages_of(prepared), {row["id"]: row for row in prepared.selection.rows}
    names = [name for name in next(iter(measured.values()), {}) if name != "id"]
    headings = ["id", "stages", *(name.replace("_", "\n") for name in names)]
    rows = [
        [row.id, ", ".join(stages[row.id]), *(_measure(measured[row.id].get(name)) for name in names)]
        for row in prepared.examples
    ]
    _print(headings, rows, [row.prompt for row in prepared.examples])


def print_left_out(recipe: Recipe, prepared: SelectedData, most: int = 200) -> None:
    """Print the rows that pass select.where and were kept out by a pattern or by a row before them, `most` at most."""
    rows = left_out(recipe.select, prepared.selection)
    if not rows:
        return
    console = new_console()
    console.print(f"\nleft out, but not by select.where: {counted(len(rows), 'row')}")
    cells = [[row.id, row.why, row.like or ""] for row in rows[:most]]
    _print(["id", "why", "like"], cells, [row.prompt for row in rows[:most]])
    if rows[most:]:
        console.print(f"{len(rows) - most:,} more: data --json lists all of them")


def _print(headings: list[str], rows: list[list[str]], prompts: list[str]) -> None:
    """Print a table whose last column is the prompts, without Alpaca's lead, as far as the console's width goes."""
    from rich.cells import cell_len
    from rich.markup import escape
    from rich.table import Table

    table, console = Table(), new_console()
    rows = [[plain(cell) for cell in cells] for cells in rows]
    widths = [
        max(map(cell_len, [*heading.split("\n"), *cells]))
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True)
    ]
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index > 1 else "left", no_wrap=True)
    room = console.width - sum(widths) - 3 * len(widths) - 4  # the borders'
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", width=max(8, room))
    for cells, prompt in zip(rows, prompts, strict=True):
        table.add_row(*map(escape, cells), escape(plain(" ".join(strip_lead(prompt).split()))))
    console.print(table)


def print_why(recipe: Recipe, prepared: SelectedData, row_id: str) -> None:
    """Print why a row is left out, or that it is taken, with its prompt. Raises InputError for an unknown id."""
    prompt, response, steps = why(recipe.select, prepared.selection, row_id)
    console = new_console()
    for line in (f"row {row_id}", f"prompt: {prompt}", f"response: {_beginning(response)}", *steps):
        console.print(plain(" ".join(line.split())), markup=False, soft_wrap=True)


def _beginning(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _measure(value: Any) -> str:
    if value is None:
        return ""
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:g}"
