"""The phases of a run: train, generate, judge, report. Each reads and leaves files in the run folder."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fast_ft import (
    atomic,
    backend,
    checkpoints,
    data,
    generate,
    hub,
    identity,
    plan,
    planning,
    rules,
    selfcheck,
    state,
    train,
)
from fast_ft.card import model_card
from fast_ft.errors import BudgetMissed, InputError
from fast_ft.judge import judge, judging
from fast_ft.picture import loss_picture
from fast_ft.prepare import Prepared, compare_tokenizers
from fast_ft.progress import Bar, note
from fast_ft.recipe import Recipe
from fast_ft.report import write
from fast_ft.rundir import RunDir
from fast_ft.shape import ModelShape


def settle_plan(folder: RunDir, recipe: Recipe, prepared: Prepared, backend_name: str) -> plan.Plan:
    """Return this run's plan: the one in plan.json if there is one, else a new one, written there."""
    if folder.plan.is_file():
        return plan.Plan(**json.loads(folder.plan.read_text(encoding="utf-8")))
    settled = planning.settle(
        recipe,
        prepared,
        model_config(recipe),
        fused_kernels=backend_name == "unsloth",
        card=planning.card_here(),
    )
    keep_plan(folder, settled)
    return settled


def keep_plan(folder: RunDir, settled: plan.Plan) -> None:
    """Write a plan to plan.json, and to the manifest: that alone is then enough to do the run again."""
    atomic.write_json(folder.plan, settled.to_json())
    folder.update(plan=settled.to_json())


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
    assert prepared.encoder is not None
    check_model(recipe)
    started = time.monotonic()
    folder.update(model=identity.model(recipe.model.name_or_path, recipe.model.revision))
    maker = maker or backend.make_backend(recipe.model, recipe.lora, seed=recipe.seed, gradient_checkpointing=False)
    settled = settle_plan(folder, recipe, prepared, maker.name)
    loaded = maker.for_training()
    notes = [*prepared.notes, *loaded.notes, *compare_tokenizers(recipe, loaded.tokenizer, prepared)]
    for text in notes[len(prepared.notes) :]:
        note(f"note: {text}")
    jobs = prepared.jobs(recipe.train, recipe.seed)
    earlier = checkpoints.newest(folder.checkpoints)
    done = state.read_progress(earlier).global_step if earlier else 0
    lines = _log_lines(folder.log, done)
    total = sum(len(job.batches) for job in jobs)
    with Bar("training", total, done=done) as bar, folder.log.open("a", encoding="utf-8") as log:

        def on_step(entry: dict[str, Any]) -> None:
            folder.check_lease()
            log.write(json.dumps(entry) + "\n")
            log.flush()
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
    loaded.free()
    if not course.finished:
        return
    folder.update(notes=notes, digests=folder.manifest()["digests"] | {"adapter": adapter_digest(folder)})
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


def generate_phase(
    folder: RunDir,
    recipe: Recipe,
    prepared: Prepared,
    partial: Path | None = None,
    maker: backend.Backend | None = None,
) -> None:
    """Load the adapter by path into a fresh model, check that it is what was trained, and answer the prompts.

    An earlier pred.json is kept beside, under its digest.
    """
    assert prepared.encoder is not None
    started = time.monotonic()
    trained = folder.done("train") or {}
    maker = maker or backend.make_backend(
        recipe.model, recipe.lora, seed=recipe.seed, gradient_checkpointing=False, name=trained.get("backend")
    )
    settled = settle_plan(folder, recipe, prepared, maker.name)
    loaded = maker.for_generation(folder.adapter)
    difference = selfcheck.verify(folder.adapter, loaded, prepared.encoder.pad_id)
    pool = pool_settings(recipe, settled)
    partial = partial or folder.pred_partial
    result = generate.generate(
        loaded, prepared.encoder, prepared.prompts, recipe.generate, seed=recipe.seed, partial=partial, **pool
    )
    record_endings(folder, "tuned", result)
    before = base_answers(loaded, folder, recipe, prepared, pool)
    loaded.free()
    keep_aside(folder.pred)
    atomic.write_json(folder.pred, generate.predictions(prepared.prompts, result.answers))
    partial.unlink(missing_ok=True)
    answers = result.flat
    manifest = folder.manifest()
    folder.update(
        notes=[*manifest.get("notes", []), *result.notes],
        digests=manifest["digests"] | {"pred": atomic.sha256_file(folder.pred)},
    )
    folder.finish(
        "generate",
        time.monotonic() - started,
        answers=len(answers),
        base_answers=before,
        empty=sum(not answer.text for answer in answers),
        ended_at_eos=round(sum(answer.ended for answer in answers) / len(answers), 4),
        new_tokens=sum(answer.tokens for answer in answers),
        decoding_seconds=round(result.seconds, 3),
        batch_size=result.batch_size,
        adapter_difference_nats=round(difference, 6),
        batched_difference_nats=round(result.parity, 6),
    )


