"""The phase that answers: the adapter, by path, into a fresh base model; its answers into pred.json."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files, out_of_memory
from fast_ft.common.console import note
from fast_ft.common.minutes import AnswerPace, Clock
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.prepare import PreparedData
from fast_ft.generate import answers as generate
from fast_ft.generate.engine import kernel_checks
from fast_ft.generate.engine.scheduler import shapes
from fast_ft.hub.families import ModelShape
from fast_ft.models import adapter_check
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel, Loader, LoaderBase
from fast_ft.pipeline import base_check, sanity_checks
from fast_ft.pipeline.set_up import model_config, settle_plan
from fast_ft.plan import plans
from fast_ft.recipe.loader import resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir


@dataclass(frozen=True)
class Answered:
    """Answers that are made, and of which nothing is on record yet.

    `files` are the contents of pred.json and, where the base model answered too, of base_pred.json; `ends` is that of
    answers.json, which tells how long each answer is and whether it ended by itself.
    """

    files: dict[Path, bytes]
    ends: dict[str, Any]
    facts: dict[str, Any]
    notes: list[str]


def generate_phase(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    maker: Loader | None = None,
    clock: Clock = time.monotonic,
) -> None:
    """Load the adapter by path into a fresh model, check that it is what was trained, and answer the prompts.

    An earlier pred.json is kept beside, under its digest. The manifest's generated_with tells the settings.
    """
    started = clock()
    made = _answer(folder, recipe, prepared, maker, clock, started)
    if _others_there(folder, made):
        folder.reopen("generate", "judge")  # first: the manifest never speaks of answers that are not there
    _put(folder, made)
    manifest = folder.manifest()
    former = manifest.get("notes_on_answers", [])
    folder.finish(
        "generate",
        clock() - started,
        {
            "notes": [*(text for text in manifest.get("notes", []) if text not in former), *made.notes],
            "notes_on_answers": made.notes,
            "digests": manifest["digests"] | {"pred": atomic_files.sha256_file(folder.pred)},
            "generated_with": resolved(recipe)["generate"],
        },
        (folder.pred_partial, folder.base_partial),
        **made.facts,
    )


def answer_others(
    folder: RunDir, recipe: Recipe, prepared: PreparedData, clock: Clock = time.monotonic
) -> dict[str, Any]:
    """Answer prompts that are not the run's own, and return what is recorded. `folder` is RunDir.others.

    The manifest's `others` tells of each such file its prompts, its settings, and what generate_phase would record.
    """
    made = _answer(folder, recipe, prepared, None, clock, clock())
    _put(folder, made)
    facts = {
        "test": recipe.data.test,
        "digests": {"test": prepared.digests["test"], "pred": atomic_files.sha256_file(folder.pred)},
        "generated_with": resolved(recipe)["generate"],
        "notes": made.notes,
        **made.facts,
    }
    folder.update(others=folder.manifest().get("others", {}) | {folder.pred.name: facts})
    for path in (folder.pred_partial, folder.base_partial):
        path.unlink(missing_ok=True)
    return facts


def budget_missed(folder: RunDir) -> str:
    """Return what a budget of minutes cut short in a run that is complete, or ""."""
    said = folder.record().cut_short()
    return f"budget missed: {'; '.join(said)}. The run is complete all the same: {folder.root}" if said else ""


def missed(folder: RunDir) -> str:
    """Return what a budget of minutes cut short in a run that is complete, and why it is worth nothing; or ""."""
    worthless = (folder.done("train") or {}).get("worthless", "")
    return "\n".join(filter(None, [budget_missed(folder), worthless and f"error: {folder.root}: {worthless}"]))


def load(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    adapter: Path,
    maker: Loader | None = None,
    watch: Stopwatch | None = None,
) -> tuple[LoadedModel, dict[str, Any], float]:
    """Return a base model with the run's adapter, checked; the plan's pool; and the check's difference in nats.

    The backend is the one that the adapter was trained with, where training is done.
    """
    base_check.refuse_another(folder, recipe, prepared)
    trained = folder.done("train") or {}
    maker = maker or choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, name=trained.get("backend"))
    settled = settle_plan(folder, recipe, prepared, maker.name)
    watch = watch or Stopwatch()
    compiled = _compile_ahead(recipe, prepared, settled, maker)
    with watch.during("loading"), out_of_memory.explained("loading the base model", out_of_memory.LOADING):
        loaded = maker.for_generation(adapter)
    if compiled is not None:
        with watch.during("set_up"):
            compiled.exception()  # waits; what went wrong is said where the pool is made
            out_of_memory.clear_workspaces()  # the thread's own
    with watch.during("checks"), out_of_memory.explained("checking the adapter", out_of_memory.ANSWERING):
        difference = adapter_check.verify(adapter, loaded, prepared.encoder.pad_id)
    return loaded, pool_settings(recipe, settled), difference


def _compile_ahead(recipe: Recipe, prepared: PreparedData, settled: plans.Plan, maker: Loader) -> Future[None] | None:
    """On a card, let decoding's kernels be compiled and checked while the base is being loaded."""
    if not isinstance(maker, LoaderBase) or maker.device != "cuda":
        return None
    config = model_config(recipe)
    shape = ModelShape.from_config(config)
    is_nf4 = recipe.model.load_in_4bit or "quantization_config" in config
    planes = is_nf4 and not settled.dequantise and all(inputs % 128 == 0 for inputs, _ in shape.linear_shapes)
    slots = pool_settings(recipe, settled)["batch_size"]
    rows = min(slots, len(prepared.prompts) * recipe.generate.num_return_sequences)
    kind = kernel_checks.Kind(
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.head_dim,
        maker.dtype,
        "cuda:0",
        steps=tuple(shapes(max(1, rows), planes=True)),
        planes=planes,
    )
    return kernel_checks.ahead(kind)


