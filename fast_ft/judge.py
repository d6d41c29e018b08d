"""Scores: how good are the answers? `python -m fast_ft judge RUN_DIR`, and the last phase of a run.

scores.json (every number rounded to 4 decimals; null where there is none):

    kind            "reference" or "openai"
    mean            mean of the prompts' scores: 0 to 1 (reference: the share of exact matches), 1 to 10 (openai)
    low, high       its 95 % bootstrap interval over the prompts; null below 10 scored prompts
    count           prompts; missing: those without a score; missing_share: their share
    by_skill        {skill: {mean, low, high, count, missing, missing_share}}, where the test file has skills
    by_difficulty   {"1" ... "10": the same}, where it has difficulties; both {} where it has none
    prompts         {prompt id: {score, ...}}; score is null where the judge's reply could not be read
    notes           [sentence]: what these scores can and cannot tell
    pred            digest of the pred.json that was judged
    base            the base model's answers, where base_pred.json has some: mean to missing_share, by_skill,
                    by_difficulty and prompts as above, and `gain`: tuned against base, like `against`
    against         another run (--against), else absent: {run, count, mean, other_mean, difference, low, high, wins,
                    ties, losses, more_than_noise, sentence}; difference is this run minus the other, over `count`
                    prompts that both answered and that both have scores; more_than_noise is null below 10 of them

kind "reference" adds exact_match, rouge_l, chrf (0 to 1) and length_ratio (words of the answer by words of the
reference) to the whole, to each group and to each prompt, whose exact_match is true or false.

kind "openai" adds

    model, endpoint, rubric   what judged: endpoint is the URL without credentials; rubric "pairwise-1" or "single-1"
    scale           [1, 10]
    labelled        "pairwise, against reference answers" or "single answer, without references"
    reference_mean  mean score that the judge gave the reference answers; null for single
    baselines       {"simple": 2.4, "medium": 4.15, "strong": 4.4}: the homework's; pairwise only, else absent
    swapped         null, or with judge.swap {"order_effect": mean score with the answer first minus with it second}
    asked           {requests, cached, prompt_tokens, completion_tokens, dollars}: of this command; dollars may be null

and to each prompt reference_score, reply (the judge's words, whole; null where no reply came), problem (why there is
no score, else absent) and, with judge.swap, swapped: {score, reference_score, reply}; score is then the mean of both
orders.
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
