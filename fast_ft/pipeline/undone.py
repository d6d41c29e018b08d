"""Phases that a run has finished, and that are done again although their settings are the same."""

from __future__ import annotations

from fast_ft.common.minutes import longer
from fast_ft.common.wording import listed
from fast_ft.data.prepare import PreparedData
from fast_ft.recipe.schema import Budget
from fast_ft.run.folder import RunDir


def what_is_undone(folder: RunDir, prepared: PreparedData, budget: Budget) -> dict[str, str]:
    """Return {phase: what to say} for each finished phase that lost a file, or that more minutes may carry further."""
    return _lost(folder, prepared) | _cut_short(folder, budget)


def _lost(folder: RunDir, prepared: PreparedData) -> dict[str, str]:
    """Return {phase: what to say} for each finished phase whose files somebody has taken away since."""
    found = {}
    for phase in ("train", *(["generate", "judge"] if prepared.prompts else [])):
        if gone := folder.lost(phase):
            names = listed([str(path.relative_to(folder.root)) for path in gone])
            found[phase] = f"note: {names} {'is' if len(gone) == 1 else 'are'} not there any more, and made again"
    return found


def _cut_short(folder: RunDir, budget: Budget) -> dict[str, str]:
    """Return {"train" or "generate": what to say} for what a budget of minutes cut short, where there are more now."""
    train, answers = folder.done("train") or {}, folder.done("generate") or {}
    former = folder.manifest()["recipe"].get("budget", {})  # where an earlier version did not note the minutes
    found = {}
    if train.get("why") == "budget" and longer(budget.train_minutes, train.get("minutes", former.get("train_minutes"))):
        found["train"] = f"note: there are more minutes: training, which ended after step {train['steps']}, goes on"
    minutes = answers.get("minutes", former.get("generate_minutes"))
    if ("minutes" in answers or answers.get("cut_by_budget")) and longer(budget.generate_minutes, minutes):
        found["generate"] = "note: there are more minutes: the prompts are answered again, at full length"
    return found
