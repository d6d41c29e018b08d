"""The phase that answers: the adapter, by path, into a fresh base model; its answers into pred.json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fast_ft import atomic, backend, base_check, generate, guard, memory, plan, results, selfcheck
from fast_ft.budget import AnswerPace, Clock
from fast_ft.errors import InputError
from fast_ft.phases import settle_plan
from fast_ft.prepare import Prepared
from fast_ft.progress import note
from fast_ft.recipe import Recipe
from fast_ft.rundir import RunDir


def generate_phase(
    folder: RunDir,
    recipe: Recipe,
    prepared: Prepared,
    partial: Path | None = None,
    maker: backend.Backend | None = None,
    clock: Clock = time.monotonic,
) -> None:
    """Load the adapter by path into a fresh model, check that it is what was trained, and answer the prompts.

    An earlier pred.json is kept beside, under its digest.
    """
    assert prepared.encoder is not None
    started = clock()
    minutes = recipe.budget.generate_minutes
    pace = AnswerPace(minutes, clock, since=started) if minutes is not None else None
    loaded, pool, difference = load(folder, recipe, prepared, folder.adapter, maker)
    partial = partial or folder.pred_partial
    result = generate.generate(
        loaded,
        prepared.encoder,
        prepared.prompts,
        recipe.generate,
        seed=recipe.seed,
        partial=partial,
        pace=pace,
        on_answer=folder.on_answer,
        **pool,
    )
    record_endings(folder, "tuned", result)
    before, fewer = base_answers(loaded, folder, recipe, prepared, pool, pace)
    loaded.free()
    former = keep_aside(folder.pred)
    atomic.write_json(folder.pred, generate.predictions(prepared.prompts, result.answers))
    if former is not None and former.read_bytes() == folder.pred.read_bytes():
        former.unlink()  # a stop came between the answers and their record: nothing to keep
    partial.unlink(missing_ok=True)
    answers, most = result.flat, recipe.generate.max_new_tokens
    cut = sum(not answer.ended and answer.tokens < most for answer in answers)
    warnings = guard.answer_warnings(answers, most)
    for text in warnings:
        note(f"warning: {text}")
    manifest = folder.manifest()
    folder.update(
        notes=[*manifest.get("notes", []), *result.notes, *warnings],
        digests=manifest["digests"] | {"pred": atomic.sha256_file(folder.pred)},
    )
    folder.finish(
        "generate",
        clock() - started,
        answers=len(answers),
        base_answers=before,
        **({"cut_by_budget": cut, "cut_at": max(a.tokens for a in answers if not a.ended)} if cut else {}),
        **({"minutes": minutes} if cut or fewer else {}),
        empty=sum(not answer.text for answer in answers),
        ended_at_eos=round(sum(answer.ended for answer in answers) / len(answers), 4),
        new_tokens=sum(answer.tokens for answer in answers),
        decoding_seconds=round(result.seconds, 3),
        batch_size=result.batch_size,
        adapter_difference_nats=round(difference, 6),
        batched_difference_nats=round(result.parity, 6),
    )


def budget_missed(folder: RunDir) -> str:
    """Return what a budget of minutes cut short in a run that is complete, or ""."""
    said = []
    train, generated = folder.done("train") or {}, folder.done("generate") or {}
    if train.get("why") == "budget":
        said.append(f"training ended after step {train['stopped_at_step']} of {train['of_steps']}")
    if generated.get("cut_by_budget"):
        said.append(f"{generated['cut_by_budget']} answers were cut at {generated['cut_at']} new tokens or less")
    return f"budget missed: {'; '.join(said)}. The run is complete all the same: {folder.root}" if said else ""


def missed(folder: RunDir) -> str:
    """Return what a budget of minutes cut short in a run that is complete, and why it is worth nothing; or ""."""
    worthless = (folder.done("train") or {}).get("worthless", "")
    return "\n".join(filter(None, [budget_missed(folder), worthless and f"error: {folder.root}: {worthless}"]))


def load(
    folder: RunDir, recipe: Recipe, prepared: Prepared, adapter: Path, maker: backend.Backend | None = None
) -> tuple[backend.Loaded, dict[str, Any], float]:
    """Return a base model with the run's adapter, checked; the plan's pool; and the check's difference in nats.

    The backend is the one that the adapter was trained with, where training is done.
    """
    assert prepared.encoder is not None
    base_check.refuse_another(folder, recipe, prepared)
    trained = folder.done("train") or {}
    maker = maker or backend.make_backend(recipe.model, recipe.lora, seed=recipe.seed, name=trained.get("backend"))
    settled = settle_plan(folder, recipe, prepared, maker.name)
    with memory.explained("loading the base model", memory.LOADING):
        loaded = maker.for_generation(adapter)
    with memory.explained("checking the adapter", memory.ANSWERING):
        difference = selfcheck.verify(adapter, loaded, prepared.encoder.pad_id)
    return loaded, pool_settings(recipe, settled), difference


def keep_aside(pred: Path) -> Path | None:
    """Keep a pred.json that will be replaced beside it, under its digest: pred-1a2b3c4d.json. Return that, if any."""
    if not pred.is_file():
        return None
    kept = pred.with_name(f"pred-{atomic.sha256_file(pred)[:8]}.json")
    atomic.write_bytes(kept, pred.read_bytes())
    return kept


def pool_settings(recipe: Recipe, settled: plan.Plan) -> dict[str, Any]:
    """Return the plan's pool as generate's arguments; `generate RUN_DIR` may have been given another batch_size."""
    fixed = recipe.generate.batch_size
    return {
        "batch_size": settled.generation_batch if fixed == "auto" else fixed,
        "cache_tokens": settled.cache_tokens,
        "dequantise": settled.dequantise,
    }


def base_answers(
    loaded: backend.Loaded,
    folder: RunDir,
    recipe: Recipe,
    prepared: Prepared,
    pool: dict[str, Any],
    pace: AnswerPace | None,
) -> tuple[int, bool]:
    """Answer the first judge.base_prompts prompts with the adapter switched off, for before and after.

    Return how many were answered, and whether a budget of minutes left some out or cut some short.
    """
    prompts = prepared.prompts[: recipe.judge.base_prompts]
    if not prompts:
        return 0, False
    if pace is not None and (pace.cut_at is not None or pace.left() <= 0):
        note("note: no answers of the base model: budget.generate_minutes is used up")
        return 0, True
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
            pace=pace,
            on_answer=folder.on_answer,
            **pool,
        )
    record_endings(folder, "base", result)
    atomic.write_json(folder.base_pred, generate.predictions(prompts, result.answers))
    partial.unlink(missing_ok=True)
    return len(prompts), any(answer.within is not None for answer in result.flat)


def record_endings(folder: RunDir, column: str, result: generate.Generation) -> None:
    """Note in answers.json how long each answer is and whether it ended by itself; pred.json has no place for that."""
    try:
        earlier = results.read_answers(folder.answers) if folder.answers.is_file() else {}
    except InputError as error:
        note(f"warning: {error}; it is written anew")
        earlier = {}
    ends = {key: {"tokens": first.tokens, "ended": first.ended} for key, (first, *_) in result.answers.items()}
    atomic.write_json(folder.answers, earlier | {column: ends})