def keep_aside(pred: Path) -> Path:
    """Keep answers that others will replace beside them, under their digest: pred-1a2b3c4d.json. Return that."""
    kept = pred.with_name(f"{pred.stem}-{atomic_files.sha256_file(pred)[:8]}.json")
    atomic_files.write_bytes(kept, pred.read_bytes())
    return kept


def pool_settings(recipe: Recipe, settled: plans.Plan) -> dict[str, Any]:
    """Return the plan's pool as generate's arguments; `generate RUN_DIR` may have been given another batch_size."""
    fixed = recipe.generate.batch_size
    return {
        "batch_size": settled.generation_batch if fixed == "auto" else fixed,
        "cache_tokens": settled.cache_tokens,
        "dequantise": settled.dequantise,
    }


def base_answers(
    loaded: LoadedModel,
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    pool: dict[str, Any],
    pace: AnswerPace | None,
    watch: Stopwatch,
) -> generate.Generation | None:
    """Answer the first judge.base_prompts prompts with the adapter switched off, for before and after."""
    prompts = prepared.prompts[: recipe.judge.base_prompts]
    if not prompts:
        return None
    if pace is not None and (pace.cut_at is not None or pace.left() <= 0):
        note("note: no answers of the base model: budget.generate_minutes is used up")
        return None
    with loaded.model.disable_adapter():
        return generate.generate(
            loaded,
            prepared.encoder,
            prompts,
            recipe.generate,
            seed=recipe.seed,
            partial=folder.base_partial,
            title="answers of the base model",
            pace=pace,
            on_answer=folder.on_answer,
            watch=watch,
            **pool,
        )


def _answer(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    maker: Loader | None,
    clock: Clock,
    started: float,
) -> Answered:
    """Make the adapter's answers and the base model's. Only partial files are written."""
    minutes = recipe.budget.generate_minutes
    pace = AnswerPace(minutes, clock, since=started) if minutes is not None else None
    watch = Stopwatch()
    loaded, pool, difference = load(folder, recipe, prepared, folder.adapter, maker, watch)
    result = generate.generate(
        loaded,
        prepared.encoder,
        prepared.prompts,
        recipe.generate,
        seed=recipe.seed,
        partial=folder.pred_partial,
        pace=pace,
        on_answer=folder.on_answer,
        watch=watch,
        **pool,
    )
    before = base_answers(loaded, folder, recipe, prepared, pool, pace, watch)
    asked = bool(prepared.prompts[: recipe.judge.base_prompts])
    fewer = asked and (before is None or any(answer.within is not None for answer in before.flat))
    loaded.free()
    answers, most = result.flat, recipe.generate.max_new_tokens
    cut = sum(not answer.ended and answer.tokens < most for answer in answers)
    warnings = sanity_checks.answer_warnings(answers, most)
    for text in warnings:
        note(f"warning: {text}")
    facts = {
        "answers": len(answers),
        "base_answers": len(before.answers) if before is not None else 0,
        **({"cut_by_budget": cut, "cut_at": max(a.tokens for a in answers if not a.ended)} if cut else {}),
        **({"minutes": minutes} if cut or fewer else {}),
        "empty": sum(not answer.text for answer in answers),
        "ended_at_eos": round(sum(answer.ended for answer in answers) / len(answers), 4),
        "new_tokens": sum(answer.tokens for answer in answers),
        "decoding_seconds": round(result.seconds, 3),
        "seconds_by": {name: round(seconds, 3) for name, seconds in watch.seconds().items()},
        "batch_size": result.batch_size,
        "cache_tokens": result.cache_tokens,
        "decoding_steps": result.steps,
        "adapter_difference_nats": round(difference, 6),
        **({} if result.parity is None else {"batched_difference_nats": round(result.parity, 6)}),
    }
    files, ends = {folder.pred: _content(prepared, result)}, {"tuned": _ends(result)}
    if before is not None:
        files[folder.base_pred], ends["base"] = _content(prepared, before), _ends(before)
    return Answered(files, ends, facts, [*result.notes, *warnings])


def _content(prepared: PreparedData, result: generate.Generation) -> bytes:
    prompts = [prompt for prompt in prepared.prompts if prompt.id in result.answers]
    return atomic_files.json_bytes(generate.predictions(prompts, result.answers))


def _ends(result: generate.Generation) -> dict[str, Any]:
    return {key: {"tokens": first.tokens, "ended": first.ended} for key, (first, *_) in result.answers.items()}


def _others_there(folder: RunDir, made: Answered) -> list[Path]:
    """Return the files of answers that are there and are not those that were made."""
    there = [path for path in (folder.pred, folder.base_pred) if path.is_file()]
    return [path for path in there if path.read_bytes() != made.files.get(path)]


def _put(folder: RunDir, made: Answered) -> None:
    """Write the answers; other ones that are there are kept beside."""
    for path in _others_there(folder, made):
        keep_aside(path)
        if path not in made.files:
            path.unlink()
    for path, content in made.files.items():
        atomic_files.write_bytes(path, content)
    atomic_files.write_json(folder.answers, made.ends)
