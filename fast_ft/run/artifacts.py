"""What a run's phases leave, read back as values: pred.json, answers.json, scores.json and log.jsonl."""

# ruff: noqa: RUF012 (pydantic copies a default value for each object)
from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.recipe.schema import JudgeKindName
from fast_ft.run.checked_file import MOST, Number, OpenPart, Part, checked


class Turn(OpenPart):
    """One message of a prompt."""

    role: str
    content: str


class PredEntry(Part):
    """A prompt and its answers."""

    input: Annotated[list[Turn], Field(min_length=1)]
    output: Annotated[list[str], Field(min_length=1)]

    @property
    def answer(self) -> str:
        """The first answer, which is the one that counts."""
        return self.output[0]

    @property
    def question(self) -> str:
        """The last message of the prompt."""
        return self.input[-1].content


class AnswerEnd(OpenPart):
    """How long an answer is, in new tokens, and whether EOS ended it."""

    tokens: int = 0
    ended: bool = False


class Totals(OpenPart):
    """Totals over some prompts' scores. A measure that the judge does not have is None."""

    count: int = 0
    missing: int | None = None
    mean: Number | None = None
    low: Number | None = None
    high: Number | None = None
    exact_match: Number = 0.0
    rouge_l: Number = 0.0
    chrf: Number = 0.0
    length_ratio: Number = 0.0


class PromptScore(OpenPart):
    """One prompt's score, and what else the judge told of its answer."""

    score: Number | None = None
    exact_match: Number | bool | None = None
    reference_score: Number | None = None
    reply: str | None = None
    problem: str | None = None
    swapped: PromptScore | None = None

    @property
    def value(self) -> float | None:
        """The score; of an older version's reference judge, whether the answer matched."""
        value = self.score if "score" in self.model_fields_set else self.exact_match
        return None if value is None else float(value)


class ScoredAnswers(Totals):
    """The scores of one set of answers."""

    by_skill: dict[str, Totals] = {}
    by_difficulty: dict[str, Totals] = {}
    prompts: dict[str, PromptScore] = {}


class Comparison(OpenPart):
    """How this run differs from another one, prompt by prompt."""

    sentence: str


class OrderEffect(OpenPart):
    """What an answer's place in the question did to its score."""

    order_effect: Number


class Scores(ScoredAnswers):
    """scores.json, as judge/scoring.py describes it."""

    kind: JudgeKindName
    pred: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # the digest of what was scored
    model: str = ""
    rubric: str | None = None
    labelled: str = ""
    answered_by: list[str] = []
    scale: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None
    notes: list[str] = []
    reference_mean: Number | None = None
    baselines: dict[str, Number] = {}
    swapped: OrderEffect | None = None
    base: ScoredAnswers | None = None
    gain: Comparison | None = None
    against: Comparison | None = None
    judged_with: dict[str, Any] = {}

    @property
    def judge(self) -> tuple[str, str | None, str | None]:
        """What judged: kind, model and rubric. Only scores of one judge can be compared."""
        return self.kind, self.model or None, self.rubric


class _Step(Part):
    stage: str
    step: int
    loss: float
    grad_norm: float | None = None
    learning_rate: Number | None = None
    tokens: Number | None = None
    seconds: Number | None = None
    gib: Number | None = None


Pred = dict[str, PredEntry]
Ends = dict[str, dict[str, AnswerEnd]]

_PRED = TypeAdapter(Pred)
_ENDS = TypeAdapter(Ends)
_STEPS = TypeAdapter(list[_Step])
_SCORES = TypeAdapter(Scores)


def read_pred(path: Path) -> Pred:
    """Return pred.json's {prompt id: prompt and answers}. Raises InputError."""
    return checked(_PRED, untrusted_files.json_object(path, MOST, "Generate it again."), path, "generate")


def read_answers(path: Path) -> Ends:
    """Return answers.json's {"tuned" or "base": {prompt id: how the answer ended}}. Raises InputError."""
    return checked(_ENDS, untrusted_files.json_object(path, MOST, "Generate it again."), path, "generate")


def read_scores(path: Path) -> Scores:
    """Return scores.json. Raises InputError."""
    return checked(_SCORES, untrusted_files.json_object(path, MOST, "Judge the run again."), path, "judge")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return log.jsonl's lines, one a step, as train_phase writes them. Raises InputError."""
    lines: list[Any] = []
    for number, line in enumerate(untrusted_files.text(path, MOST).split("\n"), 1):
        if line.strip():
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error}). Train again.") from None
    checked(_STEPS, lines, path, "train")
    return lines
