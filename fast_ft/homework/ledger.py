"""The ledger of attempts: what JudgeBoi said of each run, what training took in all, which differences mean anything.

JudgeBoi takes 5 submissions a day; its day ends at 23:59 in Taipei (UTC+8).
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.homework import public_scores
from fast_ft.homework.public_scores import day, moment, submissions
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.run import artifacts
from fast_ft.run.artifacts import Scores
from fast_ft.run.folder import RunDir
from fast_ft.run.listing import list_runs
from fast_ft.run.manifest import Manifest

A_DAY = 5
T = TypeVar("T")
#: Twice the standard error of a mean of 150 scores with deviation 2.1: closer means may be equal.
NOISE = 0.35


@dataclass(frozen=True)
class Attempt:
    """One run. `row` is list_runs'; public scores are oldest first; `judge` tells which judge gave `row["score"]`."""

    row: dict[str, Any]
    submissions: list[dict[str, Any]]
    train_minutes: float
    budget_minutes: float | None
    rules: str | None
    pred: str | None
    judge: tuple[str | None, str | None, str | None] = (None, None, None)
    interval: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """The run folder's name."""
        return Path(self.row["folder"]).name

    @property
    def public(self) -> float | None:
        """The newest public score."""
        return self.submissions[-1]["score"] if self.submissions else None


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
            return [f"warning: {count} submissions today; the next is the last of {A_DAY} until 23:59 (UTC+8)"]
        if count >= A_DAY:
            return [f"warning: {count} of {A_DAY} submissions today; JudgeBoi takes the next after 23:59 (UTC+8)"]
        return []


def read(root: str | Path) -> Ledger:
    """Read the run folders below `root`."""
    attempts = []
    for row in list_runs(root):
        folder = RunDir(Path(row["folder"]))
        try:
            manifest = folder.record()
        except InputError:  # list_runs says so in its row
            manifest = Manifest()
        if manifest.reproduction_of is not None:
            continue
        recipe = manifest.recipe
        scores = _tried(_scores, folder, None)
        budget = policy_ntu_hw5.MINUTES if recipe.get("rules") else recipe.get("budget", {})
        attempts.append(
            Attempt(
                row,
                _tried(submissions, folder, []),
                train_minutes(folder),
                budget.get("train_minutes"),
                recipe.get("rules"),
                manifest.digests.get("pred"),
                scores.judge if scores is not None else (None, None, None),
                _interval(scores),
            )
        )
    return Ledger(attempts)


def record(folder: RunDir, score: float, at: str | None = None) -> list[str]:
    """Note a public score, and return sentences on the day's submissions. `at`: ISO, Taipei's time if it names none."""
    public_scores.add(folder, score, at)
    return read(folder.root.parent).today()


def train_minutes(folder: RunDir) -> float:
    """Return the minutes of all training steps in a run's log, of stopped runs too."""
    try:
        lines = folder.log.read_text(encoding="utf-8").splitlines()
        return sum(json.loads(line)["seconds"] for line in lines) / 60
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return 0.0


def _scores(folder: RunDir) -> Scores | None:
    return artifacts.read_scores(folder.scores) if folder.scores.is_file() else None


def _interval(scores: Scores | None) -> tuple[float, float] | None:
    if scores is None or scores.low is None or scores.high is None:
        return None
    return scores.low, scores.high


def _tried(read: Callable[[RunDir], T], folder: RunDir, otherwise: T) -> T:
    """Return what `read` reads, or `otherwise` with a warning: one damaged file must not hide the other runs."""
    try:
        return read(folder)
    except InputError as error:
        note(f"warning: {error}")
        return otherwise


def _public(attempts: Sequence[Attempt]) -> list[str]:
    scored = [(a.public, a.name) for a in attempts if a.public is not None]
    sentences = [
        f"note: {a.name} was answered anew after its public score: the score is the former answers'"
        for a in attempts
        if a.submissions and a.pred is not None and a.submissions[-1].get("pred") != a.pred
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
    """Say of each judge's best run which others' intervals meet its own. Paired comparison, finer, is the judge's."""
    sentences = []
    for judge in dict.fromkeys(a.judge for a in attempts if a.interval is not None):
        group = [a for a in attempts if a.judge == judge and a.interval is not None and a.row["score"] is not None]
        if len(group) < 2:
            continue
        best = max(group, key=lambda a: a.row["score"])
        assert best.interval is not None
        near = [a.name for a in group if a is not best and a.interval and a.interval[1] >= best.interval[0]]
        name = " ".join(str(part) for part in judge[:2] if part)
        meets = f"intervals of these meet its own: {', '.join(near)}" if near else "no other's interval meets its own"
        text = f"scores by {name}: {best.name} leads with {best.row['score']:.2f}; {meets}"
        sentences.append(text + (f" (judge {best.row['folder']} --against ... compares pairwise)" if near else ""))
    return sentences


def _minutes(attempts: Sequence[Attempt]) -> list[str]:
    counted = [a for a in attempts if a.rules] or list(attempts)  # a trial run is no attempt at the homework
    budgets = [a.budget_minutes for a in counted if a.budget_minutes]
    if not budgets or not counted[0].rules:
        return []
    spent, budget = sum(a.train_minutes for a in counted), max(budgets)
    over = "warning: " if spent > budget else ""
    runs = "attempt" if len(counted) == 1 else f"all {len(counted)} attempts"
    return [f"{over}training over {runs}: {spent:.1f} of {budget:g} minutes"]
