"""A run goes on: what may have changed since it began, what may not, and what is done again.

model, lora, data, select, curriculum, train, seed   refused, shown as a diff; --force-resume goes on all the same
another base, tokenizer or template by that name     the same, where there is training or answering left to do
data.test, generate, judge.base_prompts              the adapter stays; the prompts are answered again
judge                                                the answers stay; they are judged again
a file of a finished phase that is gone              made again, with what follows from it
budget, output_dir, backup_dir, how often is saved   taken as they are now; with more minutes than those that ended
                                                     training, or shortened answers, that goes on or is done again;
                                                     for another memory_gib the plan is made again
run_name                                             taken as it is now
package versions, GPU, the program itself            warned, and recorded in manifest.json (`resumed`)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import labelled, note
from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded
from fast_ft.common.wording import counted
from fast_ft.data.prepare import PreparedData
from fast_ft.hub import download
from fast_ft.models import lora_files
from fast_ft.pipeline import base_check, course_references, former_scores, judge_phase, set_up
from fast_ft.pipeline.changes import Changes, Diff, compare, recorded, show
from fast_ft.pipeline.undone import what_is_undone
from fast_ft.recipe.loader import digest, resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run import provenance
from fast_ft.run.folder import RunDir, differences, now
from fast_ft.train import checkpoints, state

_MEMORY = "budget.memory_gib"


@dataclass(frozen=True)
class Decision:
    """How a run goes on. begins: nothing was trained yet. undone: what `what_is_undone` returns."""

    begins: bool
    changes: Changes = field(default_factory=Changes)
    undone: dict[str, str] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether training that was done goes on."""
        return bool(self.changes.training or "train" in self.undone)

    @property
    def answers(self) -> bool:
        """Whether the prompts are answered again."""
        return bool(self.changes.training or self.changes.answers or self.undone.keys() & {"train", "generate"})

    @property
    def judges(self) -> bool:
        """Whether the answers are judged again."""
        return bool(self.answers or self.changes.judging or self.undone)


def go_on(folder: RunDir, recipe: Recipe, prepared: PreparedData, *, force: bool = False, judged: bool = False) -> None:
    """Bring the folder to where this recipe goes on; InputError, and nothing touched, where it may not.

    A new run's selection is recorded. force, judged: see `check`.
    """
    decision = check(folder, recipe, prepared, force=force, judged=judged)
    if decision.begins:
        if decision.changes.training:
            note(f"note: nothing was trained in {folder.root} yet: it begins again with this recipe")
        if decision.changes.training or decision.changes.answers or _MEMORY in decision.changes.free:
            folder.plan.unlink(missing_ok=True)
        _say(prepared)
        folder.update(notes=prepared.notes, environment=provenance.describe(), **_record(folder, recipe, prepared))
    else:
        _tidy(folder)
        _apply(folder, recipe, prepared, decision)


def check(
    folder: RunDir, recipe: Recipe, prepared: PreparedData, *, force: bool = False, judged: bool = False
) -> Decision:
    """Return how a run goes on by this recipe. Nothing is written into it, and no model is loaded.

    force: as --force-resume. judged: answers and scores are made too, so what they need now is looked at now.

    Raises:
        InputError: it may not go on, --force-resume cannot go on from its checkpoint, or the answers or the judge that
            the recipe asks for now are not possible.
    """
    if "rows" not in folder.manifest():
        return Decision(begins=True)
    changes, undone = compare(folder, recipe, prepared), what_is_undone(folder, prepared, recipe.budget)
    if not _begun(folder):
        if changes.training:
            set_up.check_model(recipe, prepared, answers=judged)
        return Decision(True, changes)
    needs_model = changes.answers or undone.keys() & {"train", "generate"}
    if needs_model or any(folder.done(phase) is None for phase in _model_phases(prepared)):
        changes.training.update(base_check.model_changes(folder.record(), recipe))
    if changes.training and not force:
        raise InputError(
            f"{folder.root}: this run was trained with other settings than these:\n{show(changes.training)}\n"
            "Go back to those, or give these another output_dir; --force-resume goes on from the last checkpoint "
            "with these all the same"
        )
    if changes.training:
        _refuse_unfit(folder, recipe)
        set_up.check_model(recipe, prepared, answers=judged)
    if judged and changes.answers:
        set_up.check_prompts(recipe, prepared)
    if judged and (changes.answers or changes.judging):
        judge_phase.check(recipe.judge, prepared.prompts)
        course_references.check(recipe, prepared.prompts)
    return Decision(False, changes, undone)


def _refuse_unfit(folder: RunDir, recipe: Recipe) -> None:
    """Raise InputError where a recipe cannot go on from the run's last checkpoint, or begin without one, by force."""
    last = checkpoints.newest(folder.checkpoints)
    base = download.model_folder(recipe.model.name_or_path, recipe.model.revision, weights=False)
    if last is None:
        if recipe.model.adapter is not None:
            lora_files.check_start(expanded(recipe.model.adapter), base, recipe.lora)
        return
    if problem := lora_files.misfit(last / "adapter.safetensors", base, recipe.lora):
        raise InputError(
            f"{last}: this checkpoint is of another base model, or of another lora.r, lora.target_modules, "
            f"lora.use_dora or lora.modules_to_save: {problem}. --force-resume cannot go on from it. Go back to the "
            "run's own settings, or give these another output_dir; nothing was changed"
        )
    step = state.read(last).best_step
    if recipe.train.load_best and step is not None and not checkpoints.best(folder.checkpoints, step).is_dir():
        raise InputError(
            f"train.load_best: true, but the weights after step {step}, whose validation loss is the least so far, "
            "were not kept. Write false, or give these settings another output_dir; nothing was changed"
        )


