"""One adapter, many ways to decode: a pred file for each point of a grid, in RUN_DIR/grid, the model loaded once."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.signals import interruptible
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.generate import answers
from fast_ft.generate.answers import Task
from fast_ft.judge.kinds import KINDS
from fast_ft.pipeline import judge_phase
from fast_ft.pipeline.adapter_loading import Ready, load
from fast_ft.pipeline.decoding import decode_plan
from fast_ft.pipeline.rerun import open_run, partial_tag
from fast_ft.recipe.schema import Recipe
from fast_ft.run import lock
from fast_ft.run.folder import RunDir

MOST_POINTS = 200  #: each of them answers all prompts
FOLDER = "grid"  #: in the run folder: the pred files, and grid.json


def grid(root: str | Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """Answer a run's prompts at each point and return a summary of each, which grid/grid.json keeps.

    `words`: axes such as "temperature=0.3,0.7" (keys of generate), and overrides such as "generate.max_new_tokens=64".
    """
    axes = _axes([word for word in words if "." not in word.partition("=")[0]])
    fixed = [word for word in words if "." in word.partition("=")[0]]
    if twice := [key for key in axes if any(word.startswith(f"generate.{key}=") for word in fixed)]:
        raise InputError(f"generate.{twice[0]}: --grid tries values of {twice[0]} already. Give it in one place only.")
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    recipes = [
        open_run(root, [*fixed, *(f"generate.{key}={value}" for key, value in point.items())])[1] for point in points
    ]  # so that a wrong value is said before a model is loaded
    for (one, first), (other, second) in itertools.combinations(zip(points, recipes, strict=True), 2):
        if first.generate == second.generate:
            raise InputError(f"--grid: {_name(one)} and {_name(other)} are the same settings. Give each value once.")
    folder, recipe = open_run(root, fixed)
    prepared = prepare(recipe)
    if not prepared.prompts:
        raise InputError(f"{root}: there are no prompts to answer. Give them: data.test=FILE.")
    scored = _can_score(recipe, prepared)
    with interruptible(), lock.hold(folder.root):
        ready = load(folder, recipe, prepared, folder.adapter)
        summary, partials = list[dict[str, Any]](), list[Path]()
        for point, each in zip(points, recipes, strict=True):
            summary.append(_answer(folder, point, each, prepared, ready, partials))
            if scored:
                summary[-1] |= _scores(folder, summary[-1]["file"], each, prepared)
            atomic_files.write_json(folder.root / FOLDER / "grid.json", summary)
        for path in partials:  # until here a stopped grid goes on from them
            path.unlink(missing_ok=True)
    return summary


def _axes(words: Sequence[str]) -> dict[str, list[str]]:
    """Return {key: its values} of words such as "temperature=0.3,0.7". Raises InputError."""
    axes: dict[str, list[str]] = {}
    for word in words:
        key, _, text = word.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not all(values):
            raise InputError(f"--grid {word}: a value is missing. Write the values so: {key}=0.3,0.7")
        if key in axes:
            raise InputError(f"--grid {word}: {key} was given before. Write all its values in one word.")
        axes[key] = values
    if not axes:
        raise InputError("--grid needs values to try, such as: --grid temperature=0.3,0.7 top_p=0.8,0.9")
    if (count := math.prod(map(len, axes.values()))) > MOST_POINTS:
        raise InputError(f"--grid: {count:,} points, where {MOST_POINTS:,} are the most. Give fewer values.")
    return axes


def _can_score(recipe: Recipe, prepared: PreparedData) -> bool:
    """Return whether the recipe's judge can score these prompts' answers and asks no server; else say why not."""
    if recipe.judge.kind == "none":
        return False
    if not KINDS[recipe.judge.kind].is_free:
        note("note: a grid asks no server for scores, so these answers get none")
        return False
    try:
        judge_phase.check(recipe.judge, prepared.prompts)
    except InputError as error:
        note(f"note: these answers get no scores: {error}")
        return False
    return True


def _scores(folder: RunDir, file: str, recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """Score a point's answers into a file beside them, and return what the summary says of it."""
    point = copy.copy(folder)
    point.pred = folder.root / file
    name = point.pred.name.removeprefix("pred-")
    point.base_pred = point.pred.with_name(f"base_pred-{name}")  # a grid has none
    point.scores = point.pred.with_name(f"scores-{name}")
    point.scores.unlink(missing_ok=True)  # of a former grid's answers at this point
    scores = judge_phase.judge_run(point, recipe.judge, judge_phase.groups(prepared.prompts), seed=recipe.seed)
    assert scores is not None, "no dry run"
    return {key: round(scores[key], 4) for key in ("exact_match", "rouge_l", "chrf")}


def _name(point: dict[str, str]) -> str:
    return "-".join(f"{key}{value}" for key, value in point.items())


def _answer(
    folder: RunDir, point: dict[str, str], recipe: Recipe, prepared: PreparedData, ready: Ready, partials: list[Path]
) -> dict[str, Any]:
    name = _name(point)
    partial = folder.root / FOLDER / f"pred-{name}-{partial_tag(folder, recipe, prepared)}.partial.jsonl"
    partial.parent.mkdir(exist_ok=True)
    partials.append(partial)
    task = Task(recipe.seed, partial, title=name, prompt_ids=ready.prompt_ids)
    plan = decode_plan(recipe, prepared, ready.settled)
    result = answers.generate(ready.loaded, prepared.encoder, prepared.prompts, recipe.generate, plan, task)
    path = folder.root / FOLDER / f"pred-{name}.json"
    atomic_files.write_json(path, answers.predictions(prepared.prompts, result.answers))
    tokens = [answer.tokens for answer in result.flat]
    return {
        **point,
        "file": f"{FOLDER}/{path.name}",
        "ended_at_eos": round(sum(answer.ended for answer in result.flat) / len(tokens), 4),
        "mean_tokens": round(sum(tokens) / len(tokens), 1),
        "seconds": round(result.seconds, 1),
    }
