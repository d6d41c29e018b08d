"""The phase that trains: set up, fit all stages from the last checkpoint on, save the adapter."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import atomic_files, environment, gpu, out_of_memory, process_group
from fast_ft.common.console import Bar, note
from fast_ft.common.errors import InputError
from fast_ft.common.minutes import Clock, TrainPace
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.prepare import PreparedData, compare_tokenizers
from fast_ft.hub import fingerprint
from fast_ft.models import adapter_check, lora_files
from fast_ft.models.loaders.base import LoadedModel, Loader
from fast_ft.pipeline import sanity_checks, training_verdict, way
from fast_ft.pipeline.adapter_loading import collects_new_objects_only
from fast_ft.pipeline.backup import Backup
from fast_ft.pipeline.model_card import model_card
from fast_ft.pipeline.set_up import adapter_to_start_from, card_to_plan_for, check_model, settle_for_training
from fast_ft.pipeline.train_recorder import Recorder
from fast_ft.plan.run_plan import RunPlan
from fast_ft.recipe.schema import Recipe
from fast_ft.report.plots import loss_picture
from fast_ft.run import epoch_loss
from fast_ft.run.artifacts import read_log
from fast_ft.run.folder import RunDir
from fast_ft.train import checkpoints
from fast_ft.train.task import TrainTask

if TYPE_CHECKING:  # these load torch, and are imported in functions
    from fast_ft.train.session import TrainSession

Lines = list[dict[str, Any]]  #: of log.jsonl, one for each step


@dataclass(frozen=True)
class SetUp:
    """All that training needs: the run, its model on its device, the plan and the rows. `notes` are of setting up."""

    folder: RunDir
    recipe: Recipe
    prepared: PreparedData
    loaded: LoadedModel
    plan: RunPlan
    task: TrainTask
    notes: list[str]


def train_phase(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    stop_after: int | None = None,
    maker: Loader | None = None,
    clock: Clock = time.monotonic,
) -> None:
    """Train all stages, save the adapter, and store what generation will check it by. A sweep gives its own backend.

    With stop_after, a training that is not done by that step leaves its state, and its adapter in taste/adapter. One
    that a budget ends early leaves an adapter.

    Raises:
        InputError: The model cannot be loaded or does not fit; or bad numbers ended the training, which leaves an
            adapter where it has had good steps.
    """
    check_model(recipe, prepared, answers=False)
    started, watch = clock(), Stopwatch()
    with contextlib.ExitStack() as stack:
        setup = _set_up(folder, recipe, prepared, stop_after, maker, watch, stack)
        _train(setup, clock, started, watch)


def _train(setup: SetUp, clock: Clock, started: float, watch: Stopwatch) -> None:
    """Train, save the adapter, and note in the manifest what came of it."""
    folder, recipe = setup.folder, setup.recipe
    session, lines = _fit(setup, clock, started, watch)
    if session.gave_up and not lines:
        raise InputError(sanity_checks.came_to_nothing(recipe.train, folder.diverged, stranded=session.is_stranded))
    ended = session.finished or session.out_of_time or session.gave_up
    if ended and not any(math.isfinite(line["loss"]) for line in lines):
        raise InputError(sanity_checks.no_number(recipe.train, len(lines), folder.log))
    loss_picture(folder.loss_png, lines)
    notes = [*setup.notes, *session.notes]
    if ended:
        notes += _best_weights(setup, session, lines)
    _save_adapter(setup, lines, folder.adapter if ended else folder.taste / "adapter")
    if not ended:  # a preview has seen too few steps to judge them
        session.free()
        return
    with out_of_memory.explained("measuring the adapter", lambda: _kept(setup)):
        suspicious, worthless = training_verdict.judge(session, lines, recipe)
    for text in suspicious:
        note(f"warning: {text}")
    notes += suspicious
    facts = _facts(setup, session, lines) | ({"worthless": worthless} if worthless else {})
    session.free()
    weights = atomic_files.sha256_file(folder.adapter / "adapter_model.safetensors")
    folder.update(notes=notes, digests=folder.manifest()["digests"] | {"adapter": weights})
    folder.finish("train", clock() - started, **facts)
    if session.gave_up:
        raise InputError(sanity_checks.gave_up(recipe.train, len(lines), folder.adapter, folder.diverged))


def _set_up(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    stop_after: int | None,
    maker: Loader | None,
    watch: Stopwatch,
    stack: contextlib.ExitStack,
) -> SetUp:
    """Settle the plan, start the other processes where there are some, load the model, and check the disk's space.

    Libraries that are loaded here are set apart from collections until `stack` is left.
    """
    folder.update(model=fingerprint.model(recipe.model.name_or_path, recipe.model.revision))
    if recipe.train.deterministic:
        gpu.be_deterministic()
    together, start = process_group.here(), adapter_to_start_from(folder, recipe)
    with watch.during("plan"):  # while Unsloth is being imported
        card = card_to_plan_for(folder, recipe)
    with watch.during("libraries"):
        if maker is None:
            maker = way.training_loader(folder, recipe, together.size)
            if maker.name != "unsloth":  # Unsloth has imported TRL, and changes it as it loads a model
                with environment.without_compiler():
                    from fast_ft.train import sft_trainer  # noqa: F401  # with TRL, which imports bitsandbytes

            stack.enter_context(collects_new_objects_only())
    together.begin()
    with watch.during("plan"):
        plan, changed = settle_for_training(folder, recipe, prepared, maker.name, card)
    jobs = prepared.jobs
    task = TrainTask(
        jobs, recipe.train, recipe.curriculum.carry, recipe.seed, prepared.encoder.pad_id, stop_after,
        prepared.validation,
    )  # fmt: skip
    if together.size > 1:
        from fast_ft.train.worker import Order

        together.share(Order(recipe, jobs, task.pad_id, plan.train, maker.name, stop_after).to_json())
    with watch.during("loading"), out_of_memory.explained("loading the base model", out_of_memory.LOADING):
        loaded = maker.for_training(start)
    together.agree()
    found = [*changed, *loaded.notes, *compare_tokenizers(recipe, loaded.tokenizer, prepared)]
    for text in found:
        note(f"note: {text}")
    timed = recipe.budget.train_minutes is not None
    space = checkpoints.space(loaded.model, recipe.train, folder.checkpoints, timed=timed)
    atomic_files.check_space(folder.root, *space)
    if recipe.backup_dir is not None:
        Backup(folder.root, recipe.backup_dir).say_needed(checkpoints.size(loaded.model, recipe.train))
    return SetUp(folder, recipe, prepared, loaded, plan, task, [*prepared.notes, *found])


def _fit(setup: SetUp, clock: Clock, started: float, watch: Stopwatch) -> tuple[TrainSession, Lines]:
    """Train from the last checkpoint on; return the session and the log's lines. `started` is when the phase began."""
    from fast_ft.train.session import TrainSession

    folder, task, minutes = setup.folder, setup.task, setup.recipe.budget.train_minutes
    with atomic_files.Lines(folder.log) as log:
        start = checkpoints.resume_point(folder.checkpoints, minutes)
        done = start.state.global_step
        lost = log.keep(done)  # what came after the checkpoint is trained again
        lines = read_log(folder.log)
        untimed = [line for line in lost if line["step"] > start.timed_until]
        spent = start.state.seconds + sum(line["seconds"] + line.get("validation_seconds", 0) for line in untimed)
        pace = TrainPace(minutes, task.step_tokens, clock, spent=spent, since=started, measurements=task.measurements)
        told = out_of_memory.explained("training", lambda: f"{out_of_memory.TRAINING} {_kept(setup)}")
        with told, Bar("training", task.total, done=done) as bar:
            callbacks = Recorder(folder, setup.plan, log, lines, bar, watch).callbacks()
            ranks = process_group.here()
            with watch.during("session"):
                session = TrainSession(setup.loaded, task, setup.plan.train, folder.checkpoints, callbacks, pace, ranks)
            if start.folder is not None:
                note(f"going on after step {done} of {task.total}")
                session.resume(start.folder)
            session.run()
    process_group.here().leave()
    return session, lines


