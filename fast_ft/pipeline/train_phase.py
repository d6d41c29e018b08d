"""The phase that trains: all stages, from the last checkpoint on, to the adapter."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from fast_ft.common import atomic_files, gpu, out_of_memory, process_group
from fast_ft.common.console import Bar, note
from fast_ft.common.errors import InputError
from fast_ft.common.minutes import Clock, TrainPace
from fast_ft.data.batches import StageJob, StageResult
from fast_ft.data.prepare import PreparedData, compare_tokenizers
from fast_ft.hub import fingerprint
from fast_ft.models import adapter_check, lora_files
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel, Loader
from fast_ft.pipeline import sanity_checks
from fast_ft.pipeline.backup import Backup
from fast_ft.pipeline.model_card import model_card
from fast_ft.pipeline.phases import check_model, keep_plan, settle_plan
from fast_ft.plan import plans
from fast_ft.recipe.schema import Recipe
from fast_ft.report.plots import loss_picture
from fast_ft.run import epoch_loss
from fast_ft.run.artifacts import read_log
from fast_ft.run.folder import RunDir
from fast_ft.train import checkpoints, session, state
from fast_ft.train.worker import Order


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
    that a budget ends early leaves an adapter; so does one that bad numbers end, and raises InputError.
    """
    check_model(recipe)
    started = clock()
    folder.update(model=fingerprint.model(recipe.model.name_or_path, recipe.model.revision))
    if recipe.train.deterministic:
        gpu.be_deterministic()
    together = process_group.here()
    maker = maker or choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, world_size=together.size)
    together.begin()
    settled, changed = _settled(folder, recipe, prepared, maker.name, together.size)
    jobs = prepared.jobs
    if together.size > 1:
        together.share(Order(recipe, jobs, prepared.encoder.pad_id, settled.train, maker.name, stop_after).to_json())
    with out_of_memory.explained("loading the base model", out_of_memory.LOADING):
        loaded = maker.for_training()
    together.agree()
    notes = [*prepared.notes, *changed, *loaded.notes, *compare_tokenizers(recipe, loaded.tokenizer, prepared)]
    for text in notes[len(prepared.notes) :]:
        note(f"note: {text}")
    timed = recipe.budget.train_minutes is not None
    atomic_files.check_space(
        folder.root, *checkpoints.space(loaded.model, recipe.train, folder.checkpoints, timed=timed)
    )
    if recipe.backup_dir is not None:
        Backup(folder.root, recipe.backup_dir).say_needed(checkpoints.size(loaded.model, recipe.train))
    with atomic_files.Lines(folder.log) as log:
        course, lines, results = _train(
            folder, recipe, prepared, loaded, settled, jobs, log, stop_after, clock, started
        )
    together.leave()
    if course.setbacks.gave_up and not lines:
        raise InputError(sanity_checks.came_to_nothing(recipe.train, folder.diverged))
    loss_picture(folder.loss_png, lines)
    ended = course.finished or course.out_of_time or course.setbacks.gave_up
    suspicious = _suspicious(recipe, course, lines) if ended else []  # a preview has seen too few steps to tell
    for text in suspicious:
        note(f"warning: {text}")
    notes += [*course.notes, *suspicious]
    with (
        out_of_memory.explained("saving the adapter", lambda: _kept(folder, len(lines))),
        atomic_files.replace_folder(folder.adapter if ended else folder.taste / "adapter") as target,
    ):
        lora_files.save(loaded.model, target, recipe.model.name_or_path, model_card(recipe, prepared, lines))
        loaded.tokenizer.save_pretrained(str(target))
        adapter_check.store(target, loaded, [prepared.rows[e.id] for e in prepared.examples], prepared.encoder.pad_id)
    course.free()
    if not ended:
        return
    more: dict[str, Any] = {}
    if not course.finished:
        more = {
            "stopped_at_step": len(lines),
            "of_steps": course.total,
            "why": "numbers" if course.setbacks.gave_up else "budget",
        }
    if course.out_of_time:
        more["minutes"] = recipe.budget.train_minutes
    if worthless := sanity_checks.rose(lines, recipe.train):
        more["worthless"] = worthless
    means = epoch_loss.first_and_last(lines, prepared.staged(), recipe.train.effective_batch_size)
    weights = atomic_files.sha256_file(folder.adapter / "adapter_model.safetensors")
    folder.update(notes=notes, digests=folder.manifest()["digests"] | {"adapter": weights})
    folder.finish(
        "train",
        clock() - started,
        backend=loaded.backend,
        dtype=loaded.dtype,
        **({"world_size": together.size} if together.size > 1 else {}),
        steps=len(lines),
        skipped_steps=sum(line["skipped"] for line in lines),
        first_loss=next(line["loss"] for line in lines if math.isfinite(line["loss"])),  # fp16 may skip the first steps
        last_loss=next(line["loss"] for line in reversed(lines) if math.isfinite(line["loss"])),
        **dict(zip(("first_epoch_loss", "last_epoch_loss"), means or (), strict=False)),
        tokens=sum(line["tokens"] for line in lines),
        supervised_tokens=sum(line["supervised_tokens"] for line in lines),
        training_seconds=round(sum(line["seconds"] for line in lines), 3),
        peak_gib=round(max((result.peak_gib for result in results), default=0.0), 3),
        out_of_memory=course.out_of_memory,
        **more,
    )
    if course.setbacks.gave_up:
        raise InputError(sanity_checks.gave_up(recipe.train, len(lines), folder.adapter, folder.diverged))


