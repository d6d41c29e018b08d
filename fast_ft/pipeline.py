"""The whole run on one page: recipe in; adapter, pred.json and manifest out. The same call again goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fast_ft import environment, lease
from fast_ft.errors import InputError
from fast_ft.judge import judging
from fast_ft.load import resolved
from fast_ft.phases import check_model, generate_phase, judge_phase, report_phase, train_phase
from fast_ft.prepare import Prepared, prepare
from fast_ft.progress import note
from fast_ft.recipe import Recipe
from fast_ft.rundir import RunDir, output_folder


def run(recipe: Recipe, recipe_path: str | Path, *, until: str = "pred") -> RunDir:
    """Run a recipe to its adapter (`until="adapter"`) or to its answers and scores, and return the run folder.

    What is finished is not done again: the manifest's phases say what that is.
    """
    prepared = prepare(recipe)
    with opened(recipe, recipe_path, prepared, judged=until == "pred") as folder:
        _run(folder, recipe, prepared, until)
    return folder


@contextlib.contextmanager
def opened(recipe: Recipe, recipe_path: str | Path, prepared: Prepared, *, judged: bool = True) -> Iterator[RunDir]:
    """Give the recipe's run folder, new or to be resumed, held by a lease; its selection is recorded."""
    root = output_folder(recipe, recipe_path)
    if not (root / "manifest.json").is_file():
        check_model(recipe)  # before there is a folder: a refused run leaves nothing behind
        if judged:
            judging.check(recipe.judge, prepared.prompts)
    with lease.hold(root) as held:
        folder = RunDir.open(recipe, recipe_path)
        folder.lease = held
        record_selection(folder, recipe, prepared)
        yield folder


def _run(folder: RunDir, recipe: Recipe, prepared: Prepared, until: str) -> None:
    finished = folder.manifest()["phases"]
    if folder.done("train") is None:
        train_phase(folder, recipe, prepared)
    if until == "pred" and prepared.prompts and folder.done("generate") is None:
        generate_phase(folder, recipe, prepared)
    if until == "pred" and prepared.prompts and recipe.judge.kind != "none" and folder.done("judge") is None:
        judge_phase(folder, recipe, prepared.prompts)
    if folder.manifest()["phases"] != finished or not folder.report.is_file():
        report_phase(folder, prepared)


def record_selection(folder: RunDir, recipe: Recipe, prepared: Prepared) -> None:
    """Put into the manifest what will be trained on, and refuse to go on where the data has changed since."""
    rows = [{"id": e.id, "digest": e.digest} for e in prepared.examples]
    manifest = folder.manifest()
    earlier = manifest.get("rows")
    remedy = "has changed. Put the data back, or start anew with another output_dir."
    if earlier is not None and earlier != rows:
        raise InputError(
            f"{folder.root}: the selected rows are not those that this run began with; {recipe.data.train} {remedy}"
        )
    if earlier is not None and manifest["digests"].get("test") != prepared.digests.get("test"):
        raise InputError(
            f"{folder.root}: the prompts are not those that this run began with; {recipe.data.test} {remedy}"
        )
    for text in prepared.notes:
        note(f"note: {text}")
    if prepared.leakage["hits"]:
        note(f"warning: {len(prepared.leakage['hits'])} selected rows equal a test prompt; manifest.json names them")
    if earlier is not None:
        return
    folder.update(
        rows=rows,
        stages=[{"name": s.name, "ids": [e.id for e in s.examples]} for s in prepared.stages],
        leakage=prepared.leakage,
        digests=prepared.digests,
        notes=prepared.notes,
        environment=environment.describe(),
        carry=resolved(recipe)["curriculum"]["carry"] if len(prepared.stages) > 1 else None,
    )