def keep_aside(pred: Path) -> None:
    """Keep a pred.json that will be replaced beside it, under its digest: pred-1a2b3c4d.json."""
    if pred.is_file():
        atomic.write_bytes(pred.with_name(f"pred-{atomic.sha256_file(pred)[:8]}.json"), pred.read_bytes())


def pool_settings(recipe: Recipe, settled: plan.Plan) -> dict[str, Any]:
    """Return the plan's pool as generate's arguments; `generate RUN_DIR` may have been given another batch_size."""
    fixed = recipe.generate.batch_size
    return {
        "batch_size": settled.generation_batch if fixed == "auto" else fixed,
        "cache_tokens": settled.cache_tokens,
        "dequantise": settled.dequantise,
    }


def base_answers(
    loaded: backend.Loaded, folder: RunDir, recipe: Recipe, prepared: Prepared, pool: dict[str, Any]
) -> int:
    """Answer the first judge.base_prompts prompts with the adapter switched off, for before and after."""
    prompts = prepared.prompts[: recipe.judge.base_prompts]
    if not prompts:
        return 0
    assert prepared.encoder is not None
    partial = folder.base_pred.with_suffix(".partial.jsonl")
    with loaded.model.disable_adapter():
        result = generate.generate(
            loaded,
            prepared.encoder,
            prompts,
            recipe.generate,
            seed=recipe.seed,
            partial=partial,
            title="answers of the base model",
            **pool,
        )
    record_endings(folder, "base", result)
    atomic.write_json(folder.base_pred, generate.predictions(prompts, result.answers))
    partial.unlink(missing_ok=True)
    return len(prompts)


def record_endings(folder: RunDir, column: str, result: generate.Generation) -> None:
    """Note in answers.json how long each answer is and whether it ended by itself; pred.json has no place for that."""
    earlier = json.loads(folder.answers.read_text(encoding="utf-8")) if folder.answers.is_file() else {}
    ends = {key: {"tokens": first.tokens, "ended": first.ended} for key, (first, *_) in result.answers.items()}
    atomic.write_json(folder.answers, earlier | {column: ends})


def judge_phase(folder: RunDir, recipe: Recipe, prompts: list[data.Prompt], **options: Any) -> None:
    """Score pred.json, and the base model's answers where there are some, into scores.json; options: judge_run's.

    Raises BudgetMissed where too many scores are missing; the phase is then not done, and the same command asks again.
    """
    started = time.monotonic()
    scores = judging.judge_run(folder, recipe.judge, judging.groups(prompts), seed=recipe.seed, **options)
    if scores is None:  # a dry run
        return
    if missed := judge.too_many_missing(scores):
        raise BudgetMissed(missed)
    facts = {key: scores[key] for key in ("model", "rubric") if key in scores}
    folder.finish("judge", time.monotonic() - started, kind=recipe.judge.kind, mean=scores["mean"], **facts)


def report_phase(folder: RunDir, prepared: Prepared | None = None) -> None:
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
    if recipe.rules is not None and (broken := rules.check_model_config(config)):
        raise InputError("\n".join(broken))


def model_config(recipe: Recipe) -> dict[str, Any]:
    """Return config.json's content of the base model."""
    folder = hub.model_folder(recipe.model.name_or_path, recipe.model.revision)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def adapter_digest(folder: RunDir) -> str:
    return atomic.sha256_file(folder.adapter / "adapter_model.safetensors")


def _log_lines(path: Path, steps: int) -> list[dict[str, Any]]:
    """Return the log's first `steps` lines, and cut the file there: what came after is trained again."""
    if not path.is_file():
        return []
    kept = path.read_text(encoding="utf-8").splitlines()[:steps]
    atomic.write_text(path, "".join(line + "\n" for line in kept))
    return [json.loads(line) for line in kept]
