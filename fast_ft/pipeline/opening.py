"""A run folder, opened for a run: checked before it is made, held by a lease, restored from its backup where needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fast_ft.common.errors import InputError
from fast_ft.common.folders import refuse_unmounted
from fast_ft.common.signals import interruptible
from fast_ft.data.prepare import PreparedData
from fast_ft.pipeline import course_references, judge_phase, resume
from fast_ft.pipeline.backup import Backup
from fast_ft.pipeline.set_up import check_model
from fast_ft.recipe.schema import Recipe
from fast_ft.run import lock
from fast_ft.run.folder import RunDir, output_folder


@contextlib.contextmanager
def opened(
    recipe: Recipe, recipe_path: str | Path, prepared: PreparedData, *, judged: bool = True, force_resume: bool = False
) -> Iterator[RunDir]:
    """Give the recipe's run folder, new or to be resumed, held by a lease; its selection is recorded.

    judged: what would stop the judge hours later is said now. Raises InputError where the run may not go on; of a
    refused run there is no folder.
    """
    root = output_folder(recipe, recipe_path)
    backup = Backup(root, recipe.backup_dir) if recipe.backup_dir is not None else None
    for place in (root, *([backup.folder] if backup is not None else [])):
        refuse_unmounted(place)  # before a model is fetched
    is_new = not os.path.isfile(root / "manifest.json")  # noqa: PTH113 (False for a name that no file can have)
    if is_new or force_resume:
        check_model(recipe, prepared, answers=judged)
    if is_new and judged:
        judge_phase.check(recipe.judge, prepared.prompts)
        course_references.check(recipe, prepared.prompts)
    with interruptible(), lock.hold(root):
        if backup is None:
            folder = RunDir.open(recipe, recipe_path)
            resume.go_on(folder, recipe, prepared, force=force_resume)
            yield folder
            return
        with lock.hold(backup.folder):  # another machine may have the same folder mounted
            folder = _backed_up(backup, recipe, recipe_path, prepared, force_resume)
            try:
                yield folder
            except KeyboardInterrupt:
                if folder.done("train") is not None:
                    backup.answered(now=True)
                raise


def _backed_up(
    backup: Backup, recipe: Recipe, recipe_path: str | Path, prepared: PreparedData, force_resume: bool
) -> RunDir:
    """Return the run folder, restored from its backup where there is no run in it. Raises InputError."""
    restored = not (backup.root / "manifest.json").is_file() and backup.restore()
    folder = RunDir.open(recipe, recipe_path, on_saved=backup.save, on_answer=backup.answered)
    try:
        resume.go_on(folder, recipe, prepared, force=force_resume)
    except InputError as error:
        if not restored:
            raise
        backup.take_back()
        raise InputError(
            f"{backup.folder} is the backup of another run, whose folder has the same name. Name another "
            f"backup_dir, or an output_dir that ends in another name; nothing was touched.\n{error}"
        ) from None
    return folder
