"""When two texts count as the same: normalised words and n-grams, for duplicates and for the leakage certificate."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Literal

from fast_ft.common import words as text_words
from fast_ft.data.examples import Example
from fast_ft.data.formats import strip_lead

GRAM_WORDS = 5


def normalise(text: str) -> str:
    """Return the text's words in lower case, without punctuation, one space between; symbols alone stay as they are."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip() or text.strip()


def words_of(normalised: str) -> list[str]:
    """Return the words of a normalised text; where a script has no spaces, each letter is a word (common/words.py)."""
    return normalised.split() if normalised.isascii() else text_words.words(normalised)


def ngrams(words: list[str], n: int) -> set[tuple[str, ...]]:
    """Return the n-grams of a list of words; a shorter list is one gram."""
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


class Duplicates:
    """The rows accepted so far, and whether the next one duplicates any of them.

    exact: a row is a duplicate where prompt and response are the same but for case, spaces and punctuation. near: also
    where the prompt is the same, or where the 5-gram sets of prompt and response have a Jaccard similarity of at least
    `threshold`, computed exactly. An index from gram to accepted rows keeps the work near-linear.
    """

    def __init__(self, method: Literal["none", "exact", "near"], threshold: float) -> None:
        self.method, self.threshold = method, threshold
        self._keys: set[tuple[str, ...]] = set()
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._sizes: list[int] = []

    def add(self, example: Example) -> bool:
        """Accept the row and return True, or return False where it duplicates an accepted one."""
        if self.method == "none":
            return True
        prompt, response = normalise(strip_lead(example.prompt)), normalise(example.response)
        key = (prompt,) if self.method == "near" else (prompt, response)
        if key in self._keys:
            return False
        if self.method == "near":
            grams = ngrams(words_of(f"{prompt} {response}"), GRAM_WORDS)
            shared = Counter(row for gram in grams for row in self._holders.get(gram, ()))
            for row, common in shared.items():
                if common / (len(grams) + self._sizes[row] - common) >= self.threshold:
                    return False
            for gram in grams:
                self._holders[gram].append(len(self._sizes))
            self._sizes.append(len(grams))
        self._keys.add(key)
        return True
