"""The ledger of attempts: what JudgeBoi said of each run, what training took in all, which differences mean anything.

JudgeBoi takes 5 submissions a day; its day ends at 23:59 in Taipei (UTC+8).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted, listed
from fast_ft.homework import public_scores
from fast_ft.homework.public_scores import day, moment, submissions
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.run.artifacts import Scores
from fast_ft.run.folder import RunDir
from fast_ft.run.listing import ListedRun, list_runs

A_DAY = 5
#: Twice the standard error of a mean of 150 scores with deviation 2.1: closer means may be equal.
NOISE = 0.35


@dataclass(frozen=True)
class Attempt:
    """One run, and the public scores noted for it, oldest first."""

    run: ListedRun
    submissions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run folder's name: two runs may have one run_name."""
        return self.run.folder.name

    @property
    def public(self) -> float | None:
        """The newest public score."""
        return self.submissions[-1]["score"] if self.submissions else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the run's own score; None where there is none."""
        scores = self.run.scores
        if scores is None or scores.mean is None or scores.low is None or scores.high is None:
            return None
        return scores.low, scores.high

    @property
    def budget_minutes(self) -> float | None:
        """The minutes that training may take: the homework's, or the recipe's own."""
        recipe = self.run.manifest.recipe
        return (policy_ntu_hw5.MINUTES if recipe.get("rules") else recipe.get("budget", {})).get("train_minutes")


@dataclass(frozen=True)
class Ledger:
    """All attempts below a folder, oldest first; reproductions are none."""

    attempts: list[Attempt] = field(default_factory=list)

    def sentences(self, now: dt.datetime | None = None) -> list[str]:
        """Return what there is to say of them: noise, training minutes, the day's submissions."""
        return [*_public(self.attempts), *_own(self.attempts), *_minutes(self.attempts), *self.today(now)]

    def today(self, now: dt.datetime | None = None) -> list[str]:
        """Return a warning where the day's submissions are used up, or the last one is left."""
        today = day(now or dt.datetime.now(dt.UTC))
        count = sum(day(moment(each["at"])) == today for a in self.attempts for each in a.submissions)
        if count == A_DAY - 1:
            return [
                f"warning: {counted(count, 'submission')} today; the next is the last of {A_DAY} until 23:59 (UTC+8)"
            ]
        if count >= A_DAY:
            return [f"warning: {count} of {A_DAY} submissions today; JudgeBoi takes the next after 23:59 (UTC+8)"]
        return []


def read(root: str | Path) -> Ledger:
    """Read the run folders below `root`."""
    runs = [run for run in list_runs(root) if run.manifest.reproduction_of is None]
    return Ledger([Attempt(run, _submissions(run)) for run in runs])


def record(folder: RunDir, score: float, at: str | None = None) -> list[str]:
    """Note a public score, and return sentences on the day's submissions. `at`: ISO, Taipei's time if it names none."""
    public_scores.add(folder, score, at)
    return read(folder.root.parent).today()


def _submissions(run: ListedRun) -> list[dict[str, Any]]:
    """Return a run's public scores, or none with a warning: one damaged file must not hide the other runs."""
    try:
        return submissions(RunDir(run.folder))
    except InputError as error:
        note(f"warning: {error}")
        return []


def _public(attempts: Sequence[Attempt]) -> list[str]:
    scored = [(a.public, a.name) for a in attempts if a.public is not None]
    sentences = [
        f"note: {a.name} was answered again after its public score, which is the former answers' score"
        for a in attempts
        if a.submissions and (now := a.run.manifest.digests.get("pred")) and a.submissions[-1].get("pred") != now
    ]
    if len(scored) < 2:
        return sentences
    best, leader = max(scored)
    others = sorted(((score, name) for score, name in scored if name != leader), reverse=True)
    near = [f"{name} {score:g}" for score, name in others if round(best - score, 6) < NOISE]
    far = [f"{name} {score:g}" for score, name in others if round(best - score, 6) >= NOISE]
    sentences.insert(0, f"public scores: {leader} leads with {best:g}")
    if near:
        sentences.insert(1, f"  inside the noise of 150 answers (less than {NOISE} below): {', '.join(near)}")
    if far:
        sentences.insert(1 + bool(near), f"  below it by more than noise: {', '.join(far)}")
    return sentences


def _own(attempts: Sequence[Attempt]) -> list[str]:
    """Say of each judge's best run which other intervals overlap its own. `judge --against` compares more finely."""
    sentences = []
    groups: dict[Any, list[tuple[Attempt, Scores, tuple[float, float]]]] = {}
    for attempt in attempts:
        if attempt.run.scores is not None and attempt.interval is not None:
            entry = (attempt, attempt.run.scores, attempt.interval)
            groups.setdefault(attempt.run.scores.judge, []).append(entry)
    for judge, group in groups.items():
        if len(group) < 2:
            continue
        best, scores, (low, _) = max(group, key=lambda entry: entry[1].mean or 0.0)
        near = [attempt.name for attempt, _, (_, high) in group if attempt is not best and high >= low]
        name = " ".join(str(part) for part in judge[:2] if part)
        told = (
            f"its 95 % interval overlaps with that of {listed(near, 2)}, so the difference may be chance "
            f"(`judge {best.run.folder} --against RUN_DIR` compares prompt by prompt)"
            if near
            else "its 95 % interval overlaps with no other run's"
        )
        sentences.append(f"scores by {name}: {best.name} leads with {scores.mean:.2f}; {told}")
    return sentences


def _minutes(attempts: Sequence[Attempt]) -> list[str]:
    # a trial run is no attempt at the homework
    counted = [a for a in attempts if a.run.manifest.recipe.get("rules")]
    budgets = [a.budget_minutes for a in counted if a.budget_minutes]
    if not budgets:
        return []
    spent, budget = sum(a.run.train_minutes for a in counted), max(budgets)
    over = "warning: " if spent > budget else ""
    runs = "attempt" if len(counted) == 1 else f"all {len(counted)} attempts"
    return [f"{over}training over {runs}: {spent:.1f} of {budget:g} minutes"]
