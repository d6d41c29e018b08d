"""Rows dealt to micro-batches: the same piles as a search through all of them finds, in far fewer looks."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from fast_ft.plan.micro_batches import cut, share

LENGTHS = st.lists(st.integers(0, 40), max_size=24)


def dealt(lengths: list[int], count: int, most_rows: int, limit: float) -> list[list[int]] | None:
    """The longest row first, each to the pile that has least and room for it."""
    piles: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        sums = [sum(lengths[i] for i in pile) for pile in piles]
        room = [k for k in range(count) if len(piles[k]) < most_rows and sums[k] + lengths[index] <= limit]
        if not room:
            return None
        piles[min(room, key=sums.__getitem__)].append(index)
    return [sorted(pile) for pile in piles]


@settings(max_examples=300)
@given(LENGTHS, st.integers(1, 6), st.none() | st.integers(1, 90))
def test_micro_batches_are_the_fewest_that_a_search_finds(
    lengths: list[int], most_rows: int, most_tokens: int | None
) -> None:
    found = cut(lengths, most_rows=most_rows, most_tokens=most_tokens)
    limit = max([math.inf if most_tokens is None else most_tokens, *lengths])
    tried = (dealt(lengths, count, most_rows, limit) for count in range(1, len(lengths) + 1))
    expected = next((piles for piles in tried if piles is not None), [])
    assert sorted(found) == sorted(expected)
    assert sorted(index for pile in found for index in pile) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 8))
def test_processes_share_rows_as_a_search_deals_them(lengths: list[int], size: int) -> None:
    expected = dealt(lengths, size, max(1, len(lengths)), math.inf)
    assert sorted(share(lengths, size)) == sorted(expected or [])
