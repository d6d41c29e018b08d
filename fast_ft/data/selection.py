"""Which rows are taken, in what order, and why others are not: a pure function of the pool and the recipe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common import seeds
from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.data.duplicates import ExactDuplicates, Exchange, NearDuplicates
from fast_ft.data.examples import Example, Pool
from fast_ft.data.metrics import TokenCounter, measure
from fast_ft.recipe.conditions import ParsedCondition, check_metric, parse_condition
from fast_ft.recipe.schema import Select

_COMPUTE = {">=": pc.greater_equal, "<=": pc.less_equal, ">": pc.greater, "<": pc.less, "==": pc.equal}
#: Parts of the rows looked at that near-duplicates may be before a warning, and before a stop.
MANY_NEAR, MOST_NEAR = 0.1, 0.5
_BLOCK = 256  # rows turned into Python objects at a time while taking


class Duplicate(NamedTuple):
    """The ids of a row that was skipped, and of the row that was taken in its place."""

    skipped: str
    kept: str


@dataclass(frozen=True)
class Selection:
    """The rows taken.

    pool: all rows, measured. indices: positions in the pool, best rank first. notes: what was dropped and why, and
    what in the recipe had no effect. duplicates: which rows were skipped as duplicates, and of which rows.
    """

    pool: Pool
    indices: list[int]
    notes: list[str]
    duplicates: list[Duplicate]

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
    pool = measure(pool, [*conditions, *section.rank_by, *also_measure], token_counter)
    if "score" in {*conditions, *section.rank_by} and pool.table["score"].null_count == len(pool):
        raise InputError(f"{pool.source}: no row has a score. Take score out of select, or add scores to the rows.")
    notes: list[str] = []
    ranked = _rank(pool.table, _filter(pool, conditions, notes), section.rank_by, notes)
    indices, skipped, near = _take(pool, ranked, section, seed)
    notes += _duplicate_notes(section, len(indices), skipped, near, typed)
    if section.take and len(indices) < section.take:
        notes.append(f"select.take: only {counted(len(indices), 'row')} of the {section.take} asked for.")
    if limit and len(indices) > limit:
        raise InputError(
            f"select leaves {counted(len(indices), 'row')}, where data.max_train_rows allows {limit}. Set select.take."
        )
    return Selection(pool, indices, notes, skipped)


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


class _Quotas:
    """How many more rows each source may give (data.train's `take`)."""

    def __init__(self, pool: Pool, ranked: list[int]) -> None:
        self._left = [math.inf if source.take is None else source.take for source in pool.sources]
        self._of: list[int] = []
        if any(source.take for source in pool.sources):
            self._of = pool.table["source"].take(pa.array(ranked, pa.int64())).to_pylist()

    def allow(self, place: int) -> bool:
        """Return whether the source of the row at this place may give it."""
        return not self._of or self._left[self._of[place]] > 0

    def use(self, place: int) -> None:
        """Count a row that was taken."""
        if self._of:
            self._left[self._of[place]] -= 1


def _take(pool: Pool, ranked: list[int], section: Select, seed: int) -> tuple[list[int], list[Duplicate], int]:
    """Return the rows taken, in rank order, the duplicates skipped, and how many of these were no exact ones.

    Duplicates are skipped while taking, so that few rows are compared; only near-duplicates need all rows at once.
    """
    wanted = section.take or len(ranked)
    quotas = _Quotas(pool, ranked)
    near = NearDuplicates(_exchanges(pool, ranked), section.near_duplicate_similarity) if (
        section.deduplicate == "near") else None  # fmt: skip
    accepted = near or ExactDuplicates()
    taken: list[int] = []
    skipped: list[tuple[int, int]] = []
    seen: set[int] = set()
    for places, quota in _visits(len(ranked), wanted, section.method, seed):
        found = 0
        for place, row in _lazily(pool, ranked, (place for place in places if place not in seen)):
            if found == quota or len(taken) == wanted:
                break
            seen.add(place)
            if not quotas.allow(place):
                continue
            earlier = None if section.deduplicate == "none" else accepted.add(place, row)
            if earlier is None:
                taken.append(place)
                quotas.use(place)
                found += 1
            else:
                skipped.append((place, earlier))
    ids = pool.table["id"].take(pa.array([ranked[place] for pair in skipped for place in pair], pa.int64())).to_pylist()
    pairs = [Duplicate(*pair) for pair in zip(ids[::2], ids[1::2], strict=True)]
    return [ranked[place] for place in sorted(taken)], pairs, near.by_grams if near else 0


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
        f"WARNING: {text}. Look at some of them (data --json lists all pairs); select.deduplicate: exact keeps rows "
        "that only have much in common."
    )


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


def _lazily(pool: Pool, ranked: list[int], places: Iterable[int]) -> Iterator[tuple[int, Exchange]]:
    """Yield places with their rows; rows become Python objects one block at a time."""
    places = iter(places)
    while block := list(itertools.islice(places, _BLOCK)):
        yield from zip(block, _exchanges(pool, [ranked[place] for place in block]), strict=True)


def _exchanges(pool: Pool, rows: list[int]) -> list[Exchange]:
    table = pool.table.select(["prompt", "response"]).take(pa.array(rows, pa.int64()))
    return [Exchange(*row) for row in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)]
