"""Which differences between two texts do not count: the one fold of the duplicates and of the contamination check.

Case, spaces, typographic quotes and the punctuation of sentences fold. Symbols, digits, signs and combining marks do
not: C, C++ and C# stay three words, -5 is not 5, 1.23 is not 123, and 5! is not 5.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence

import pyarrow as pa

from fast_ft.common import words as text_words
from fast_ft.common.text_safety import whole

_SPACES = re.compile(r"[\s\u200b\u2060\ufeff]+")  # some of them have no width
_QUOTES = str.maketrans("‘’‚‛ʼ“”„‟«»‹›", "'''''" + '"' * 8)
#: Punctuation of scripts without spaces, which stands between two letters; behind a digit it may be a sign.
_WIDE = re.compile(r"(?<!\d)[。｡．！？，､、；：]+|[。｡，､、；「」『』《》〈〉]+")
_FRENCH = re.compile(r"[\u00a0\u202f]+(?=[!?:;\"])")  # the space before a mark, which does not break a line
_LOUD = "!！\"'"  #: behind a digit, a bracket or a single letter these are signs: 5!, (n + 1)!, y'
_OPEN = "\"'¿¡"  #: what may stand before a word
#: Runs of marks. The pattern takes each of them whole, so that a long one costs no more than other text.
_RUN = re.compile(f"[{re.escape(text_words.FINAL + ',;:،؛·' + _LOUD + _OPEN)}]+")
_TWO_LETTERS = re.compile(r"[^\W\d_]{2}")
_ENDS = re.compile(f"[{re.escape(text_words.FINAL)}]")
_ASKS = "?？؟⁇⁈՞፧"


def folded(texts: Sequence[str]) -> list[str]:
    """Return the texts as they are compared: words with one space between them."""
    plain = [_plain(text) for text in texts]
    wide = [index for index, text in enumerate(plain) if not text.isascii()]
    if wide:
        marked = [_RUN.sub(_without_marks, plain[index]) for index in wide]
        spaced = text_words.spaced(pa.chunked_array([pa.array(marked, pa.string())]))
        for index, text in zip(wide, spaced.to_pylist(), strict=True):
            plain[index] = text
    return [" ".join(_RUN.sub(_without_marks, text).split()) for text in plain]


def fold(text: str) -> str:
    """Return a text as it is compared; see `folded`."""
    return folded([text])[0]


def same_kinds(one: str, other: str) -> bool:
    """Return whether two texts of the same fold are sentences of the same kinds.

    "Hello!" and "Hello?" are not: a question mark stands where the other text has another mark. "Hello" is like both.
    """
    if one == other:
        return True
    kinds = [[mark in _ASKS for mark in _ENDS.findall(text)] for text in (one, other)]
    return len(kinds[0]) != len(kinds[1]) or kinds[0] == kinds[1]


def ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """Return the n-grams of a list of words; a shorter list is one gram."""
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def _without_marks(run: re.Match[str]) -> str:
    """Return what stays of a run of marks: nothing at a word's beginning or end, but for signs; else all of it."""
    text, start, end = run.string, run.start(), run.end()
    begins, ends = start == 0 or text[start - 1].isspace(), end == len(text) or text[end].isspace()
    if begins == ends:  # within a word (1.23), or a word of marks alone
        return run[0]
    if begins:
        return "" if all(mark in _OPEN for mark in run[0]) else run[0]
    last = text[start - 1]
    if not last.isascii() or (last.isalnum() and _TWO_LETTERS.search(text[max(0, start - 40) : start].split()[-1])):
        return ""
    return "".join(itertools.takewhile(lambda mark: mark in _LOUD, run[0]))


def _plain(text: str) -> str:
    """Return a text in lower case, with spaces and quotes of one kind; marks between two letters become spaces."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFC", whole(text)).casefold()
    text = _FRENCH.sub("", text.translate(_QUOTES))
    return _SPACES.sub(" ", _WIDE.sub(" ", text))
