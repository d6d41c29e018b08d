"""The whole run on one page: recipe in; adapter, pred.json and manifest out. The same call again goes on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.folders import refuse_unmounted
from fast_ft.common.minutes import Clock
from fast_ft.common.signals import interruptible
from fast_ft.data.prepare import Prepared, prepare
from fast_ft.pipeline import judge_phase, resume
from fast_ft.pipeline.backup import Backup
from fast_ft.pipeline.generate_phase import generate_phase, missed
from fast_ft.pipeline.set_up import check_model
from fast_ft.pipeline.train_phase import train_phase
from fast_ft.recipe.schema import Recipe
from fast_ft.report import write
from fast_ft.run import lock
from fast_ft.run.folder import RunDir, output_folder


def run(
    recipe: Recipe,
    recipe_path: str | Path,
    *,
    until: str = "pred",
    force_resume: bool = False,
    clock: Clock = time.monotonic,
) -> RunDir:
    """Run a recipe to its adapter (`until="adapter"`) or to its answers and scores, and return the run folder.

    What is finished is not done again: the manifest's phases say what that is. Where recipe or data have changed since,
    pipeline/resume.py says what follows; force_resume goes on even so. Raises BudgetMissed at the end of a run that is
    complete,
    but that a budget of minutes cut short, or whose loss rose.
    """
    prepared = prepare(recipe)
    with opened(recipe, recipe_path, prepared, judged=until == "pred", force_resume=force_resume) as folder:
        _run(folder, recipe, prepared, until, clock)
        if text := missed(folder):
            raise BudgetMissed(text, folder.root)
    return folder


@contextlib.contextmanager
def opened(
    recipe: Recipe, recipe_path: str | Path, prepared: Prepared, *, judged: bool = True, force_resume: bool = False
) -> Iterator[RunDir]:
    """Give the recipe's run folder, new or to be resumed, held by a lease; its selection is recorded."""
    root = output_folder(recipe, recipe_path)
    backup = Backup(root, recipe.backup_dir) if recipe.backup_dir is not None else None
    for place in (root, *([backup.folder] if backup is not None else [])):
        refuse_unmounted(place)  # before a model is fetched
    if not os.path.isfile(root / "manifest.json"):  # noqa: PTH113 (False for a name that no file can have)
        check_model(recipe)  # before there is a folder: a refused run leaves nothing behind
        if judged:
            judge_phase.check(recipe.judge, prepared.prompts)
    restored = False
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruptible())
        stack.enter_context(lock.hold(root))
        if backup is not None:
            stack.enter_context(lock.hold(backup.folder))  # another machine may have the same folder mounted
            restored = not (root / "manifest.json").is_file() and backup.restore()
        if backup is None:
            folder = RunDir.open(recipe, recipe_path)
        else:
            folder = RunDir.open(recipe, recipe_path, on_saved=backup.save, on_answer=backup.answered)
        try:
            resume.go_on(folder, recipe, prepared, force=force_resume)
        except InputError as error:
            if backup is None or not restored:
                raise
            backup.take_back()
            raise InputError(
                f"{backup.folder} is the backup of another run, whose folder has the same name. Name another "
                f"backup_dir, or an output_dir that ends in another name; nothing was touched.\n{error}"
            ) from None
        try:
            yield folder
        except KeyboardInterrupt:
            if backup is not None and folder.done("train") is not None:
                backup.answered(now=True)
            raise


def _run(folder: RunDir, recipe: Recipe, prepared: Prepared, until: str, clock: Clock) -> None:
    finished = folder.manifest()["phases"]
    if folder.done("train") is None:
        train_phase(folder, recipe, prepared, clock=clock)
    if until == "pred" and prepared.prompts and folder.done("generate") is None:
        generate_phase(folder, recipe, prepared, clock=clock)
    if until == "pred" and prepared.prompts and recipe.judge.kind != "none" and folder.done("judge") is None:
        judge_phase.judge_phase(folder, recipe, prepared.prompts)
    if folder.manifest()["phases"] != finished or not folder.report.is_file():
        write.try_report(folder, prepared)
