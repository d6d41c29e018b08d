"""Which rows are duplicates of rows before them: the same but for what folds away, or nearly the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from fast_ft.data.folding import folded, same_kinds
from fast_ft.data.formats import strip_lead


class Exchange(NamedTuple):
    """What is compared of a row."""

    prompt: str
    response: str


class ExactDuplicates:
    """The rows accepted so far, by prompt and response without case, spaces and the punctuation of sentences."""

    def __init__(self) -> None:
        self._accepted: dict[Exchange, list[tuple[int, Exchange]]] = defaultdict(list)

    def add(self, place: int, row: Exchange, key: Exchange | None = None) -> int | None:
        """Accept the row and return None, or return the place of the accepted row that it duplicates.

        key: the row, folded, where that is known.
        """
        same = self._accepted[key or Exchange(*folded((strip_lead(row.prompt), row.response)))]
        for earlier, other in same:
            if all(same_kinds(*texts) for texts in zip(row, other, strict=True)):
                return earlier
        same.append((place, row))
        return None


class NearDuplicates:
    """The rows accepted so far, by their 5-grams of words; a row that is an exact duplicate is a near one too.

    A row is a near-duplicate where its response, and its prompt and response together, are as alike as `threshold`
    (Jaccard similarity, computed exactly): the same prompt with another answer is another row. All candidates are known
    beforehand, so that a gram of many rows does not count (data/shingles.py). An index from gram to accepted rows keeps
    the work near-linear.
    """

    def __init__(self, rows: Sequence[Exchange], threshold: float) -> None:
        from fast_ft.data.shingles import Shingles, similarity  # numpy, which only this method needs

        self._threshold, self._exact, self._similarity = threshold, ExactDuplicates(), similarity
        texts = folded([strip_lead(row.prompt) for row in rows]), folded([row.response for row in rows])
        self._keys = [Exchange(*pair) for pair in zip(*texts, strict=True)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(self._keys))}
        self._numbers = [numbers[key] for key in self._keys]  # rows of the same words are one text, and share its grams
        self._sides = [Shingles(side) for side in zip(*numbers, strict=True)]
        self._holders: list[dict[int, list[int]]] = [defaultdict(list), defaultdict(list)]
        self._accepted: dict[int, int] = {}
        self.by_grams = 0  #: rows that are no exact duplicates

    def add(self, place: int, row: Exchange) -> int | None:
        """Accept the row and return None, or return the place of the accepted row that it duplicates."""
        earlier = self._exact.add(place, row, self._keys[place])
        if earlier is not None:
            return earlier
        number = self._numbers[place]
        shared = [side.shared(number) for side in self._sides]
        if (earlier := self._alike(number, shared)) is not None:
            self.by_grams += 1
            return earlier
        if number not in self._accepted:
            self._accepted[number] = place
            for grams, holders in zip(shared, self._holders, strict=True):
                for gram in grams:
                    holders[gram].append(number)
        return None

    def _alike(self, number: int, shared: list[list[int]]) -> int | None:
        """Return the place of an accepted row of other words that is as alike as the threshold."""
        common = [
            Counter(other for gram in grams for other in holders.get(gram, ()))
            for grams, holders in zip(shared, self._holders, strict=True)
        ]
        for other in sorted(common[0].keys() | common[1].keys()):
            sides = [(grams, shared[other]) for grams, shared in zip(self._sides, common, strict=True)]
            alike = (self._similarity(part, number, other) for part in (sides[1:], sides))
            if other != number and all(each >= self._threshold for each in alike):
                return self._accepted[other]
        return None
