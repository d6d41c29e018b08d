"""Which rows are taken, in what order, and why others are not: a pure function of the pool and the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.common.wording import counted
from fast_ft.data.examples import Example, Pool
from fast_ft.data.metrics import TokenCounter, measure
from fast_ft.data.taking import PassedOver, take
from fast_ft.recipe.conditions import ParsedCondition, check_metric, parse_condition
from fast_ft.recipe.schema import Reject, Select

_COMPUTE = {">=": pc.greater_equal, "<=": pc.less_equal, ">": pc.greater, "<": pc.less, "==": pc.equal}
#: Parts of the rows looked at that near-duplicates may be before a warning, and before a stop.
MANY_NEAR, MOST_NEAR = 0.1, 0.5
_KINDS = ("verb", "opening", "topic")  #: what select.diversify limits


class Duplicate(NamedTuple):
    """The ids of a row that was skipped, and of the row that was taken in its place."""

    skipped: str
    kept: str


@dataclass(frozen=True)
class Selection:
    """The rows taken.

    pool: all rows, measured. indices: positions in the pool, best rank first. notes: what was dropped and why, and
    what in the recipe had no effect. ranked: the positions of all rows that could be taken, best rank first.
    passed_over: rows of these that were visited and not taken, and why.
    """

    pool: Pool
    indices: list[int]
    notes: list[str]
    ranked: list[int]
    passed_over: list[PassedOver]

    @cached_property
    def duplicates(self) -> list[Duplicate]:
        """Which rows were skipped as duplicates, and of which rows."""
        pairs = [(each.row, each.like) for each in self.passed_over if each.why.endswith("duplicate")]
        ids = _ids(self.pool, [index for pair in pairs for index in pair if index is not None])
        return [Duplicate(*pair) for pair in zip(ids[::2], ids[1::2], strict=True)]

    @cached_property
    def examples(self) -> list[Example]:
        """The rows taken, best rank first."""
        return self.pool.examples(self.indices)

    def metrics(self, index: int) -> dict[str, Any]:
        """Return {name: value} of all metrics that were measured of the pool's row `index`, score included."""
        return {name: self.pool.table[name][index].as_py() for name in self.pool.metrics}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The id and the metrics of each row taken, best rank first, for display."""
        return [
            {"id": example.id, **self.metrics(index)}
            for example, index in zip(self.examples, self.indices, strict=True)
        ]


def select(
    pool: Pool,
    section: Select,
    *,
    seed: int,
    limit: int | None,
    also_measure: Iterable[str] = (),
    token_counter: TokenCounter | None = None,
    typed: bool = True,
) -> Selection:
    """Filter, rank, skip duplicates and take. A row with an empty response is never taken.

    limit: data.max_train_rows. also_measure: metrics that later steps need. typed: somebody typed select.deduplicate.
    Raises InputError where no row is left, more than `limit` rows, or most rows went as near-duplicates untyped.
    """
    if section.take and limit and section.take > limit:
        raise InputError(
            f"select.take: {counted(section.take, 'row')}, where data.max_train_rows allows {limit}. Take fewer."
        )
    conditions = {name: parse_condition(condition, name) for name, condition in section.where.items()}
    for name, weight in section.rank_by.items():
        check_metric(name, "select.rank_by")
        if not math.isfinite(weight):
            raise InputError(f"select.rank_by.{name}: {weight} is no weight. Give a finite number.")
    for name in section.strata:
        check_metric(name, "select.strata")
    pool = measure(pool, [*conditions, *section.rank_by, *section.strata, *also_measure], token_counter)
    if "score" in {*conditions, *section.rank_by, *section.strata} and pool.table["score"].null_count == len(pool):
        raise InputError(f"{pool.source}: no row has a score. Take score out of select, or add scores to the rows.")
    notes: list[str] = []
    ranked = _rank(pool.table, _filter(pool, section.reject, conditions, notes), section.rank_by, notes)
    taken = take(pool, ranked, section, seed)
    found = Selection(pool, taken.indices, notes, ranked, taken.passed_over)
    notes += _duplicate_notes(section, len(taken.indices), found.duplicates, taken.near, typed)
    notes += _kind_notes(found)
    count = len(taken.indices)
    if section.take and count < section.take:
        notes.append(f"select.take: only {counted(count, 'row')} of the {section.take} asked for.")
    if limit and count > limit:
        raise InputError(
            f"select leaves {counted(count, 'row')}, where data.max_train_rows allows {limit}. Set select.take."
        )
    return found


def _filter(pool: Pool, reject: Reject, conditions: dict[str, ParsedCondition], notes: list[str]) -> list[int]:
    """Return the positions of the rows that have a response and pass all conditions, in file order."""
    mask = pc.not_equal(pool.table["response"], "")
    left = pc.sum(mask).as_py() or 0
    if left < len(pool):
        notes.append(f"{counted(len(pool) - left, 'row')} with an empty response left out.")
    usable = mask
    for key, pattern, found in rejections(pool.table, reject):
        mask, before = pc.and_not(mask, found), left
        left = pc.sum(mask).as_py() or 0
        notes.append(f"{key} '{escaped(pattern)}': {counted(before - left, 'row')} left out.")
    for name, condition in conditions.items():
        column, before = pool.table[name], left
        absent = pc.sum(pc.and_(mask, pc.is_null(column))).as_py() or 0
        mask = pc.and_(mask, mask_of(column, condition))
        left = pc.sum(mask).as_py() or 0
        unscored = f" ({counted(absent, 'row')} without {name} dropped)" if absent else ""
        notes.append(f"{name} {condition.text}: {left:,} of {counted(before, 'row')} left{unscored}.")
    if not left:
        raise InputError(
            f"select leaves no row of {pool.source}. {' '.join(notes)} Loosen a condition of select.where, or a "
            "pattern of select.reject."
            if reject.prompt or reject.response
            else f"select.where leaves no row of {pool.source}. {' '.join(notes)} Loosen a condition."
        )
    notes += _best_scored(pool.table["score"], usable, mask)
    return pc.indices_nonzero(mask).to_pylist()


def _best_scored(scores: pa.ChunkedArray, usable: pa.ChunkedArray, mask: pa.ChunkedArray) -> Iterator[str]:
    """Yield what to say where none of the rows of the best score are left."""
    best, left = (pc.max(scores.filter(rows)).as_py() for rows in (usable, mask))
    if best is not None and left is not None and left < best:
        count = pc.sum(pc.and_(usable, pc.fill_null(pc.equal(scores, best), False))).as_py()
        rows = "the only row" if count == 1 else f"all {counted(count, 'row')}"
        yield f"{rows} of the best score, {best:g}, left out by these limits; the best score left is {left:g}."


def rejections(table: pa.Table, reject: Reject) -> Iterator[tuple[str, str, pa.ChunkedArray]]:
    """Yield (key, pattern, boolean column of the rows that hold it). Raises InputError for no regular expression."""
    for side, patterns in (("prompt", reject.prompt), ("response", reject.response)):
        for pattern in patterns:
            key = f"select.reject.{side}"
            try:
                yield key, pattern, pc.match_substring_regex(table[side], pattern=pattern, ignore_case=True)
            except pa.ArrowInvalid as error:
                raise InputError(f"{key}: {pattern!r} is no regular expression of RE2's: {error}") from None


def rejected(table: pa.Table, reject: Reject) -> list[int]:
    """Return the positions of the rows that a pattern leaves out, in file order."""
    found = [pc.indices_nonzero(mask).to_pylist() for _, _, mask in rejections(table, reject)]
    return sorted({index for indices in found for index in indices})


def mask_of(column: pa.ChunkedArray, condition: ParsedCondition) -> pa.ChunkedArray:
    """Return a boolean column that says which values pass the condition; a null never does."""
    passed = [_COMPUTE[name](column, limit) for name, limit in condition.comparisons]
    return pc.fill_null(passed[0] if len(passed) == 1 else pc.and_(*passed), False)


def _rank(table: pa.Table, rows: list[int], weights: dict[str, float], notes: list[str]) -> list[int]:
    """Return the rows, highest rank first. Ties keep file order; rows without a value come last."""
    if not weights:
        return rows
    positions = pa.array(rows, pa.int64())
    total = None
    for name, weight in weights.items():
        values = table[name].take(positions).cast(pa.float64())
        low, high = pc.min_max(values).as_py().values()
        if low == high:
            notes.append(f"select.rank_by: {name} is {high} in every row left, so it decides nothing.")
            values = pc.multiply(values, 0.0)
        elif len(weights) > 1:
            values = pc.divide(pc.subtract(values, pc.mean(values)), pc.stddev(values, ddof=0))
        if values.null_count:
            notes.append(f"select.rank_by: {counted(values.null_count, 'row')} without {name} ranked last.")
        part = pc.multiply(values, weight)
        total = part if total is None else pc.add(total, part)
    order = pc.sort_indices(pa.table({"rank": total}), sort_keys=[("rank", "descending")])  # Arrow's sort is stable
    return positions.take(order).to_pylist()


def _ids(pool: Pool, indices: list[int]) -> list[str]:
    return pool.table["id"].take(pa.array(indices, pa.int64())).to_pylist()


def _kind_notes(found: Selection) -> Iterator[str]:
    """Yield what to say of rows that select.diversify kept out."""
    for kind in _KINDS:
        out = [each for each in found.passed_over if each.why == kind]
        if out:
            ids = _ids(found.pool, [index for each in out[:3] for index in (each.row, each.like) if index is not None])
            shown = "; ".join(f"{row} (like {like})" for row, like in zip(ids[::2], ids[1::2], strict=True))
            yield f"select.diversify.{kind}: {counted(len(out), 'row')} passed over: {shown}{'; ...' * bool(out[3:])}."


def _duplicate_notes(section: Select, taken: int, skipped: list[Duplicate], near: int, typed: bool) -> Iterator[str]:
    """Yield what to say of duplicates. InputError where near-duplicates are most rows, and nobody typed the method."""
    if not skipped:
        return
    kind = "near-duplicate" if section.deduplicate == "near" else "duplicate"
    shown = "; ".join(f"{each.skipped} (like {each.kept})" for each in skipped[:5])
    yield f"{counted(len(skipped), kind)} skipped: {shown}{'; ...' if skipped[5:] else '.'}"
    part = near / (taken + len(skipped))
    if part <= MANY_NEAR:
        return
    text = (
        f"{near:,} of {taken + len(skipped):,} rows ({part:.0%}) are near-duplicates of others and no exact ones, for "
        f"example row {skipped[0].skipped!r} of row {skipped[0].kept!r}"
    )
    if part > MOST_NEAR and not typed:
        raise InputError(
            f"select.deduplicate: {text}. Rows that have much in common may still be different rows. Write "
            "select.deduplicate=exact to keep them, or type select.deduplicate=near on the command line to go on."
        )
    yield (
        f"warning: {text}. Look at some of them (data --json lists all pairs); select.deduplicate: exact keeps rows "
        "that only have much in common."
    )
