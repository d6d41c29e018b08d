"""What a run folder holds, read for the page. Whatever is absent (no judge, no base answers) stays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data import dataset
from fast_ft.data.formats import strip_lead
from fast_ft.data.references import References
from fast_ft.run import artifacts, time_spent
from fast_ft.run.folder import RunDir
from fast_ft.run.made_with import as_made
from fast_ft.run.manifest import Manifest

_NO_SCORE = artifacts.PromptScore()
WORDS = ("reply", "reason", "reasons")  #: where a judge's words may stand in a prompt's scores


@dataclass(frozen=True)
class Run:
    """A run folder's files. What is absent is empty, and `scores` is None without scores.json."""

    name: str
    recipe: dict[str, Any]
    manifest: Manifest
    plan: dict[str, Any]
    lines: list[dict[str, Any]]
    pred: artifacts.Pred
    base: artifacts.Pred
    scores: artifacts.Scores | None
    ended: artifacts.Ends
    references: References | None

    @property
    def minutes(self) -> float:
        """Minutes of all phases."""
        return time_spent.run_minutes(self.manifest, self.lines)


def read_run(folder: RunDir) -> Run:
    """Read a run folder; InputError where a file in it is not what the run wrote."""
    recipe = as_made(folder.manifest())
    if "name_or_path" not in recipe.get("model", {}) or "r" not in recipe.get("lora", {}):
        raise InputError(f"{folder.manifest_path}: recipe: names no model.name_or_path or no lora.r")
    judge = recipe.get("judge", {})
    references = None
    if judge.get("references"):
        try:
            references = dataset.load_references(judge["references"])
        except (InputError, OSError):  # gone since: the page then shows none
            references = None
    return Run(
        name=folder.root.resolve().name,
        recipe=recipe,
        manifest=folder.record(),
        plan=untrusted_files.json_object(folder.plan) if folder.plan.is_file() else {},
        lines=artifacts.read_log(folder.log) if folder.log.is_file() else [],
        pred=artifacts.read_pred(folder.pred) if folder.pred.is_file() else {},
        base=artifacts.read_pred(folder.base_pred) if folder.base_pred.is_file() else {},
        scores=artifacts.read_scores(folder.scores) if folder.scores.is_file() else None,
        ended=artifacts.read_answers(folder.answers) if folder.answers.is_file() else {},
        references=references,
    )


def memory_cap(run: Run) -> float | None:
    """Return the GiB that the run was planned for, or None where memory was not counted (a CPU)."""
    given = run.recipe.get("budget", {}).get("memory_gib")
    if isinstance(given, int | float):
        return float(given)
    return run.plan.get("memory_gib") or None


def curves(run: Run) -> dict[str, Any]:
    """Return log.jsonl by column, each stage's first step, and the memory cap."""
    stages: list[dict[str, Any]] = []
    for line in run.lines:
        if not stages or stages[-1]["name"] != line["stage"]:
            stages.append({"name": line["stage"], "step": line["step"]})
    names = (
        "step", "loss", "validation_loss", "grad_norm", "learning_rate", "gib", "skipped", "supervised_tokens",
    )  # fmt: skip
    columns = {name: [line.get(name) for line in run.lines] for name in names}
    columns["tokens_per_s"] = [
        line["tokens"] / line["seconds"] if line.get("seconds") and line.get("tokens") else None for line in run.lines
    ]
    return {"name": run.name, "stages": stages, "cap": memory_cap(run), **columns}


def prompt_scores(scores: artifacts.Scores | None) -> dict[str, float | None]:
    """Return {prompt id: score}, one number a prompt."""
    return {key: entry.value for key, entry in scores.prompts.items()} if scores is not None else {}


def answers(runs: list[Run]) -> dict[str, Any]:
    """Return every prompt with its answers, in columns: the base model's, each run's, the reference."""
    columns: list[dict[str, Any]] = []
    first = runs[0]
    if first.base:
        columns.append({"name": "Base model", "kind": "base"})
    several = len(runs) > 1  # each then has its colour
    columns += [
        {"name": run.name, "kind": "tuned", "colour": number} if several else {"name": "Tuned", "kind": "tuned"}
        for number, run in enumerate(runs)
        if run.pred
    ]
    if first.references:
        columns.append({"name": "Reference", "kind": "reference"})
    ids = list(dict.fromkeys(key for run in runs for key in run.pred))
    prompts = []
    for key in ids:
        asked = next(run.pred[key] for run in runs if key in run.pred)
        cells: list[dict[str, Any] | None] = []
        if first.base:
            scores = first.scores.base if first.scores is not None else None
            cells.append(_cell(first.base, key, scores, first.ended.get("base", {})))
        cells += [_cell(run.pred, key, run.scores, run.ended.get("tuned", {})) for run in runs if run.pred]
        if first.references:
            reference = reference_of(first.references, key, asked)
            score = _entry(first.scores, key).reference_score
            cells.append(None if reference is None else {"text": reference, "score": score})
        title = " ".join(strip_lead(asked.question).split())[:160]  # Alpaca's lead sentence is on every one
        pairs = [[turn.role, turn.content] for turn in asked.input]
        prompts.append({"id": key, "title": title, "turns": pairs, "cells": cells})
    kind, scale = (first.scores.kind, first.scores.scale) if first.scores is not None else (None, None)
    return {"columns": columns, "prompts": prompts, "kind": kind, "scale": scale or [0, 1]}


def reference_of(references: References, key: str, asked: artifacts.PredEntry) -> str | None:
    """Return the reference answer to a prompt, None where there is none."""
    try:
        return references.find(key, [{"role": turn.role, "content": turn.content} for turn in asked.input])
    except InputError:  # the file has changed since: no score hangs on this
        return None


def _entry(scores: artifacts.ScoredAnswers | None, key: str) -> artifacts.PromptScore:
    return scores.prompts.get(key, _NO_SCORE) if scores is not None else _NO_SCORE


def _cell(
    pred: artifacts.Pred, key: str, scores: artifacts.ScoredAnswers | None, ended: dict[str, artifacts.AnswerEnd]
) -> dict[str, Any] | None:
    if key not in pred:
        return None
    entry = _entry(scores, key).given()
    more = {name: value for name, value in entry.items() if isinstance(value, bool | int | float)}
    more.pop("reference_score", None)
    score = more.pop("score", more.get("exact_match"))
    words = next((entry[name] for name in WORDS if isinstance(entry.get(name), str)), None)
    swapped = entry.get("swapped")
    return {
        "text": pred[key].answer,
        "score": None if score is None else float(score),
        "more": more,
        "words": words,
        "swapped": swapped.get("reply") if isinstance(swapped, dict) else None,
        "problem": entry.get("problem"),
        **(ended[key].given() if key in ended else {}),
    }
