"""Which rows are taken, in what order, and why others are not: a pure function of the pool and the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common import seeds
from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted, listed
from fast_ft.data.duplicates import Duplicates
from fast_ft.data.examples import Example, Pool
from fast_ft.data.metrics import TokenCounter, measure
from fast_ft.recipe.conditions import ParsedCondition, check_metric, parse_condition
from fast_ft.recipe.schema import Select

_COMPUTE = {">=": pc.greater_equal, "<=": pc.less_equal, ">": pc.greater, "<": pc.less, "==": pc.equal}
_BLOCK = 256  # rows turned into Python objects at a time while taking


@dataclass(frozen=True)
class Selection:
    """The rows taken.

    pool: all rows, measured. indices: positions in the pool, best rank first. notes: what was dropped and why, and
    what in the recipe had no effect.
    """

    pool: Pool
    indices: list[int]
    notes: list[str]

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
) -> Selection:
    """Filter, rank, skip duplicates and take. A row with an empty response is never taken.

    limit: data.max_train_rows. also_measure: metrics that later steps need. Raises InputError where no row is left, or
    more than `limit` rows.
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
    pool = measure(pool, [*conditions, *section.rank_by, *also_measure], token_counter)
    if "score" in {*conditions, *section.rank_by} and pool.table["score"].null_count == len(pool):
        raise InputError(f"{pool.source}: no row has a score. Take score out of select, or add scores to the rows.")
    notes: list[str] = []
    ranked = _rank(pool.table, _filter(pool, conditions, notes), section.rank_by, notes)
    indices = _take(pool, ranked, section, seed, notes)
    if limit and len(indices) > limit:
        raise InputError(
            f"select leaves {counted(len(indices), 'row')}, where data.max_train_rows allows {limit}. Set select.take."
        )
    return Selection(pool, indices, notes)


def _filter(pool: Pool, conditions: dict[str, ParsedCondition], notes: list[str]) -> list[int]:
    """Return the positions of the rows that have a response and pass all conditions, in file order."""
    mask = pc.not_equal(pool.table["response"], "")
    left = pc.sum(mask).as_py() or 0
    if left < len(pool):
        notes.append(f"{counted(len(pool) - left, 'row')} with an empty response left out.")
    for name, condition in conditions.items():
        column, before = pool.table[name], left
        absent = pc.sum(pc.and_(mask, pc.is_null(column))).as_py() or 0
        mask = pc.and_(mask, mask_of(column, condition))
        left = pc.sum(mask).as_py() or 0
        unscored = f" ({counted(absent, 'row')} without {name} dropped)" if absent else ""
        notes.append(f"{name} {condition.text}: {left:,} of {counted(before, 'row')} left{unscored}.")
    if not left:
        raise InputError(f"select.where leaves no row of {pool.source}. {' '.join(notes)} Loosen a condition.")
    return pc.indices_nonzero(mask).to_pylist()


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


def _take(pool: Pool, ranked: list[int], section: Select, seed: int, notes: list[str]) -> list[int]:
    """Return the rows taken, in rank order. Duplicates are skipped while taking, so few rows are compared."""
    wanted = section.take or len(ranked)
    duplicates = Duplicates(section.deduplicate, section.near_duplicate_similarity)
    taken: list[int] = []
    dropped: list[str] = []
    seen: set[int] = set()
    for places, quota in _visits(len(ranked), wanted, section.method, seed):
        found = 0
        for place, example in _lazily(pool, ranked, (place for place in places if place not in seen)):
            if found == quota or len(taken) == wanted:
                break
            seen.add(place)
            if duplicates.add(example):
                taken.append(place)
                found += 1
            else:
                dropped.append(example.id)
    if dropped:
        kind = "near-duplicate" if section.deduplicate == "near" else "duplicate"
        notes.append(f"{counted(len(dropped), kind)} skipped: {listed(dropped, 5)}".rstrip(".") + ".")
    if section.take and len(taken) < section.take:
        notes.append(f"select.take: only {counted(len(taken), 'row')} of the {section.take} asked for.")
    return [ranked[place] for place in sorted(taken)]


def _visits(count: int, wanted: int, method: str, seed: int) -> Iterator[tuple[list[int], int]]:
    """Yield (places in the ranking, how many of them to accept); the last pair fills what duplicates left open."""
    everything = list(range(count))
    if method == "middle":  # from the centre outwards, so that the rows taken are the central ones
        everything.sort(key=lambda place: abs(2 * place - (count - 1)))
    elif method == "random":
        seeds.generator(seed).shuffle(everything)
    elif method == "stratified" and wanted < count:
        for stratum in range(wanted):
            places = list(range(stratum * count // wanted, (stratum + 1) * count // wanted))
            centre = (places[0] + places[-1]) / 2
            yield sorted(places, key=lambda place: abs(place - centre)), 1
    yield everything, wanted


def _lazily(pool: Pool, ranked: list[int], places: Iterable[int]) -> Iterator[tuple[int, Example]]:
    """Yield places with their rows; rows become Python objects one block at a time."""
    block: list[int] = []
    for place in places:
        block.append(place)
        if len(block) == _BLOCK:
            yield from zip(block, pool.examples([ranked[p] for p in block]), strict=True)
            block = []
    yield from zip(block, pool.examples([ranked[p] for p in block]), strict=True)