def _suspicious(recipe: Recipe, course: session.Course, lines: list[dict[str, Any]]) -> list[str]:
    """Return what is suspicious in a training that has ended; first, whether a budget ended it."""
    early: list[str] = []
    if course.out_of_time:
        text = f"training ended after step {len(lines)} of {course.total}, its learning rate brought down early: "
        early = [f"{text}budget.train_minutes is {recipe.budget.train_minutes:g}"]
    weights = lora_files.weights(course.loaded.model)
    return [*early, *sanity_checks.training_warnings(lines, weights, recipe.train, *early)]


def _settled(
    folder: RunDir, recipe: Recipe, prepared: PreparedData, backend_name: str, world_size: int
) -> tuple[plans.RunPlan, list[str]]:
    """Return the run's plan, and what to note where it goes on in another number of processes."""
    settled = settle_plan(folder, recipe, prepared, backend_name, world_size)
    before = settled.train.world_size
    if before == world_size:
        return settled, []
    settled = replace(settled, train=replace(settled.train, world_size=world_size))
    keep_plan(folder, settled)
    if checkpoints.newest(folder.checkpoints) is None:
        return settled, []
    text = f"training goes on in {world_size} processes, after {before}: equal but for rounding, and what noise draws"
    return settled, [text]


def _train(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    loaded: LoadedModel,
    settled: plans.RunPlan,
    jobs: list[StageJob],
    log: atomic_files.Lines,
    stop_after: int | None,
    clock: Clock,
    started: float,
) -> tuple[session.Course, list[dict[str, Any]], list[StageResult]]:
    """Train from the last checkpoint on; return the course, the log's lines, and what the stages did."""
    earlier, done, timed = checkpoints.place(folder.checkpoints, recipe.budget.train_minutes)
    lost = log.keep(done.global_step)  # what came after the checkpoint is trained again
    lines = read_log(folder.log)
    steps = sum(len(job.batches) for job in jobs)
    told = out_of_memory.explained("training", lambda: f"{out_of_memory.TRAINING} {_kept(folder, len(lines))}")
    with told, Bar("training", steps, done=done.global_step) as bar:

        def on_step(entry: dict[str, Any]) -> None:
            log.add(entry)
            lines.append(entry)
            speed = entry["tokens"] / max(entry["seconds"], 1e-9)
            memory = f"  {entry['gib']:.1f} GiB" if entry["gib"] else ""
            bar.advance(1, f"{entry['stage']}  loss {entry['loss']:.3f}  {speed:,.0f} tokens/s{memory}")

        def save_state(course: session.Course) -> None:
            log.sync()  # a checkpoint's steps are in the log, whatever happens to the machine
            step = course.progress.global_step
            try:
                checkpoints.save(
                    folder.checkpoints,
                    step,
                    lambda target: state.save(target, loaded.model, course.optimizer, course.progress),
                )
            except Exception as error:
                if not out_of_memory.is_short(error):
                    raise
                course.notes.append(f"no checkpoint after step {step}: out of memory, in the smallest pieces too")
                note(f"warning: {course.notes[-1]}. Training goes on; the next checkpoint holds these steps")
                return
            folder.on_saved()

        def back(step: int) -> None:
            with atomic_files.Lines(folder.diverged) as aside:
                for line in log.keep(step):
                    aside.add(line)
            bar.advance(step - len(lines))
            del lines[step:]

        course = session.Course(
            loaded,
            jobs,
            recipe.train,
            recipe.curriculum.carry,
            seed=recipe.seed,
            pad_id=prepared.encoder.pad_id,
            plan=settled.train,
            log=on_step,
            work_folder=folder.checkpoints,
            ranks=process_group.here(),
        )
        course.on_checkpoint, course.setbacks.on_back, course.stop_after = save_state, back, stop_after
        course.on_settled = lambda plan: keep_plan(folder, replace(settled, train=plan))
        course.setbacks.last_good = lambda step: checkpoints.newest(folder.checkpoints, before=step)
        if (minutes := recipe.budget.train_minutes) is not None:
            tokens = [sum(step) for job in jobs for step in job.lengths]
            spent = done.seconds + sum(line["seconds"] for line in lost if line["step"] > timed)
            course.pace = TrainPace(minutes, tokens, clock, spent=spent, since=started)
        if earlier is not None:
            note(f"going on after step {done.global_step} of {course.total}")
            course.resume(earlier)
        results = course.run()
    return course, lines, results


def _kept(folder: RunDir, steps: int) -> str:
    """Return what is kept of a training that ends here."""
    last = checkpoints.newest(folder.checkpoints)
    kept = f"the checkpoint after step {checkpoints.step(last)} of {steps}" if last is not None else "no checkpoint"
    return f"There is {kept}: the same command goes on from there."
