"""The phase that trains: all stages, from the last checkpoint on, to the adapter."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fast_ft import atomic, backend, checkpoints, identity, plan, selfcheck, state, train
from fast_ft.card import model_card
from fast_ft.errors import InputError
from fast_ft.phases import check_model, keep_plan, settle_plan
from fast_ft.picture import loss_picture
from fast_ft.prepare import Prepared, compare_tokenizers
from fast_ft.progress import Bar, note
from fast_ft.recipe import Recipe
from fast_ft.rundir import RunDir


def train_phase(
    folder: RunDir,
    recipe: Recipe,
    prepared: Prepared,
    stop_after: int | None = None,
    maker: backend.Backend | None = None,
) -> None:
    """Train all stages, save the adapter, and store what generation will check it by. A sweep gives its own backend.

    With stop_after, a training that is not done by that step leaves its state, and its adapter in taste/adapter.
    """
    check_model(recipe)
    started = time.monotonic()
    folder.update(model=identity.model(recipe.model.name_or_path, recipe.model.revision))
    maker = maker or backend.make_backend(recipe.model, recipe.lora, seed=recipe.seed, gradient_checkpointing=False)
    settled = settle_plan(folder, recipe, prepared, maker.name)
    loaded = maker.for_training()
    train_loaded(folder, recipe, prepared, loaded, settled, started=started, stop_after=stop_after)
    loaded.free()


def train_loaded(
    folder: RunDir,
    recipe: Recipe,
    prepared: Prepared,
    loaded: backend.Loaded,
    settled: plan.Plan,
    *,
    started: float,
    stop_after: int | None = None,
) -> None:
    """Do train_phase's work on a model that is loaded, with an adapter that is new; `started`: time.monotonic()'s."""
    assert prepared.encoder is not None
    notes = [*prepared.notes, *loaded.notes, *compare_tokenizers(recipe, loaded.tokenizer, prepared)]
    for text in notes[len(prepared.notes) :]:
        note(f"note: {text}")
    jobs = prepared.jobs(recipe.train, recipe.seed)
    earlier = checkpoints.newest(folder.checkpoints)
    done = state.read_progress(earlier).global_step if earlier else 0
    lines = kept_lines(folder.log, done)
    total = sum(len(job.batches) for job in jobs)
    atomic.check_space(folder.root, *checkpoints.space(loaded.model, recipe.train, folder.checkpoints))
    with Bar("training", total, done=done) as bar, atomic.Lines(folder.log) as log:

        def on_step(entry: dict[str, Any]) -> None:
            folder.check_lease()
            log.add(entry)
            lines.append(entry)
            speed = entry["tokens"] / max(entry["seconds"], 1e-9)
            memory = f"  {entry['gib']:.1f} GiB" if entry["gib"] else ""
            bar.advance(1, f"{entry['stage']}  loss {entry['loss']:.3f}  {speed:,.0f} tokens/s{memory}")

        course = train.Course(
            loaded,
            jobs,
            recipe.train,
            recipe.curriculum.carry,
            seed=recipe.seed,
            pad_id=prepared.encoder.pad_id,
            plan=settled,
            log=on_step,
            work_folder=folder.checkpoints,
        )
        if earlier is not None:
            note(f"going on after step {done} of {total}")
            course.resume(earlier)

        def save_state(course: train.Course) -> None:
            folder.check_lease()
            log.sync()  # a checkpoint's steps are in the log, whatever happens to the machine
            checkpoints.save(
                folder.checkpoints,
                course.progress.global_step,
                lambda target: state.save(target, loaded.model, course.optimizer, course.progress),
            )

        course.on_checkpoint, course.stop_after = save_state, stop_after
        course.on_settled = partial(keep_plan, folder)
        results = course.run()
    loss_picture(folder.loss_png, lines)
    check_finite(loaded, lines)
    with atomic.replace_folder(folder.adapter if course.finished else folder.taste / "adapter") as target:
        backend.save_adapter(loaded.model, target, recipe.model.name_or_path, model_card(recipe, prepared, lines))
        loaded.tokenizer.save_pretrained(str(target))
        selfcheck.store(target, loaded, [prepared.rows[e.id] for e in prepared.examples], prepared.encoder.pad_id)
    if not course.finished:
        return
    weights = atomic.sha256_file(folder.adapter / "adapter_model.safetensors")
    folder.update(notes=notes, digests=folder.manifest()["digests"] | {"adapter": weights})
    folder.finish(
        "train",
        time.monotonic() - started,
        backend=loaded.backend,
        dtype=loaded.dtype,
        steps=len(lines),
        skipped_steps=sum(line["skipped"] for line in lines),
        first_loss=next(line["loss"] for line in lines if math.isfinite(line["loss"])),  # fp16 may skip the first steps
        last_loss=next(line["loss"] for line in reversed(lines) if math.isfinite(line["loss"])),
        tokens=sum(line["tokens"] for line in lines),
        supervised_tokens=sum(line["supervised_tokens"] for line in lines),
        training_seconds=round(sum(line["seconds"] for line in lines), 3),
        peak_gib=round(max((result.peak_gib for result in results), default=0.0), 3),
        out_of_memory=course.out_of_memory,
    )


def check_finite(loaded: backend.Loaded, lines: Sequence[dict[str, Any]]) -> None:
    """Raise InputError where training ended in a loss or in weights that are no numbers: that is no adapter."""
    counted = [line for line in lines if not line["skipped"]]  # fp16's loss scale skips a step now and then
    bad = [line["step"] for line in counted if not math.isfinite(line["loss"])]
    if counted and not bad and all(t.isfinite().all() for t in backend.adapter_weights(loaded.model).values()):
        return
    raise InputError(
        "training came to nothing: the loss or the adapter's weights are not finite, "
        f"from step {bad[0] if bad else len(lines)} on. "
        "Lower train.learning_rate, or set train.max_grad_norm: 1.0; log.jsonl has each step."
    )


def kept_lines(path: Path, steps: int) -> list[dict[str, Any]]:
    """Return the log's first `steps` lines, and cut the file there: what came after is trained again."""
    if not path.is_file():
        return []
    kept = path.read_text(encoding="utf-8").splitlines()[:steps]
    atomic.write_text(path, "".join(line + "\n" for line in kept))
    return [json.loads(line) for line in kept]
