"""The reference judge: compares an answer with the reference answer's text. No network, no model.

It can tell whether a short answer is the expected one. It cannot tell whether a long answer is good: a right answer in
other words scores low, and a wrong one in the same words scores high.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from fast_ft.common import words
from fast_ft.common.wording import counted
from fast_ft.judge.scoring import Item, Judgment

NOTES = [
    "Exact match, ROUGE-L and chrF compare an answer's text with one reference answer: they can tell whether a short "
    "answer is the expected one, not whether a long one is good. A right answer in other words scores low.",
]


class ReferenceJudge:
    """Judge by text. ROUGE-L (F1) and chrF are 0 to 1.

    The score is 1 for an exact match, else 0. With a `pattern`, a regular expression, it is 1 where all of the answer
    matches.
    """

    concurrency = 1

    def __init__(self, pattern: str | None = None) -> None:
        from rouge_score import rouge_scorer
        from sacrebleu.metrics import CHRF

        self._rouge = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Tokenizer())
        self._chrf = CHRF()
        self._pattern = None if pattern is None else re.compile(pattern)

    def __call__(self, question: str, reference: str | None, answer: str) -> Judgment:
        assert reference is not None, "lint refuses a reference judge without references"
        same = words.short_form(answer) == words.short_form(reference)
        manner = {} if self._pattern is None else {"matches": self._pattern.fullmatch(answer) is not None}
        return Judgment(
            float(manner.get("matches", same)),
            {
                **manner,
                "exact_match": same,
                "rouge_l": round(self._rouge.score(reference, answer)["rougeL"].fmeasure, 4),
                "chrf": round(self._chrf.sentence_score(answer, [reference]).score / 100, 4),
                "length_ratio": round(len(words.words(answer)) / max(1, len(words.words(reference))), 4),
            },
        )

    def print_forecast(self, items: Sequence[Item], *, ask_again: bool = False) -> None:
        """Print what judging would take."""
        print(f"{counted(len(items), 'answer')} to compare with references; no network, no cost")

    def asking(
        self, items: Sequence[Item], *, ask_again: bool = False, backoff: float = 1.0
    ) -> AbstractContextManager[None]:
        """Judge within this; there is nothing to open."""
        return contextlib.nullcontext()

    def stop(self) -> None:
        """Do nothing: no call of this judge takes long."""

    def facts(self) -> dict[str, Any]:
        """Return what scores.json says of the judge."""
        return {"notes": NOTES}

    def totals(self, prompts: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing more than what `summarise` counts."""
        return {}


class _Tokenizer:
    """ROUGE's words in any script; rouge_score's own keeps a to z and digits only."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text, as rouge_score asks for them."""
        return words.terms(text)
