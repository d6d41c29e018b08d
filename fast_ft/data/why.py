"""Why a row was left out, or that it was taken: the steps of a selection, gone through for one row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.errors import InputError, nearest
from fast_ft.common.text_safety import escaped
from fast_ft.common.wording import counted
from fast_ft.data.selection import Selection, mask_of, rejections
from fast_ft.recipe.conditions import parse_condition
from fast_ft.recipe.schema import Select

_SAYS = {
    "duplicate": "it is a duplicate of row {like}",
    "near-duplicate": "it is a near-duplicate of row {like}",
    "verb": "select.diversify.verb: enough rows whose prompts begin with the same word were taken, the first {like}",
    "opening": "select.diversify.opening: enough rows whose responses begin alike were taken, the first {like}",
    "topic": "select.diversify.topic: enough rows of its topic were taken, the first {like}",
    "overlong": "it has more tokens than model.max_length allows, and data.overlong says drop",
    "unencodable": "the tokenizer cannot give back each of its characters, and data.unencodable says drop",
    "source": "its source had given as many rows as its `take` allows",
}


class LeftOut(NamedTuple):
    """A row that a pattern or a row before it kept out. like: the id of that row, or None."""

    id: str
    why: str
    like: str | None
    prompt: str


def left_out(section: Select, selection: Selection) -> list[LeftOut]:
    """Return the rows that pass `where` and were kept out: by a pattern, or passed over while taking; in file order."""
    table = selection.pool.table
    passes = pc.not_equal(table["response"], "")
    for name, condition in section.where.items():
        passes = pc.and_(passes, mask_of(table[name], parse_condition(condition, name)))
    found: dict[int, tuple[str, int | None]] = {}
    for key, pattern, holds in rejections(table, section.reject):
        for index in pc.indices_nonzero(pc.and_(passes, holds)).to_pylist():
            found.setdefault(index, (f"{key} '{escaped(pattern)}'", None))
    found |= {each.row: (each.why, each.like) for each in selection.passed_over}
    rows = table.select(["id", "prompt"]).take(pa.array(sorted(found), pa.int64())).to_pylist()
    return [
        LeftOut(row["id"], found[index][0], _id(selection, found[index][1]), row["prompt"])
        for index, row in zip(sorted(found), rows, strict=True)
    ]


def why(section: Select, selection: Selection, row_id: str) -> tuple[str, str, list[str]]:
    """Return a row's prompt, its response, and sentences that say what became of it, in the order of the steps.

    Raises InputError for an id that no row has.
    """
    table = selection.pool.table
    index = pc.index(table["id"], row_id).as_py()
    if index < 0:
        ids = table["id"].to_pylist()
        raise InputError(f"--why {row_id!r}: none of {counted(len(ids), 'row')} has this id{nearest(row_id, ids)}")
    row = table.slice(index, 1).to_pylist()[0]
    return row["prompt"], row["response"], [*_steps(section, selection, index)]


def _steps(section: Select, selection: Selection, index: int) -> Iterator[str]:
    table = selection.pool.table.slice(index, 1)
    if table["response"][0].as_py() == "":
        yield "left out: its response is empty"
    for key, pattern, holds in rejections(table, section.reject):
        if holds[0].as_py():
            yield f"left out: {key} '{escaped(pattern)}' is found in it"
    for name, condition in section.where.items():
        parsed, value = parse_condition(condition, name), table[name][0].as_py()
        if not parsed(value):
            yield f"left out: {name} is {_shown(value)}, where the recipe asks for {parsed.text}"
        else:
            yield f"passes: {name} is {_shown(value)} ({parsed.text})"
    if index not in selection.ranked:
        return
    yield f"rank {selection.ranked.index(index) + 1:,} of {counted(len(selection.ranked), 'row')} that could be taken"
    over = {each.row: each for each in selection.passed_over}
    if index in selection.indices:
        yield f"taken, as one of {counted(len(selection.indices), 'row')}"
    elif index in over:
        like = _id(selection, over[index].like)
        yield f"passed over: {_SAYS[over[index].why].format(like=like)}"
        if over[index].like is not None:
            yield f"row {like}: {selection.pool.table['prompt'][over[index].like].as_py()}"
    else:
        yield f"not reached: select.take was full, with {counted(len(selection.indices), 'row')}"


def _id(selection: Selection, index: int | None) -> str | None:
    return None if index is None else selection.pool.table["id"][index].as_py()


def _shown(value: float | bool | None) -> str:
    if value is None:
        return "missing"
    return ("true" if value else "false") if isinstance(value, bool) else f"{value:g}"
