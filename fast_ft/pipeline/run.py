"""The whole run on one page: recipe in; adapter, pred.json and manifest out. The same call again goes on."""

from __future__ import annotations

import time
from pathlib import Path

from fast_ft.common.errors import BudgetMissed
from fast_ft.common.minutes import Clock
from fast_ft.data.prepare import prepare
from fast_ft.pipeline import judge_phase, way
from fast_ft.pipeline.generate_phase import generate_phase, missed
from fast_ft.pipeline.opening import opened
from fast_ft.pipeline.set_up import check_prompts
from fast_ft.pipeline.train_phase import train_phase
from fast_ft.recipe.schema import Recipe
from fast_ft.report import write
from fast_ft.run.folder import RunDir


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
    complete, but that a budget of minutes cut short, or whose loss rose.
    """
    way.begin(recipe, recipe_path)
    prepared = prepare(recipe)
    answered = until == "pred" and bool(prepared.prompts)
    judged = answered and recipe.judge.kind != "none"
    with opened(recipe, recipe_path, prepared, judged=until == "pred", force_resume=force_resume) as folder:
        before = folder.record().phases
        if answered and folder.done("generate") is None:
            check_prompts(recipe, prepared)
        if folder.done("train") is None:
            train_phase(folder, recipe, prepared, clock=clock)
        if answered and folder.done("generate") is None:
            generate_phase(folder, recipe, prepared, clock=clock)
        if judged and folder.done("judge") is None:
            judge_phase.judge_phase(folder, recipe, prepared.prompts)
        if folder.record().phases != before or not folder.report.is_file():
            write.try_report(folder, prepared)
        if text := missed(folder):
            raise BudgetMissed(text, folder.root)
    return folder
