"""How many rows of one kind are taken: kinds are found in the rows' own texts, and in no list of ours.

A row has a verb (its prompt's first word), an opening (its response's first three words) and a topic. A topic is led by
the first row taken of it. Another row is of the topic of the leader that it is most alike, if it is as alike as
`topic_similarity`: the cosine of both texts' words, weighted by how often they stand in the text (1 + log) and by how
few of all candidates hold them (log N / n), as in tf-idf. A topic grows around its leader alone, so chains of rows that
are each like the next do not become one topic. The same rows in the same order give the same topics.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence

from fast_ft.data.duplicates import Exchange
from fast_ft.data.folding import fold, folded
from fast_ft.data.formats import strip_lead
from fast_ft.recipe.schema import Diversify

OPENING_WORDS = 3
_WORD = re.compile(r"[^\W\d_]+")


class Diversity:
    """The kinds of the rows taken so far. All candidates are known beforehand, since they say which words are rare."""

    def __init__(self, rows: Sequence[Exchange], section: Diversify) -> None:
        self._most = {name: most for name in ("verb", "opening", "topic") if (most := getattr(section, name))}
        self._taken: dict[tuple[str, str | int], list[int]] = defaultdict(list)
        self._topics = _Topics(rows, section.topic_similarity) if section.topic else None
        self._of: dict[int, dict[str, str | int]] = {}  # the kinds of a row that was asked for

    def crowded(self, place: int, row: Exchange) -> tuple[str, int] | None:
        """Return (verb, opening or topic; place of the first row of that kind) where a limit keeps the row out."""
        kinds = self._of[place] = self._kinds(place, row)
        for name, most in self._most.items():
            if name in kinds and len(there := self._taken[name, kinds[name]]) >= most:
                return name, there[0]
        return None

    def take(self, place: int) -> None:
        """Count a row that was taken, after `crowded` was asked about it."""
        for name, kind in self._of[place].items():
            self._taken[name, kind].append(place)
        if self._topics is not None and self._of[place]["topic"] == place:
            self._topics.lead(place)

    def _kinds(self, place: int, row: Exchange) -> dict[str, str | int]:
        kinds: dict[str, str | int] = {}
        if "verb" in self._most and (prompt := fold(strip_lead(row.prompt)).split()):
            kinds["verb"] = prompt[0]
        if "opening" in self._most:
            kinds["opening"] = " ".join(fold(row.response).split()[:OPENING_WORDS])
        if self._topics is not None:
            kinds["topic"] = self._topics.of(place)
        return kinds


class _Topics:
    """The leaders so far, by number, and the candidates' weighted words."""

    def __init__(self, rows: Sequence[Exchange], similarity: float) -> None:
        texts = zip(
            folded([strip_lead(row.prompt) for row in rows]), folded([row.response for row in rows]), strict=True
        )
        self._counts = [Counter(_WORD.findall(f"{prompt} {response}")) for prompt, response in texts]
        self._holders = Counter(word for counts in self._counts for word in counts)
        self._similarity = similarity
        self._leaders: list[int] = []  # their places
        #: A word's leaders, by number, and its weight in each.
        self._index: dict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))

    def of(self, place: int) -> int:
        """Return the place of the leader of a row's topic; the row's own place if it would lead one."""
        import numpy as np  # which only topics need

        alike = np.zeros(len(self._leaders) or 1)
        for word, weight in self._weights(place).items():
            if word in self._index:
                numbers, weights = (np.frombuffer(each, each.typecode) for each in self._index[word])
                alike[numbers] += weight * weights
        best = int(alike.argmax())
        return self._leaders[best] if self._leaders and 0 < alike[best] >= self._similarity else place

    def lead(self, place: int) -> None:
        """Let a row lead a topic."""
        for word, weight in self._weights(place).items():
            numbers, weights = self._index[word]
            numbers.append(len(self._leaders))
            weights.append(weight)
        self._leaders.append(place)

    def _weights(self, place: int) -> dict[str, float]:
        """Return the weights of a row's words, of length 1 together; a word of one row or of all rows has none."""
        rows = len(self._counts)
        weights = {
            word: (1 + math.log(count)) * math.log(rows / holders)
            for word, count in self._counts[place].items()
            if 1 < (holders := self._holders[word]) < rows
        }
        length = math.sqrt(sum(weight * weight for weight in weights.values()))
        return {word: weight / length for word, weight in weights.items()}
