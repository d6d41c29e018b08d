"""5-grams of words as numbers, for all rows at once: which of them tell rows apart, and how alike two rows are.

A gram that many rows hold, such as an instruction above each ticket, says nothing about one of them and does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

GRAM_WORDS = 5
#: A gram counts where at most this number of rows hold it, or this part of all rows, whichever is more.
FEW_ROWS, FEW_PART = 3, 1e-3
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, and its bits look random: 2**64 over the golden ratio


class Shingles:
    """The grams of one text of each row. Those that few rows hold are a row's own; all others do not count."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Take folded texts, one of each row."""
        self._grams, self._ends = _hashed(texts)
        _, where, holders = np.unique(self._grams, return_inverse=True, return_counts=True)
        few = max(FEW_ROWS, int(len(texts) * FEW_PART))
        self._own = holders[where] <= few
        self._shared = self._own & (holders[where] > 1)

    def shared(self, row: int) -> list[int]:
        """Return a row's own grams that other rows hold, too."""
        place = self._place(row)
        return self._grams[place][self._shared[place]].tolist()

    def own(self, row: int) -> int:
        """Return the number of a row's own grams."""
        return int(np.count_nonzero(self._own[self._place(row)]))

    def all(self, one: int, other: int) -> tuple[int, int, int]:
        """Return how many grams two rows share, and how many each has, those of many rows among them."""
        grams = [self._grams[self._place(row)] for row in (one, other)]
        return len(np.intersect1d(grams[0], grams[1], assume_unique=True)), len(grams[0]), len(grams[1])

    def _place(self, row: int) -> slice:
        return slice(self._ends[row], self._ends[row + 1])


class _Numbers(dict[str, int]):
    def __missing__(self, word: str) -> int:
        self[word] = number = len(self) + 1
        return number


def _hashed(texts: Sequence[str]) -> tuple[NDArray[np.uint64], list[int]]:
    """Return all texts' distinct grams one behind the other, and where each text's end; 0 is the first of the ends.

    A text of fewer words is one gram.
    """
    numbers = _Numbers()
    rows = [list(map(numbers.__getitem__, text.split())) for text in texts]
    rows = [row if len(row) >= GRAM_WORDS else row + [0] * (GRAM_WORDS - len(row)) for row in rows]
    words = np.fromiter(chain.from_iterable(rows), np.uint64)
    grams = np.zeros(max(0, len(words) - GRAM_WORDS + 1), np.uint64)
    for offset in range(GRAM_WORDS):
        grams = (grams ^ words[offset : offset + len(grams)]) * _FACTOR
        grams ^= grams >> np.uint64(29)
    distinct, ends, start = [], [0], 0
    for row in rows:  # the grams that reach over a text's end are left out
        distinct.append(np.unique(grams[start : start + len(row) - GRAM_WORDS + 1]))
        ends.append(ends[-1] + len(distinct[-1]))
        start += len(row)
    return np.concatenate(distinct), ends


def similarity(sides: Sequence[tuple[Shingles, int]], one: int, other: int) -> float:
    """Return the Jaccard similarity of two rows' own grams over some texts of theirs.

    sides: each text's grams, and how many own ones the rows share. Where one row has no own gram, all grams count: a
    text that many rows have is still the same text.
    """
    common = sum(shared for _, shared in sides)
    sizes = [sum(grams.own(row) for grams, _ in sides) for row in (one, other)]
    if not all(sizes):
        common, *sizes = (sum(each) for each in zip(*(grams.all(one, other) for grams, _ in sides), strict=True))
    return common / (sum(sizes) - common)
