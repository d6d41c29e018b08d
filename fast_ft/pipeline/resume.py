"""A run goes on: what may have changed since it began, what may not, and what is done again.

model, lora, data, select, curriculum, train, seed   refused, shown as a diff; --force-resume goes on all the same
another base, tokenizer or template by that name     the same, where there is training or answering left to do
data.test, generate, judge.base_prompts              the adapter stays; the prompts are answered again
judge                                                the answers stay; they are judged again
a file of a finished phase that is gone              made again, with what follows from it
budget, output_dir, backup_dir, how often is saved   taken as they are now; with more minutes than those that ended
                                                     training, or shortened answers, that goes on or is done again
run_name                                             taken as it is now
package versions, GPU, the program itself            warned, and recorded in manifest.json (`resumed`)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted, listed
from fast_ft.data.examples import Example
from fast_ft.data.prepare import PreparedData
from fast_ft.pipeline import base_check, former_scores, set_up
from fast_ft.pipeline.undone import what_is_undone
from fast_ft.recipe.loader import digest, resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run import provenance
from fast_ft.run.folder import RunDir, differences, now
from fast_ft.run.made_with import as_made
from fast_ft.train import checkpoints

Diff = dict[str, tuple[Any, Any]]  #: {dotted key: (was, is)}

_FREE = ("run_name", "budget.", "search", "train.save_steps", "train.report_to")
_ANSWERS = ("generate.", "data.test", "judge.base_prompts")
_JUDGED = ("judge.",)


@dataclass(frozen=True)
class Changes:
    """What differs from what the run began with, by what follows from it."""

    training: Diff = field(default_factory=dict)
    answers: Diff = field(default_factory=dict)
    judging: Diff = field(default_factory=dict)
    free: Diff = field(default_factory=dict)

    def any(self) -> bool:
        """Return whether anything differs."""
        return bool(self.training or self.answers or self.judging or self.free)


def go_on(folder: RunDir, recipe: Recipe, prepared: PreparedData, *, force: bool = False) -> None:
    """Bring the folder to where this recipe goes on; InputError, and nothing touched, where it may not.

    A new run's selection is recorded.
    """
    manifest = folder.manifest()
    if "rows" not in manifest or not _begun(folder):
        before = compare(folder, recipe, prepared) if "rows" in manifest else Changes()
        if before.training:
            note(f"note: nothing was trained in {folder.root} yet: it begins again with this recipe")
        if before.training or before.answers:
            folder.plan.unlink(missing_ok=True)
        _say(prepared)
        _record(folder, recipe, prepared, notes=prepared.notes, environment=provenance.describe())
        return
    _tidy(folder)
    changes = compare(folder, recipe, prepared)
    undone = what_is_undone(folder, prepared, recipe.budget)
    if (
        undone.keys() & {"train", "generate"}
        or changes.answers
        or any(folder.done(phase) is None for phase in _model_phases(prepared))
    ):
        changes.training.update(base_check.model_changes(folder.record(), recipe))
    if changes.training and not force:
        raise InputError(
            f"{folder.root}: this run was trained with other settings than these:\n{show(changes.training)}\n"
            "Go back to those, or give these another output_dir; --force-resume goes on from the last checkpoint "
            "with these all the same"
        )
    for text in undone.values():
        note(text)
    if changes.answers:
        set_up.keep_attributed(folder, recipe, prepared)
    if changes.training:
        _force(folder, changes.training)
    if changes.training or changes.answers or changes.judging or undone:
        _judge_again(folder, changes.judging)
    if changes.training or changes.answers or undone.keys() & {"train", "generate"}:
        _answer_again(folder, changes.answers)
    if "train" in undone:  # last: whatever came of the adapter so far is marked by now as to be made again
        phases = folder.manifest()["phases"]
        phases.pop("train", None)
        folder.update(phases=phases)
    if changes.any():
        _record(folder, recipe, prepared)
    _compare_environment(folder, recipe, prepared)


def compare(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> Changes:
    """Return what differs between a run and what is asked for now: recipe, selected rows, prompts.

    Answers and scores are compared by what they were made with. Scores of a recipe that asks for none are left alone.
    """
    changes, manifest = Changes(), folder.manifest()
    try:
        former = resolved(folder.recipe())  # with the defaults of keys that came later
    except InputError:
        former = manifest["recipe"]
    judge = former["judge"]
    former = as_made(manifest | {"recipe": former})
    if judge["kind"] == recipe.judge.kind == "none":
        former["judge"] = judge
    for key, pair in differences(former, resolved(recipe), ignore=("output_dir", "backup_dir")).items():
        kinds = ((_FREE, changes.free), (_ANSWERS, changes.answers), (_JUDGED, changes.judging))
        into = next((diff for names, diff in kinds if key.startswith(names)), changes.training)
        into[key] = pair
    rows = recorded(prepared.examples)
    if manifest["rows"] != rows or manifest["stages"] != staged(prepared):
        changes.training["the selected rows"] = _rows_differ(manifest["rows"], rows)
    was, is_ = manifest["digests"].get("test"), prepared.digests.get("test")
    if was != is_ and "data.test" not in changes.answers:
        changes.answers[f"{recipe.data.test}'s digest"] = (was, is_)
    held_out = recorded(prepared.held_out)
    if manifest.get("validation", []) != held_out:
        changes.training["the validation rows"] = _rows_differ(manifest.get("validation", []), held_out)
    record = folder.record()
    changes.training.update(base_check.token_changes(record, prepared))
    if not changes.answers and not changes.training:
        changes.answers.update(base_check.prompt_changes(record, prepared))
    return changes


def _model_phases(prepared: PreparedData) -> list[str]:
    """Return the phases that load the base model."""
    return ["train", *(["generate"] if prepared.prompts else [])]


def show(diff: Diff) -> str:
    """Return a diff as indented lines: key: was -> is."""
    return "\n".join(f"  {key}: {_show(was)} -> {_show(is_)}" for key, (was, is_) in diff.items())


def recorded(rows: Iterable[Example]) -> list[dict[str, str]]:
    """Return what the manifest says of rows."""
    return [{"id": row.id, "digest": row.digest} for row in rows]


def staged(prepared: PreparedData) -> list[dict[str, Any]]:
    """Return what the manifest says of the stages."""
    return prepared.staged()


def _begun(folder: RunDir) -> bool:
    return folder.done("train") is not None or checkpoints.newest(folder.checkpoints) is not None


def _record(folder: RunDir, recipe: Recipe, prepared: PreparedData, **more: Any) -> None:
    """Write into the manifest what is run: the recipe, its rows, and what was found about them."""
    if prepared.selection.duplicates:
        atomic_files.write_json(folder.duplicates, [pair._asdict() for pair in prepared.selection.duplicates])
    else:
        folder.duplicates.unlink(missing_ok=True)
    kept = {name: value for name, value in folder.manifest().get("digests", {}).items() if name in ("adapter", "pred")}
    folder.update(
        recipe=resolved(recipe),
        recipe_digest=digest(recipe),
        rows=recorded(prepared.examples),
        stages=staged(prepared),
        validation=recorded(prepared.held_out),
        tokens=base_check.tokens(prepared),
        leakage=prepared.leakage,
        digests=prepared.digests | kept,
        carry=resolved(recipe)["curriculum"]["carry"] if len(prepared.stages) > 1 else None,
        **more,
    )


def _say(prepared: PreparedData) -> None:
    for text in prepared.notes:
        note(f"note: {text}")
    if hits := prepared.leakage["hits"]:
        note(f"warning: {counted(len(hits), 'selected row')} with a test prompt's text; manifest.json names them")


def _force(folder: RunDir, diff: Diff) -> None:
    note(f"warning: --force-resume: this run goes on with other settings than it began with:\n{show(diff)}")
    note("warning: its adapter comes from two recipes, which manifest.json notes")
    folder.reopen("train")
    folder.update(
        resumed=[*folder.manifest().get("resumed", []), {"at": now(), "forced": {k: list(v) for k, v in diff.items()}}],
    )
    folder.plan.unlink(missing_ok=True)  # it was settled for the other settings


def _answer_again(folder: RunDir, diff: Diff) -> None:
    if folder.reopen("generate") and diff:
        note(f"note: the prompts are answered again, the former pred.json is kept beside:\n{show(diff)}")
    for path in (folder.pred_partial, folder.base_partial):
        path.unlink(missing_ok=True)  # answers by other settings


def _tidy(folder: RunDir) -> None:
    """Put right what a kill between two writes left: spent files of a finished phase, scores of former answers."""
    if folder.done("generate") is None:
        return
    for path in (folder.pred_partial, folder.base_partial):
        path.unlink(missing_ok=True)
    former = folder.done("judge") is None and folder.scores.is_file()
    if former and former_scores.scored_pred(folder) != folder.manifest()["digests"].get("pred"):
        former_scores.set_scores_aside(folder)


def _judge_again(folder: RunDir, diff: Diff) -> None:
    beside = former_scores.set_scores_aside(folder)
    if diff and beside:
        note(f"note: the answers are judged again, the former scores are in {beside}:\n{show(diff)}")


def _compare_environment(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> None:
    """Warn of other package versions or another GPU than before, and record them; Colab changes overnight."""
    manifest = folder.manifest()
    if all(phase in manifest["phases"] for phase in _model_phases(prepared)):
        return
    earlier = manifest.get("resumed", [])
    last = next((e["environment"] for e in reversed(earlier) if "environment" in e), manifest["environment"])
    here = provenance.describe()
    diff = differences(last, here)
    if not diff:
        return
    said = {key: pair for key, pair in diff.items() if key != "program"}
    if said:
        note(f"warning: this run goes on in another environment, and its result may differ a little:\n{show(said)}")
    entry = {"at": now(), "environment": here, "changed": {key: list(pair) for key, pair in diff.items()}}
    folder.update(resumed=[*earlier, entry])


def _rows_differ(was: list[dict[str, str]], is_: list[dict[str, str]]) -> tuple[str, str]:
    old, new = ({row["id"]: row["digest"] for row in rows} for rows in (was, is_))
    changes = {
        "new": [id_ for id_ in new if id_ not in old],
        "gone": [id_ for id_ in old if id_ not in new],
        "changed": [id_ for id_ in new if id_ in old and old[id_] != new[id_]],
    }
    told = [f"{len(ids):,} {what} ({listed(list(map(repr, ids)))})" for what, ids in changes.items() if ids]
    what = ", ".join(told) or "in another order or other stages"
    return counted(len(was), "row"), f"{counted(len(is_), 'row')}: {what}"


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."
