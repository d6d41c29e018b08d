"""What a run folder holds, read for the page. Whatever is absent (no judge, no base answers) stays out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data import dataset
from fast_ft.data.formats import strip_lead
from fast_ft.run import artifacts
from fast_ft.run.folder import RunDir
from fast_ft.run.made_with import as_made

WORDS = ("reply", "reason", "reasons")  #: where a judge's words may stand in a prompt's scores


@dataclass(frozen=True)
class Run:
    """A run folder's files. `ended` is answers.json: {"tuned" or "base": {prompt id: {tokens, ended}}}, or {}."""

    name: str
    recipe: dict[str, Any]
    manifest: dict[str, Any]
    plan: dict[str, Any]
    lines: list[dict[str, Any]]
    pred: dict[str, Any]
    base: dict[str, Any]
    scores: dict[str, Any]
    ended: dict[str, Any]
    references: dict[str, str]

    @property
    def phases(self) -> dict[str, Any]:
        return self.manifest.get("phases", {})

    @property
    def minutes(self) -> float:
        """Minutes of all phases."""
        return sum(phase.get("seconds", 0.0) for phase in self.phases.values()) / 60


def read_run(folder: RunDir) -> Run:
    """Read a run folder; InputError where a file in it is not what the run wrote."""
    manifest = folder.manifest()
    recipe = as_made(manifest)
    if "name_or_path" not in recipe.get("model", {}) or "r" not in recipe.get("lora", {}):
        raise InputError(f"{folder.manifest_path}: recipe: names no model.name_or_path or no lora.r")
    judge = recipe.get("judge", {})
    references: dict[str, str] = {}
    if judge.get("references"):
        try:
            references = dataset.load_references(judge["references"])
        except (InputError, OSError):  # gone since: the page then shows none
            references = {}
    return Run(
        name=folder.root.resolve().name,
        recipe=recipe,
        manifest=manifest,
        plan=_there(untrusted_files.json_object, folder.plan),
        lines=artifacts.read_log(folder.log) if folder.log.is_file() else [],
        pred=_there(artifacts.read_pred, folder.pred),
        base=_there(artifacts.read_pred, folder.base_pred),
        scores=_there(artifacts.read_scores, folder.scores),
        ended=_there(artifacts.read_answers, folder.answers),
        references=references,
    )


def _there(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    return read(path) if path.is_file() else {}


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
    names = ("step", "loss", "grad_norm", "learning_rate", "gib", "skipped")
    columns = {name: [line.get(name) for line in run.lines] for name in names}
    columns["tokens_per_s"] = [
        line["tokens"] / line["seconds"] if line.get("seconds") and line.get("tokens") else None for line in run.lines
    ]
    return {"name": run.name, "stages": stages, "cap": memory_cap(run), **columns}


def prompt_scores(scores: dict[str, Any]) -> dict[str, float | None]:
    """Return {prompt id: score}, one number a prompt."""
    found = {}
    for key, entry in scores.get("prompts", {}).items():
        value = entry.get("score", entry.get("exact_match"))
        found[key] = float(value) if isinstance(value, int | float) else None
    return found


def answers(runs: list[Run]) -> dict[str, Any]:
    """Return every prompt with its answers, in columns: the base model's, each run's, the reference."""
    columns: list[dict[str, str]] = []
    first = runs[0]
    if first.base:
        columns.append({"name": "Base model", "kind": "base"})
    columns += [{"name": run.name if len(runs) > 1 else "Tuned", "kind": "tuned"} for run in runs if run.pred]
    if first.references:
        columns.append({"name": "Reference", "kind": "reference"})
    ids = list(dict.fromkeys(key for run in runs for key in run.pred))
    prompts = []
    for key in ids:
        cells: list[dict[str, Any] | None] = []
        if first.base:
            cells.append(_cell(first.base, key, first.scores.get("base", {}), first.ended.get("base", {})))
        cells += [_cell(run.pred, key, run.scores, run.ended.get("tuned", {})) for run in runs if run.pred]
        if first.references:
            reference = first.references.get(key)
            score = first.scores.get("prompts", {}).get(key, {}).get("reference_score")
            cells.append(None if reference is None else {"text": reference, "score": score})
        turns = next(run.pred[key]["input"] for run in runs if key in run.pred)
        title = " ".join(strip_lead(turns[-1]["content"]).split())[:160]  # Alpaca's lead sentence is on every one
        pairs = [[turn["role"], turn["content"]] for turn in turns]
        prompts.append({"id": key, "title": title, "turns": pairs, "cells": cells})
    kind = first.scores.get("kind")
    return {"columns": columns, "prompts": prompts, "kind": kind, "scale": first.scores.get("scale", [0, 1])}


def _cell(pred: dict[str, Any], key: str, scores: dict[str, Any], ended: dict[str, Any]) -> dict[str, Any] | None:
    if key not in pred:
        return None
    entry = scores.get("prompts", {}).get(key, {})
    more = {name: value for name, value in entry.items() if isinstance(value, bool | int | float)}
    more.pop("reference_score", None)
    score = more.pop("score", more.get("exact_match"))
    words = next((entry[name] for name in WORDS if isinstance(entry.get(name), str)), None)
    swapped = entry.get("swapped")
    return {
        "text": pred[key]["output"][0],
        "score": None if score is None else float(score),
        "more": more,
        "words": words,
        "swapped": swapped.get("reply") if isinstance(swapped, dict) else None,
        "problem": entry.get("problem"),
        **ended.get(key, {}),
    }  # fmt: skip