def _best_weights(setup: SetUp, session: TrainSession, lines: Lines) -> list[str]:
    """Put the weights of the least validation loss into the model where train.load_best asks; return what to note."""
    from fast_ft.train import state

    at, load_best = session.state, setup.recipe.train.load_best
    last = next((x["validation_loss"] for x in reversed(lines) if "validation_loss" in x), None)
    if at.best_step is not None and at.best_loss is not None and last is not None:
        said = f"the least validation loss was {at.best_loss:.4f}, after step {at.best_step} of {len(lines)}"
        if load_best:
            state.load_weights(checkpoints.best(setup.folder.checkpoints, at.best_step), setup.loaded.model)
            said += f"; the adapter is that of this step (train.load_best); the last measurement gave {last:.4f}"
    elif load_best:
        said = "train.load_best: no weights with a validation loss were kept, so the adapter is that of the last step"
    else:
        return []
    note(f"note: {said}")
    return [said]


def _save_adapter(setup: SetUp, lines: Lines, adapter: Path) -> None:
    """Write the adapter's folder: weights, model card, tokenizer, and what generation checks the weights by."""
    recipe, prepared, loaded = setup.recipe, setup.prepared, setup.loaded
    with (
        out_of_memory.explained("saving the adapter", lambda: _kept(setup)),
        atomic_files.replace_folder(adapter) as target,
    ):
        lora_files.save(loaded.model, target, recipe.model.name_or_path, model_card(recipe, prepared, lines))
        loaded.tokenizer.save_pretrained(str(target))
        rows = [prepared.rows[example.id] for example in prepared.examples]
        adapter_check.store(target, loaded, rows, setup.task.pad_id)


