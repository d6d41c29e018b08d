"""From ranks to rows: which places of the ranking are visited, in what order, and what a row is passed over for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common import seeds
from fast_ft.common.errors import InputError
from fast_ft.data.diversity import Diversity
from fast_ft.data.duplicates import ExactDuplicates, Exchange, NearDuplicates
from fast_ft.data.examples import Pool
from fast_ft.recipe.schema import Select

_BLOCK = 256  # rows turned into Python objects at a time while taking


class PassedOver(NamedTuple):
    """A row that was passed over, as a position in the pool, why, and the row taken before it that it is like.

    why: duplicate, near-duplicate, verb, opening or topic (select.diversify's), source (its `take` was reached), or,
    of a row that was taken first, overlong or unencodable.
    """

    row: int
    why: str
    like: int | None


@dataclass(frozen=True)
class Taken:
    """Positions in the pool, best rank first; what was passed over; how many of these were near but not equal."""

    indices: list[int]
    passed_over: list[PassedOver]
    near: int


def take(pool: Pool, ranked: list[int], section: Select, seed: int) -> Taken:
    """Take rows as select.method says.

    Duplicates and rows of a kind that is full are passed over while taking, so that few rows are compared; only
    near-duplicates and topics need all rows at once. Raises InputError for strata of a metric that orders nothing.
    """
    wanted = section.take or len(ranked)
    quotas = _Quotas(pool, ranked)
    everything = _exchanges(pool, ranked) if section.deduplicate == "near" or section.diversify.topic else []
    near = NearDuplicates(everything, section.near_duplicate_similarity) if section.deduplicate == "near" else None
    accepted = near or (ExactDuplicates() if section.deduplicate == "exact" else None)
    diversity = Diversity(everything, section.diversify)
    taken: list[int] = []
    over: list[tuple[int, str, int | None]] = []
    seen: set[int] = set()
    for places, quota in _visits(pool, ranked, wanted, section, seed, seen):
        if len(taken) == wanted:
            break
        found = 0
        for place, row in _lazily(pool, ranked, (place for place in places if place not in seen)):
            if found == quota or len(taken) == wanted:
                break
            seen.add(place)
            if not quotas.allow(place):
                over.append((place, "source", None))
            elif crowded := diversity.crowded(place, row):
                over.append((place, *crowded))
            elif accepted is not None and (earlier := accepted.add(place, row)) is not None:
                over.append((place, "near-duplicate" if near else "duplicate", earlier))
            else:
                taken.append(place)
                quotas.use(place)
                diversity.take(place)
                found += 1
    passed_over = [PassedOver(ranked[place], why, None if like is None else ranked[like]) for place, why, like in over]
    return Taken([ranked[place] for place in sorted(taken)], passed_over, near.by_grams if near else 0)


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


def _visits(
    pool: Pool, ranked: list[int], wanted: int, section: Select, seed: int, seen: set[int]
) -> Iterator[tuple[Iterable[int], int]]:
    """Yield (places in the ranking, how many of them to accept); the last pair fills what was left open.

    seen: the places visited so far, which grows between two pairs.
    """
    count = len(ranked)
    everything = list(range(count))
    if section.method == "middle":  # from the centre outwards, so that the rows taken are the central ones
        everything.sort(key=lambda place: abs(2 * place - (count - 1)))
    elif section.method == "random":
        seeds.generator(seed).shuffle(everything)
    elif section.method == "stratified" and wanted < count:
        if section.strata:
            yield from _in_turn(_cells(pool, ranked, section.strata), seen)
            return
        for stratum in range(wanted):
            places = list(range(stratum * count // wanted, (stratum + 1) * count // wanted))
            centre = (places[0] + places[-1]) / 2
            yield sorted(places, key=lambda place: abs(place - centre)), 1
    yield everything, wanted


def _in_turn(cells: list[list[int]], seen: set[int]) -> Iterator[tuple[Iterable[int], int]]:
    """Yield one row's turn of each cell, again and again, while any cell has rows: a small cell's share goes on."""
    starts = [0] * len(cells)
    while any(start < len(cell) for start, cell in zip(starts, cells, strict=True)):
        for number, cell in enumerate(cells):
            while starts[number] < len(cell) and cell[starts[number]] in seen:
                starts[number] += 1
            yield itertools.islice(cell, starts[number], None) if starts[number] < len(cell) else (), 1


def _cells(pool: Pool, ranked: list[int], strata: dict[str, int | tuple[float, ...]]) -> list[list[int]]:
    """Return the places of each cell that holds rows, best rank first; a row without a value is in no cell.

    A border is its upper part's: with borders [120, 200] a row of 120 words is in the second of three parts.
    """
    parts: list[list[int | None]] = []
    for name, borders in strata.items():
        values = pool.table[name].take(pa.array(ranked, pa.int64())).cast(pa.float64())
        if isinstance(borders, int):
            order = sorted((place for place, value in enumerate(values.to_pylist()) if value is not None),
                           key=lambda place: values[place].as_py())  # fmt: skip
            part: list[int | None] = [None] * len(ranked)
            for at, place in enumerate(order):
                part[place] = at * borders // len(order)
            parts.append(part)
        else:
            above = [pc.cast(pc.greater_equal(values, border), pa.int64()) for border in borders]
            total = above[0]
            for each in above[1:]:
                total = pc.add(total, each)
            parts.append(total.to_pylist())
    cells: dict[tuple[int | None, ...], list[int]] = {}
    for place, cell in enumerate(zip(*parts, strict=True)):
        if None not in cell:
            cells.setdefault(cell, []).append(place)
    if not cells:
        raise InputError(f"select.strata: no row has a value of {' and of '.join(strata)}. Name other metrics.")
    return [cells[key] for key in sorted(cells, key=lambda key: [part or 0 for part in key])]


def _lazily(pool: Pool, ranked: list[int], places: Iterable[int]) -> Iterator[tuple[int, Exchange]]:
    """Yield places with their rows; rows become Python objects one block at a time, each block larger."""
    places, size = iter(places), 4
    while block := list(itertools.islice(places, size)):
        size = min(2 * size, _BLOCK)
        yield from zip(block, _exchanges(pool, [ranked[place] for place in block]), strict=True)


def _exchanges(pool: Pool, rows: list[int]) -> list[Exchange]:
    table = pool.table.select(["prompt", "response"]).take(pa.array(rows, pa.int64()))
    return [Exchange(*row) for row in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)]
