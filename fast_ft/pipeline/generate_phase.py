"""The phase that answers: the adapter, by path, into a fresh base model; its answers into pred.json."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fast_ft.common import atomic_files, out_of_memory
from fast_ft.common.console import note
from fast_ft.common.minutes import AnswerPace, Clock
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.prepare import PreparedData
from fast_ft.generate import answers
from fast_ft.generate.answers import Generation, Task
from fast_ft.generate.pace import cut_short
from fast_ft.models.loaders.base import Loader
from fast_ft.pipeline import base_check, sanity_checks
from fast_ft.pipeline.adapter_loading import collects_new_objects_only, load, maker_of
from fast_ft.pipeline.base_answers import base_answers
from fast_ft.pipeline.set_up import check_model, check_prompts, keep_plan, keep_pool, keep_products
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
    made = _answer(folder, recipe, prepared, maker, clock, started, keeps="plan")
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
    made = _answer(folder, recipe, prepared, None, clock, clock(), keeps="products")
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


def answer_only(
    folder: RunDir, recipe: Recipe, prepared: PreparedData, clock: Clock = time.monotonic
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (what pred.json would hold, what generate_phase would record). Only partial files are written."""
    made = _answer(folder, recipe, prepared, None, clock, clock(), keeps=None)
    return json.loads(made.files[folder.pred]), made.facts


def budget_missed(folder: RunDir) -> str:
    """Return what a budget of minutes cut short in a run that is complete, or ""."""
    said = folder.record().cut_short()
    return f"budget missed: {'; '.join(said)}. The run is complete all the same: {folder.root}" if said else ""


def missed(folder: RunDir) -> str:
    """Return what a budget of minutes cut short in a run that is complete, and why its result is useless; or ""."""
    worthless = (folder.done("train") or {}).get("worthless", "")
    return "\n".join(filter(None, [budget_missed(folder), worthless and f"error: {folder.root}: {worthless}"]))


def keep_aside(pred: Path) -> Path:
    """Keep answers that others will replace beside them, under their digest: pred-1a2b3c4d.json. Return that."""
    kept = pred.with_name(f"{pred.stem}-{atomic_files.sha256_file(pred)[:8]}.json")
    atomic_files.write_bytes(kept, pred.read_bytes())
    return kept


def _answer(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    maker: Loader | None,
    clock: Clock,
    started: float,
    *,
    keeps: Literal["plan", "products"] | None,
) -> Answered:
    """Make the adapter's answers and the base model's. Only partial files are written.

    `keeps` says what of how they are decoded goes into the run's plan: all of it, the products alone, or nothing.
    """
    moved = base_check.has_moved(folder, recipe)
    if moved:
        check_model(recipe, prepared)
    else:
        check_prompts(recipe, prepared)
    minutes = recipe.budget.generate_minutes
    pace = AnswerPace(minutes, clock, since=started) if minutes is not None else None
    watch = Stopwatch()
    task = Task(recipe.seed, folder.pred_partial, pace=pace, on_answer=folder.on_answer, watch=watch)
    with contextlib.ExitStack() as stack:
        if maker is None:  # a sweep's base stays, and is apart from collections already
            with watch.during("loading"):
                maker = maker_of(folder, recipe)
                with out_of_memory.explained("loading the base model", out_of_memory.LOADING):
                    stack.enter_context(collects_new_objects_only())
        ready = load(folder, recipe, prepared, folder.adapter, maker, watch)
        if keeps is not None:
            task = replace(task, on_products=partial(keep_products, folder))
        tuned_task = replace(task, prompt_ids=ready.prompt_ids)
        if keeps == "plan":  # before the first answer: what was stopped goes on as it began
            keep_plan(folder, ready.settled.with_decoding(ready.plan))
            tuned_task = replace(tuned_task, on_plan=partial(keep_pool, folder))
        tuned = answers.generate(
            ready.loaded, prepared.encoder, prepared.prompts, recipe.generate, ready.plan, tuned_task
        )
        base_task = replace(
            task,
            partial=folder.base_partial,
            title="answers of the base model",
            prompt_ids=ready.prompt_ids[: recipe.judge.base_prompts],
        )
        base, said = base_answers(replace(ready, plan=tuned.plan), recipe, prepared, base_task, tuned)
        general = ready.loaded.general
        ready.loaded.free()
    warnings = sanity_checks.answer_warnings(tuned.flat, recipe.generate.max_new_tokens)
    for text in warnings:
        note(f"warning: {text}")
    facts = _facts(recipe, prepared, tuned, base) | {
        "seconds_by": {name: round(seconds, 3) for name, seconds in watch.seconds().items()},
        "adapter_difference_nats": round(ready.difference, 6),
        **({"general_way": general} if general else {}),
    }
    if moved:
        warnings.append(
            f"the base was {recipe.model.name_or_path}, not the path that the adapter was trained with; on the rows "
            f"that training stored it differs by {ready.difference:.4f} nat per token, which rounding explains"
        )
    files, ends = {folder.pred: _content(prepared, tuned)}, {"tuned": _ends(tuned)}
    if base is not None:
        files[folder.base_pred], ends["base"] = _content(prepared, base), _ends(base)
    return Answered(files, ends, facts, [*tuned.notes, *said, *warnings])


def _facts(recipe: Recipe, prepared: PreparedData, tuned: Generation, base: Generation | None) -> dict[str, Any]:
    """Return what the manifest says of answers."""
    made, minutes, cut = tuned.flat, recipe.budget.generate_minutes, cut_short(tuned.flat)
    fewer = (len(base.answers) if base else 0) < len(prepared.prompts[: recipe.judge.base_prompts])
    return {
        "answers": len(made),
        "base_answers": len(base.answers) if base is not None else 0,
        **({"cut_by_budget": len(cut), "cut_at": max(answer.tokens for answer in cut)} if cut else {}),
        **({"minutes": minutes} if cut or fewer else {}),
        "empty": sum(not answer.text for answer in made),
        "ended_at_eos": round(sum(answer.ended for answer in made) / len(made), 4),
        "new_tokens": sum(answer.tokens for answer in made),
        "decoding_seconds": round(tuned.seconds, 3),
        "batch_size": tuned.batch_size,
        "cache_tokens": tuned.cache_tokens,
        "decoding_steps": tuned.steps,
        **({} if tuned.parity is None else {"batched_difference_nats": round(tuned.parity, 6)}),
    }


def _content(prepared: PreparedData, result: Generation) -> bytes:
    prompts = [prompt for prompt in prepared.prompts if prompt.id in result.answers]
    return atomic_files.json_bytes(answers.predictions(prompts, result.answers))


def _ends(result: Generation) -> dict[str, Any]:
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