def _facts(setup: SetUp, session: TrainSession, lines: Lines) -> dict[str, Any]:
    """Return what the manifest says of a training that has ended."""
    recipe, world_size = setup.recipe, process_group.here().size
    losses = [line["loss"] for line in lines if math.isfinite(line["loss"])]  # fp16 may skip the first steps
    means = epoch_loss.first_and_last(lines, setup.prepared.staged(), recipe.train.effective_batch_size)
    facts: dict[str, Any] = {
        "backend": setup.loaded.backend,
        **({"general_way": setup.loaded.general} if setup.loaded.general else {}),
        "dtype": setup.loaded.dtype,
        **({"world_size": world_size} if world_size > 1 else {}),
        "steps": len(lines),
        "skipped_steps": sum(line["skipped"] for line in lines),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **dict(zip(("first_epoch_loss", "last_epoch_loss"), means or (), strict=False)),
        "tokens": sum(line["tokens"] for line in lines),
        "supervised_tokens": sum(line["supervised_tokens"] for line in lines),
        "training_seconds": round(sum(line["seconds"] for line in lines), 3),
        "peak_gib": round(session.peak_gib, 3),
        "out_of_memory": session.steps.out_of_memory,
    }
    if not session.finished:
        why = "numbers" if session.gave_up else "budget"
        facts |= {"stopped_at_step": len(lines), "of_steps": setup.task.total, "why": why}
    if session.out_of_time:
        facts["minutes"] = recipe.budget.train_minutes
    if session.state.best_step is not None:
        facts |= {"best_step": session.state.best_step, "best_validation_loss": session.state.best_loss}
    return facts


def _kept(setup: SetUp) -> str:
    """Return what is kept of a training that ends here."""
    last = checkpoints.newest(setup.folder.checkpoints)
    if last is None:
        return "There is no checkpoint: the same command begins again."
    at = f"step {checkpoints.step(last)} of {setup.task.total}"
    return f"There is the checkpoint after {at}: the same command goes on from there."
