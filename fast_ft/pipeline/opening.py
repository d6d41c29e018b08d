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
from fast_ft.pipeline import course_references, judge_phase, restore, resume
from fast_ft.pipeline.backup import Backup
from fast_ft.pipeline.set_up import check_model
from fast_ft.recipe.schema import Recipe
from fast_ft.run import lock
from fast_ft.run.folder import RunDir, output_folder, refuse_foreign


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
    refuse_foreign(root)
    if not os.path.isfile(root / "manifest.json"):  # noqa: PTH113 (False for a name that no file can have)
        check_model(recipe, prepared, answers=judged)
        if judged:
            judge_phase.check(recipe.judge, prepared.prompts)
            course_references.check(recipe, prepared.prompts)
    with interruptible(), lock.hold(root):
        restore.move_in(root)  # the rest of what a kill left
        if backup is None:
            folder = RunDir.open(recipe, recipe_path)
            resume.go_on(folder, recipe, prepared, force=force_resume, judged=judged)
            yield folder
            return
        with lock.hold(backup.folder):  # another machine may have the same folder mounted
            _take_up(backup, recipe, prepared, force_resume)
            folder = RunDir.open(recipe, recipe_path, on_saved=backup.save, on_answer=backup.answered)
            resume.go_on(folder, recipe, prepared, force=force_resume, judged=judged)
            try:
                yield folder
            except KeyboardInterrupt:
                if folder.done("train") is not None:
                    backup.answered(now=True)
                raise


def _take_up(backup: Backup, recipe: Recipe, prepared: PreparedData, force: bool) -> None:
    """Restore a run from its backup where there is none in its folder. InputError where it may not go on."""
    if (backup.root / "manifest.json").is_file():
        backup.refuse_another()
        return

    def check(folder: Path) -> None:
        try:
            resume.check(RunDir.at(folder), recipe, prepared, force=force)
        except InputError as error:
            raise InputError(
                f"{backup.folder} holds a backup that this recipe does not go on from. Nothing was written to "
                f"{backup.root}.\n{error}\nWhere the backup is another run's, name another backup_dir, or an "
                "output_dir that ends in another name"
            ) from None

    restore.restore(backup, check)
