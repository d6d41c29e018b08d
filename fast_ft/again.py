"""What is done again on a finished run: other answers by its adapter, other scores of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fast_ft import data, lease, resume
from fast_ft.errors import BudgetMissed, InputError
from fast_ft.generate_phase import budget_missed, generate_phase
from fast_ft.interrupt import interruptible
from fast_ft.judge import prices
from fast_ft.load import resolved, with_overrides
from fast_ft.phases import judge_phase, report_phase
from fast_ft.prepare import Prepared, prepare
from fast_ft.progress import note
from fast_ft.recipe import Recipe
from fast_ft.rundir import RunDir


def open_run(root: str | Path, overrides: Sequence[str]) -> tuple[RunDir, Recipe]:
    """Return a trained run's folder and its recipe, with other generate.* values or another data.test."""
    folder = RunDir.at(root)
    if folder.done("train") is None:
        raise InputError(f"{root}: this run has no adapter yet. Run its recipe first.")
    if wrong := [text for text in overrides if not text.startswith(("generate.", "data.test="))]:
        raise InputError(f"{wrong[0]!r}: only generate.* and data.test can change here; train anew for other keys.")
    return folder, with_overrides(folder.recipe(), overrides)


def generate_again(root: str | Path, overrides: Sequence[str]) -> Path:
    """Answer the prompts again with a run's adapter; the former pred.json is kept beside, under its digest."""
    folder, recipe = open_run(root, overrides)
    prepared = prepare(recipe)
    if not prepared.prompts:
        raise InputError(f"{root}: there are no prompts to answer. Give them: data.test=FILE.")
    with interruptible(), lease.hold(folder.root) as folder.lease:
        partial = folder.root / "pred-again.partial.jsonl"  # the run's own may hold answers by other settings
        partial.unlink(missing_ok=True)
        generate_phase(folder, recipe, prepared, partial)
        folder.update(generated_with=resolved(recipe)["generate"] | {"test": recipe.data.test})
        renew_scores(folder, recipe, prepared)
        report_phase(folder)
    if (folder.done("generate") or {}).get("cut_by_budget"):
        raise BudgetMissed(budget_missed(folder))
    return folder.pred


def renew_scores(folder: RunDir, recipe: Recipe, prepared: Prepared) -> None:
    """Score new answers where that costs nothing; else set the former answers' scores aside, for they are not these's.

    The former scores are kept beside, under the digest of their pred.json.
    """
    if not folder.scores.is_file():
        return
    if resume.scored_pred(folder) == folder.manifest()["digests"]["pred"]:
        return
    beside = resume.set_scores_aside(folder)
    try:
        if recipe.judge.kind == "reference":
            judge_phase(folder, recipe, prepared.prompts)
            note(f"the new answers were scored; the former scores are in {beside}")
            return
    except InputError as error:
        note(f"note: {error}")
    note(f"scores.json was of the former answers: it is {beside} now. `judge {folder.root}` scores the new ones")


def judge_again(
    root: str | Path,
    overrides: Sequence[str],
    *,
    against: str | Path | None = None,
    dry_run: bool = False,
    ask_again: bool = False,
) -> RunDir:
    """Judge a run's answers, by its own recipe or by other judge.* keys, and return the run folder."""
    folder = RunDir.at(root)
    if wrong := [text for text in overrides if not text.startswith("judge.")]:
        raise InputError(f"{wrong[0]!r}: only judge.* can change here; generate or train anew for other keys.")
    recipe = with_overrides(folder.recipe(), overrides)
    recipe = recipe.model_copy(update={"judge": prices.bounded(recipe.judge, [o.split("=")[0] for o in overrides])})
    if recipe.judge.kind == "none":
        raise InputError(
            f"{root}: its recipe names no judge. Say which: judge.kind=openai, or judge.kind=reference, and "
            "judge.references=FILE"
        )
    test = folder.manifest().get("generated_with", {}).get("test", recipe.data.test)
    try:
        prompts = data.load_prompts(test)[0] if test else []
    except InputError as error:
        note(f"note: no scores by skill and difficulty, since the prompts cannot be read: {error}")
        prompts = []
    other = RunDir.at(against) if against is not None else None
    with interruptible(), lease.hold(folder.root) as folder.lease:
        judge_phase(folder, recipe, prompts, against=other, dry_run=dry_run, ask_again=ask_again)
        if not dry_run:
            folder.update(judged_with=resolved(recipe)["judge"])
            report_phase(folder)
    return folder
