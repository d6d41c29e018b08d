"""What the phases of a run share, and the two short ones: judge and report.

pipeline/train_phase.py and pipeline/generate_phase.py are the others. Each phase reads and leaves files in the run
folder.
"""

from __future__ import annotations

import importlib.util
import json
import time
from typing import Any

from fast_ft.common import atomic_files, gpu, untrusted_files
from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.data.examples import Prompt
from fast_ft.data.prepare import PreparedData
from fast_ft.hub import download
from fast_ft.hub.families import ModelShape
from fast_ft.judge import scoring
from fast_ft.pipeline import judge_phase as judging
from fast_ft.plan import planner, plans
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.loader import resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.report import write
from fast_ft.run.folder import RunDir


def settle_plan(
    folder: RunDir, recipe: Recipe, prepared: PreparedData, backend_name: str, world_size: int = 1
) -> plans.RunPlan:
    """Return this run's plan: the one in plan.json if there is one, else a new one, written there.

    A budget.memory_gib of the recipe's binds this process from here on.
    """
    if recipe.budget.memory_gib != "auto":
        gpu.cap_gpu_gib(float(recipe.budget.memory_gib))
    if folder.plan.is_file():
        content = untrusted_files.json_object(folder.plan, remedy="Delete it, and a new plan is made.")
        there = plans.RunPlan.from_json(content, folder.plan)
        if folder.manifest().get("plan") != content:  # a stop came between keep_plan's two writes
            folder.update(plan=content)
        return there
    settled = planner.settle(
        recipe,
        prepared,
        model_config(recipe),
        backend=backend_name,
        card=planner.card_here(),
        world_size=world_size,
    )
    keep_plan(folder, settled)
    return settled


def keep_plan(folder: RunDir, settled: plans.RunPlan) -> None:
    """Write a plan to plan.json, and to the manifest: that alone is then enough to do the run again."""
    atomic_files.write_json(folder.plan, settled.to_json())
    folder.update(plan=settled.to_json())


def judge_phase(folder: RunDir, recipe: Recipe, prompts: list[Prompt], **options: Any) -> None:
    """Score pred.json, and the base model's answers where there are some, into scores.json; options: judge_run's.

    Raises BudgetMissed where too many scores are missing; the phase is then not done, and the same command asks again.
    """
    started = time.monotonic()
    scores = judging.judge_run(folder, recipe.judge, judging.groups(prompts), seed=recipe.seed, **options)
    if scores is None:  # a dry run
        return
    if missed := scoring.too_many_missing(scores):
        raise BudgetMissed(missed)
    facts = {key: scores[key] for key in ("model", "rubric") if key in scores}
    folder.finish(
        "judge",
        time.monotonic() - started,
        {"judged_with": resolved(recipe)["judge"]},
        kind=recipe.judge.kind,
        mean=scores["mean"],
        **facts,
    )


def report_phase(folder: RunDir, prepared: PreparedData | None = None) -> None:
    """Write report.html. The run is done by now: a full disk here is a note, no failure."""
    try:
        write.write_report(folder, prepared)
    except InputError as error:
        note(f"no report: {error}")


def check_model(recipe: Recipe) -> None:
    """Fetch the base model if need be; InputError where it is incomplete, of another kind, or against the rules."""
    config = model_config(recipe)
    ModelShape.from_config(config)
    tracker = recipe.train.report_to
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise InputError(f"train.report_to: {tracker} is not installed: `pip install {tracker}`, or write none")
    if recipe.rules is not None and (broken := policy_ntu_hw5.check_model_config(config)):
        raise InputError("\n".join(broken))


def model_config(recipe: Recipe) -> dict[str, Any]:
    """Return config.json's content of the base model."""
    folder = download.model_folder(recipe.model.name_or_path, recipe.model.revision)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