def _apply(folder: RunDir, recipe: Recipe, prepared: PreparedData, decision: Decision) -> None:
    """Do what was decided. The manifest is written last, and once: until then the run is that of its former recipe."""
    changes, manifest = decision.changes, folder.manifest()
    for text in decision.undone.values():
        note(text)
    if changes.answers:
        set_up.keep_attributed(folder, recipe, prepared)
    earlier = resumed = manifest.get("resumed", [])
    if changes.training:
        told = show(changes.training)
        note(f"warning: --force-resume: this run goes on with other settings than it began with:\n{told}")
        note("warning: its adapter comes from two recipes, which manifest.json notes")
        forced = {key: list(pair) for key, pair in changes.training.items()}
        resumed = [*resumed, {"at": now(), "forced": forced}]
        folder.plan.unlink(missing_ok=True)  # it was settled for the other settings
    if decision.judges:
        beside = former_scores.set_scores_aside(folder)
        if changes.judging and beside:
            told = show(changes.judging)
            note(f"note: the answers are judged again, the former scores are in {beside}:\n{told}")
    if decision.answers:
        if changes.answers and folder.done("generate") is not None:
            told = show(changes.answers)
            note(f"note: the prompts are answered again, the former pred.json is kept beside:\n{told}")
        _forget_partial_answers(folder)
    again = [name for name, is_so in (("train", decision.trains), ("generate", decision.answers)) if is_so]
    there = folder.manifest()["phases"]
    phases = {name: facts for name, facts in there.items() if name not in again}
    values = _record(folder, recipe, prepared) if changes.any() else {}
    if changes.training:
        values["plan"] = {}
    if any(phase not in phases for phase in _model_phases(prepared)):
        resumed = [*resumed, *_other_environment(manifest)]
        if _MEMORY in changes.free:
            note(f"note: the plan is made again for other memory:\n{show({_MEMORY: changes.free[_MEMORY]})}")
            folder.plan.unlink(missing_ok=True)  # the manifest's own copy still names the way that trains
    if phases != there:
        values["phases"] = phases
    if resumed != earlier:
        values["resumed"] = resumed
    if values:
        folder.update(**values)


def _model_phases(prepared: PreparedData) -> list[str]:
    """Return the phases that load the base model."""
    return ["train", *(["generate"] if prepared.prompts else [])]


def _begun(folder: RunDir) -> bool:
    return folder.done("train") is not None or checkpoints.newest(folder.checkpoints) is not None


def _record(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """Return what the manifest says of what is run: the recipe, its rows, and what was found about them.

    duplicates.json is written beside it.
    """
    if prepared.selection.duplicates:
        atomic_files.write_json(folder.duplicates, [pair._asdict() for pair in prepared.selection.duplicates])
    else:
        folder.duplicates.unlink(missing_ok=True)
    kept = {name: value for name, value in folder.manifest().get("digests", {}).items() if name in ("adapter", "pred")}
    return {
        "recipe": resolved(recipe),
        "recipe_digest": digest(recipe),
        "rows": recorded(prepared.examples),
        "stages": prepared.staged(),
        "validation": recorded(prepared.held_out),
        "tokens": base_check.tokens(prepared),
        "leakage": prepared.leakage,
        "digests": prepared.digests | kept,
        "carry": resolved(recipe)["curriculum"]["carry"] if len(prepared.stages) > 1 else None,
    }


def _say(prepared: PreparedData) -> None:
    for text in prepared.notes:
        note(labelled(text))
    if hits := prepared.leakage["hits"]:
        note(f"warning: {counted(len(hits), 'selected row')} with a test prompt's text; manifest.json names them")


def _tidy(folder: RunDir) -> None:
    """Put right what a kill between two writes left: spent files of a finished phase, scores of former answers."""
    if folder.done("generate") is None:
        return
    _forget_partial_answers(folder)
    former = folder.done("judge") is None and folder.scores.is_file()
    if former and former_scores.scored_pred(folder) != folder.manifest()["digests"].get("pred"):
        former_scores.set_scores_aside(folder)


def _forget_partial_answers(folder: RunDir) -> None:
    for path in (folder.pred_partial, folder.base_partial):
        path.unlink(missing_ok=True)


def _other_environment(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Warn of other package versions or another GPU than before; return what to record. Colab changes overnight."""
    earlier = manifest.get("resumed", [])
    last = next((e["environment"] for e in reversed(earlier) if "environment" in e), manifest["environment"])
    here = provenance.describe()
    diff: Diff = differences(last, here)
    if not diff:
        return []
    said = {key: pair for key, pair in diff.items() if key != "program"}
    if said:
        note(f"warning: this run goes on in another environment, and its result may differ a little:\n{show(said)}")
    return [{"at": now(), "environment": here, "changed": {key: list(pair) for key, pair in diff.items()}}]
