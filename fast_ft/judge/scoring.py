"""Scores: how good are the answers? `python -m fast_ft judge RUN_DIR`, and the last phase of a run.

scores.json (every number rounded to 4 decimals; null where there is none):

    kind            "reference" or "openai"
    mean            mean of the prompts' scores: 0 to 1 (reference: the share that matches), 1 to 10 (openai)
    low, high       its 95 % bootstrap interval over the prompts; null below 10 scored prompts or where
                    all scores are equal
    count           prompts; missing: those without a score; missing_share: their share
    by_skill        {skill: {mean, low, high, count, missing, missing_share}}, where the test file has skills
    by_difficulty   {"1" ... "10": the same}, where it has difficulties; both {} where it has none
    prompts         {prompt id: {score, ...}}; score is null where the judge's reply could not be read
    notes           [sentence]: what these scores can and cannot tell
    pred            digest of the pred.json that was judged
    base            the base model's answers, where base_pred.json has some, else absent: mean to missing_share,
                    by_skill, by_difficulty and prompts as above
    gain            this run against the base model, like `against`; absent with base
    against         another run (--against), else absent: {run, count, mean, other_mean, difference, low, high, wins,
                    ties, losses, more_than_noise, sentence}; difference is this run minus the other, over `count`
                    prompts that both answered and that both have scores; more_than_noise is null below 10 of them

kind "reference" adds exact_match, rouge_l, chrf (0 to 1) and length_ratio (words of the answer by words of the
reference) to the whole, to each group and to each prompt, whose exact_match is true or false. With judge.pattern it
adds matches, which is then the score.

kind "openai" adds

    model, answered_by, endpoint, rubric   what judged: the name asked for, the names that the server gave, its URL
                    (no credentials), and "pairwise-1", "single-1" or "ntu-ml-2025-hw5-1"
    asked_with      the form of the requests, in words, as the server asked for it; null where nothing was asked
    scale           [1, 10]
    labelled        "pairwise, against reference answers" or "single answer, without references"
    reference_mean  mean score that the judge gave the reference answers; null for single
    baselines       {"simple": 2.4, "medium": 4.15, "strong": 4.4}: the homework's; pairwise only, else absent
    swapped         null, or with judge.swap {"order_effect": mean score with the answer first minus with it second}
    asked           {requests, cached, prompt_tokens, completion_tokens, dollars}: of this command; dollars may be null

and to each prompt reference_score, reply (the judge's words, whole: scores on the first line, reasons below; null where
no reply came), problem (why there is no score, else absent) and, with judge.swap, first_score and
swapped: {score, reference_score, reply} for the two orders; score is then their mean, null where either is missing.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from threading import Thread
from typing import Any, NamedTuple, Protocol

from fast_ft.common.console import Bar
from fast_ft.judge import statistics

GRACE = 5.0  #: seconds that Ctrl-C leaves to the calls under way
MOST_MISSING = 0.02  #: a larger share of missing scores is a failure
MEASURES = (
    "matches",
    "exact_match",
    "rouge_l",
    "chrf",
    "length_ratio",
)  # the reference judge's, averaged where there are some


class Item(NamedTuple):
    """What a judge sees, text only. `reference` is None where there are no reference answers."""

    question: str
    reference: str | None
    answer: str


@dataclass(frozen=True, slots=True)
class Judgment:
    """An answer's score, None for a missing one, and what else scores.json holds of it."""

    score: float | None
    details: dict[str, Any] = field(default_factory=dict)


class AnswerJudge(Protocol):
    """Takes question, reference and answer, returns a Judgment. It is called from several threads at once."""

    def __call__(self, question: str, reference: str | None, answer: str) -> Judgment: ...


@dataclass(frozen=True, slots=True)
class Group:
    """What prompts are told apart by, {prompt id: value}; an id without a value is in no group."""

    skills: Mapping[str, str | None] = field(default_factory=dict)
    difficulties: Mapping[str, float | None] = field(default_factory=dict)


Ended = tuple["Item", "Judgment | BaseException"]  #: an item, and what came of it


