"""The ledger of attempts: what JudgeBoi said of each run, what training took in all, which differences mean anything.

JudgeBoi takes 5 submissions a day; its day ends at 23:59 in Taipei (UTC+8). Scores stand in submissions.json of the
run's folder: {"submissions": [{"score", "at": time, "pred": digest of the pred.json that was sent}]}. Times are written
in UTC; one without an offset, as somebody may write it by hand, is Taipei's.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fast_ft.common import atomic_files, untrusted_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.run import artifacts
from fast_ft.run.artifacts import Scores
from fast_ft.run.folder import RunDir
from fast_ft.run.listing import list_runs
from fast_ft.run.manifest import Manifest

FILE = "submissions.json"
A_DAY = 5
TAIPEI = dt.timezone(dt.timedelta(hours=8))
#: Twice the standard error of a mean of 150 scores with deviation 2.1: closer means may be equal.
NOISE = 0.35
_REMEDY = "You can mend it, or delete it and note the scores again with --public-score."


class _Submission(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    score: Annotated[float, Field(ge=0, le=10)]
    at: Annotated[str, AfterValidator(lambda text: moment(text) and text)]
    pred: str | None = None


class _Submissions(BaseModel):
    model_config = ConfigDict(strict=True)

    submissions: list[_Submission] = []


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
        scores: Scores | None = _tried(_scores, folder, None)
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
    if not (math.isfinite(score) and 0 <= score <= 10):
        raise InputError(f"--public-score {score}: JudgeBoi's scores go from 0 to 10")
    if not folder.pred.is_file():
        raise InputError(f"{folder.root} has no pred.json, so none of its was judged")
    entry = {
        "score": score,
        "at": _said_at(at).astimezone(dt.UTC).isoformat(timespec="seconds"),
        "pred": atomic_files.sha256_file(folder.pred),
    }
    noted = sorted([*submissions(folder), entry], key=lambda each: moment(each["at"]))
    atomic_files.write_json(folder.root / FILE, {"submissions": noted})
    return read(folder.root.parent).today()


def day(time: dt.datetime) -> dt.date:
    """Return JudgeBoi's day: it ends at 23:59 in Taipei, so the last minute belongs to the next."""
    return (time.astimezone(TAIPEI) + dt.timedelta(minutes=1)).date()


def train_minutes(folder: RunDir) -> float:
    """Return the minutes of all training steps in a run's log, of stopped runs too."""
    try:
        lines = folder.log.read_text(encoding="utf-8").splitlines()
        return sum(json.loads(line)["seconds"] for line in lines) / 60
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return 0.0


def moment(text: str) -> dt.datetime:
    """Return an ISO time, Taipei's where it names no offset. InputError for what is none, and for other centuries."""
    try:
        found = dt.datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or not 2000 <= found.year < 2100:
        raise InputError(f'{text!r} is no time: write it as "2025-04-05 21:30" (Taipei\'s time), or with an offset')
    return found if found.tzinfo else found.replace(tzinfo=TAIPEI)


def submissions(folder: RunDir) -> list[dict[str, Any]]:
    """Return the public scores noted for a run, oldest first. InputError where submissions.json is damaged."""
    path = folder.root / FILE
    if not path.exists():
        return []
    content = untrusted_files.json_object(path, remedy=_REMEDY)
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # a note of one's own is written again too
        found = _Submissions.model_validate(content).model_dump()["submissions"]
        return sorted(found, key=lambda each: moment(each["at"]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = escaped(".".join(map(str, first["loc"])))
        raise InputError(f"{path}: {place}: {escaped(first['msg'])}. {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {escaped(str(error))}. {_REMEDY}") from None


def _scores(folder: RunDir) -> Scores | None:
    return artifacts.read_scores(folder.scores) if folder.scores.is_file() else None


def _interval(scores: Scores | None) -> tuple[float, float] | None:
    if scores is None or scores.low is None or scores.high is None:
        return None
    return scores.low, scores.high


def _tried(read: Callable[[RunDir], Any], folder: RunDir, otherwise: Any) -> Any:
    """Return what `read` reads, or `otherwise` with a warning: one damaged file must not hide the other runs."""
    try:
        return read(folder)
    except InputError as error:
        note(f"warning: {error}")
        return otherwise


def _said_at(at: str | None) -> dt.datetime:
    now = dt.datetime.now(dt.UTC)
    if at is None:
        return now
    try:
        said = moment(at)
    except InputError as error:
        raise InputError(f"--at {error}") from None
    if said > now + dt.timedelta(minutes=5):
        raise InputError(f"--at {at}: that time has not come yet")
    return said


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
