"""One adapter, many ways to decode: a pred file for each point of a grid, the model loaded once."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_ft import atomic, backend, generate, lease
from fast_ft.again import open_run
from fast_ft.errors import InputError
from fast_ft.generate_phase import load
from fast_ft.interrupt import interruptible
from fast_ft.load import resolved
from fast_ft.prepare import Prepared, prepare
from fast_ft.recipe import Recipe
from fast_ft.rundir import RunDir


def grid(root: str | Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """Answer a run's prompts at each point and return a summary of each; grid.json keeps it beside the pred files.

    `words`: axes such as "temperature=0.3,0.7" (keys of generate), and overrides such as "generate.max_new_tokens=64".
    """
    axes = [_axis(word) for word in words if "." not in word.partition("=")[0]]
    if not axes:
        raise InputError("--grid needs values to try, such as: --grid temperature=0.3,0.7 top_p=0.8,0.9")
    fixed = [word for word in words if "." in word.partition("=")[0]]
    keys = [key for key, _ in axes]
    points = [dict(zip(keys, values, strict=True)) for values in itertools.product(*(values for _, values in axes))]
    recipes = [
        open_run(root, [*fixed, *(f"generate.{key}={value}" for key, value in point.items())])[1] for point in points
    ]  # so that a wrong value is said before a model is loaded
    folder, recipe = open_run(root, fixed)
    prepared = prepare(recipe)
    if not prepared.prompts:
        raise InputError(f"{root}: there are no prompts to answer. Give them: data.test=FILE.")
    with interruptible(), lease.hold(folder.root):
        loaded, pool, _ = load(folder, recipe, prepared, folder.adapter)
        summary, partials = list[dict[str, Any]](), list[Path]()
        for point, each in zip(points, recipes, strict=True):
            summary.append(_answer(folder, point, each, prepared, loaded, pool, partials))
            atomic.write_json(folder.root / "grid.json", summary)
        for path in partials:  # until here a stopped grid goes on from them
            path.unlink(missing_ok=True)
    return summary


def _axis(word: str) -> tuple[str, list[str]]:
    key, _, values = word.partition("=")
    return key, [value.strip() for value in values.split(",") if value.strip()]


def _answer(
    folder: RunDir, point: dict[str, str], recipe: Recipe, prepared: Prepared, loaded: backend.Loaded,
    pool: dict[str, Any], partials: list[Path],
) -> dict[str, Any]:  # fmt: skip
    assert prepared.encoder is not None
    name = "-".join(f"{key}{value}" for key, value in point.items())
    settings = json.dumps([resolved(recipe)["generate"], recipe.data.test], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]  # a partial file of other settings is not gone on with
    partial = folder.root / f"pred-{name}-{digest}.partial.jsonl"
    partials.append(partial)
    result = generate.generate(
        loaded,
        prepared.encoder,
        prepared.prompts,
        recipe.generate,
        seed=recipe.seed,
        partial=partial,
        title=name,
        **pool,
    )
    path = folder.root / f"pred-{name}.json"
    atomic.write_json(path, generate.predictions(prepared.prompts, result.answers))
    tokens = [answer.tokens for answer in result.flat]
    return {
        **point,
        "file": path.name,
        "ended_at_eos": round(sum(answer.ended for answer in result.flat) / len(tokens), 4),
        "mean_tokens": round(sum(tokens) / len(tokens), 1),
        "seconds": round(result.seconds, 1),
    }