def judge_all(
    judge: AnswerJudge,
    items: Sequence[Item],
    concurrency: int = 1,
    stop: Callable[[], None] = lambda: None,
    on_judgment: Callable[[], object] = lambda: None,
) -> dict[Item, Judgment]:
    """Judge every item, equal ones once. An error ends it when the calls under way have ended.

    Ctrl-C waits GRACE seconds for them: what a server is about to answer is paid for. A second Ctrl-C waits no longer.
    `stop` is called first, so that a judge begins nothing new in them; `on_judgment` after each, in this thread.
    """
    different = list(dict.fromkeys(items))
    waiting, ended = deque(different), queue.SimpleQueue[Ended]()

    def work() -> None:
        """Judge what is waiting until nothing is left."""
        with contextlib.suppress(IndexError):
            while True:
                ended.put(_judged(judge, waiting.popleft()))

    # Not an executor's threads: Python waits for those at its end, for as long as a server likes.
    workers = [Thread(target=work, name="judge", daemon=True) for _ in range(min(concurrency, len(different)))]
    done: dict[Item, Judgment] = {}
    with Bar("judging", len(different)) as bar:
        try:
            for worker in workers:
                worker.start()
            while len(done) < len(different):
                item, outcome = _next(ended)
                if isinstance(outcome, BaseException):
                    raise outcome
                done[item] = outcome
                on_judgment()
                bar.advance()
        except BaseException as error:
            stop()
            waiting.clear()
            until = time.monotonic() + (GRACE if isinstance(error, KeyboardInterrupt) else float("inf"))
            for worker in filter(Thread.is_alive, workers):
                worker.join(min(threading.TIMEOUT_MAX, max(0.0, until - time.monotonic())))
            raise
    return done


def _next(ended: queue.SimpleQueue[Ended]) -> Ended:
    """Wait for a call's end, a little at a time: Ctrl-C that comes just before a wait begins does not end it."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=0.2)


def _judged(judge: AnswerJudge, item: Item) -> Ended:
    try:
        return item, judge(*item)
    except BaseException as error:
        return item, error


def summarise(judgments: Mapping[str, Judgment], group: Group, seed: int) -> dict[str, Any]:
    """Return {prompt id: Judgment} as scores.json's totals, groups and prompts."""
    return {
        **_total(list(judgments.values()), seed),
        "by_skill": _groups(judgments, group.skills, seed),
        "by_difficulty": _groups(judgments, group.difficulties, seed),
        "prompts": {key: {"score": each.score, **each.details} for key, each in judgments.items()},
    }


def scores_of(content: Mapping[str, Any]) -> dict[str, float | None]:
    """Return {prompt id: score} of what `summarise` returned."""
    return {key: each["score"] for key, each in content["prompts"].items()}


def too_many_missing(scores: Mapping[str, Any]) -> str | None:
    """Return a sentence where more than MOST_MISSING of the scores are missing."""
    if scores["missing_share"] <= MOST_MISSING:
        return None
    why = next(each["problem"] for each in scores["prompts"].values() if each["score"] is None)
    return (
        f"judge: {scores['missing']} of {scores['count']} scores are missing, more than {MOST_MISSING:.0%}: the mean "
        f"cannot be trusted. One of them, {why}; scores.json has all. The same command asks again where no reply came, "
        "with --ask-again also where a reply holds no score; or choose another judge.model."
    )


def _groups(judgments: Mapping[str, Judgment], values: Mapping[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    members: dict[Hashable, list[Judgment]] = {}
    for key, judgment in judgments.items():
        if (value := values.get(key)) is not None:
            members.setdefault(value, []).append(judgment)
    return {
        value if isinstance(value, str) else f"{value:g}": _total(members[value], seed)
        for value in sorted(members)  # type: ignore[type-var]
    }


def _total(judgments: Sequence[Judgment], seed: int) -> dict[str, Any]:
    content = statistics.summary([judgment.score for judgment in judgments], seed)
    for name in MEASURES:
        if judgments and all(name in judgment.details for judgment in judgments):
            content[name] = round(fmean(float(judgment.details[name]) for judgment in judgments), 4)
    return content
