"""How long a trial will take: by the trials measured so far, or else by the planner's projection."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from fast_ft.common import gpu
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import PreparedData
from fast_ft.plan import cards, planner
from fast_ft.recipe.schema import Recipe

MARGIN = 1.1  #: a trial is begun where the time left is at least this multiple of its price

_END = 5.0  #: seconds for the page and for what is written at the end


@dataclass(frozen=True)
class Work:
    """What a trial has to do: tokens to train on, prompts to answer, and how long an answer may be."""

    tokens: int
    prompts: int
    max_new_tokens: int


@dataclass(frozen=True)
class Measured:
    """What a trial did and took, in seconds: loading the base, optimizer steps, answers, all of it."""

    work: Work
    steps: float
    answers: float
    all: float
    load: float = 0.0


def measured(records: list[dict[str, Any]]) -> list[Measured]:
    """Return what finished trials took, by the study's records."""
    return [
        Measured(Work(*record["work"]), **record["took"])
        for record in records
        if record["state"] == "finished" and not record.get("repeats")
    ]


def work(recipe: Recipe, prepared: PreparedData, *, trained: bool, prompts: int | None = None) -> Work:
    """Return a trial's work. trained: its adapter is there already. prompts: how many, where not all are answered."""
    jobs = [] if trained else prepared.jobs
    tokens = sum(sum(step) for job in jobs for step in job.lengths)
    return Work(tokens, len(prepared.prompts) if prompts is None else prompts, recipe.generate.max_new_tokens)


def seconds(work: Work, measured: list[Measured], *, loaded: bool = True) -> float | None:
    """Return what this work will take, or None while nothing was measured. loaded: the worker has the base already.

    Steps scale with tokens, at the median rate. Answers scale with prompts, at the slowest rate seen, and with the
    tokens allowed where those are more than any measured trial's: nobody knows how long an untrained model talks.
    """
    if not measured:
        return None
    trained = [m for m in measured if m.work.tokens]
    answered = [m for m in measured if m.work.prompts]
    per_token = statistics.median(m.steps / m.work.tokens for m in trained) if trained else 0.0
    per_prompt = 0.0
    if answered:
        slowest = max(answered, key=lambda m: m.answers / m.work.prompts)
        longest = max(m.work.max_new_tokens for m in answered)
        per_prompt = slowest.answers / slowest.work.prompts * max(1.0, work.max_new_tokens / longest)
    rest = statistics.median(max(0.0, m.all - m.load - m.steps - m.answers) for m in measured)
    if not loaded:
        rest += max(m.load for m in measured)
    return rest + per_token * work.tokens + per_prompt * work.prompts


def reserve(prompts: int, max_new_tokens: int, measured: list[Measured]) -> float:
    """Return the seconds that a sweep's end needs: the best recipe's answers to the test prompts, and the page.

    max_new_tokens: of the recipe, where no trial was measured yet.
    """
    longest = max((m.work.max_new_tokens for m in measured), default=max_new_tokens)
    return _END + 1.2 * (seconds(Work(0, prompts, longest), measured) or 0.0)


def projected(recipe: Recipe, prepared: PreparedData) -> float | None:
    """Return the planner's projection of training for the card here, in seconds; None on a CPU or an unknown card."""
    name = _card_name(recipe)
    if name is None:
        return None
    try:
        minutes: Any = planner.describe(recipe, prepared, name).get("projected_minutes")
    except InputError:
        return None
    return 60.0 * minutes[1] if minutes else None


def _card_name(recipe: Recipe) -> str | None:
    here = gpu.gpu()
    if here is None:
        return None
    return cards.short_name(here["name"]) or recipe.budget.gpu
