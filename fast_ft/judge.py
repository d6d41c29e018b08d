"""Scores. The reference judge compares answers with reference answers, without any network.

Exact match and ROUGE-L can tell whether a short answer is the expected one. They cannot tell whether a long answer
is good: a right answer in other words scores low.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from fast_ft.errors import InputError


def by_reference(
    answers: Mapping[str, str], references: Mapping[str, str], skills: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return scores.json's content: exact match and ROUGE-L (F1), both 0 to 1, per prompt, per skill and in all.

    `mean` is the share of exact matches. InputError where an answered prompt has no reference.
    """
    from rouge_score import rouge_scorer

    missing = [key for key in answers if key not in references]
    if missing:
        raise InputError(
            f"judge.references: no reference answer for {len(missing)} of {len(answers)} prompts, such as "
            f"{missing[0]!r}. References are matched by id."
        )
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    prompts = {
        key: {
            "exact_match": normalised(answer) == normalised(references[key]),
            "rouge_l": round(scorer.score(references[key], answer)["rougeL"].fmeasure, 4),
        }
        for key, answer in answers.items()
    }
    by_skill: dict[str, list[dict[str, Any]]] = {}
    for key, score in prompts.items():
        if (skill := skills.get(key)) is not None:
            by_skill.setdefault(skill, []).append(score)
    total = _total(list(prompts.values()))
    return {
        "kind": "reference",
        "mean": total["exact_match"],
        **total,
        "by_skill": {skill: _total(scores) for skill, scores in sorted(by_skill.items())},
        "prompts": prompts,
    }


def normalised(text: str) -> str:
    """Return the text that exact match compares: without case, outer spaces and final punctuation."""
    return text.strip().lower().rstrip(string.punctuation + " ")


def _total(scores: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "count": len(scores),
        "exact_match": round(fmean(score["exact_match"] for score in scores), 4),
        "rouge_l": round(fmean(score["rouge_l"] for score in scores), 4),
    }
