"""The phase that answers: the adapter, by path, into a fresh base model; its answers into pred.json."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files, out_of_memory
from fast_ft.common.console import note
from fast_ft.common.minutes import AnswerPace, Clock
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.prepare import Prepared
from fast_ft.generate import answers
from fast_ft.generate.answers import Generation, Task
from fast_ft.generate.engine.scheduler import shapes
from fast_ft.hub.families import ModelShape
from fast_ft.models import adapter_check
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import Base
from fast_ft.pipeline import base_check, sanity_checks
from fast_ft.pipeline.phases import model_config, settle_plan
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.plan.plans import RunPlan
from fast_ft.recipe.loader import resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run.artifacts import cut_short
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
    prepared: Prepared,
    maker: choose.Backend | None = None,
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


def answer_others(folder: RunDir, recipe: Recipe, prepared: Prepared, clock: Clock = time.monotonic) -> dict[str, Any]:
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
    said = cut_short(folder.manifest()["phases"])
    return f"budget missed: {'; '.join(said)}. The run is complete all the same: {folder.root}" if said else ""


def missed(folder: RunDir) -> str:
    """Return what a budget of minutes cut short in a run that is complete, and why it is worth nothing; or ""."""
    worthless = (folder.done("train") or {}).get("worthless", "")
    return "\n".join(filter(None, [budget_missed(folder), worthless and f"error: {folder.root}: {worthless}"]))


@dataclass(frozen=True)
class Ready:
    """A model that is ready to answer: the base with the run's adapter, checked, and how answers are decoded.

    `difference` is the check's, in nats a token. `prompt_ids` are the prompts' token ids.
    """

    loaded: choose.Loaded
    plan: DecodePlan
    difference: float
    prompt_ids: list[list[int]]


def load(
    folder: RunDir,
    recipe: Recipe,
    prepared: Prepared,
    adapter: Path,
    maker: choose.Backend | None = None,
    watch: Stopwatch | None = None,
) -> Ready:
    """Load a fresh base model with the run's adapter, and check that it is what was trained.

    The loader is the one that the adapter was trained with, where training is done. Raises InputError where base,
    tokenizer or adapter are not what they were.
    """
    assert prepared.encoder is not None
    watch = watch or Stopwatch()
    with watch.during("loading"):  # libraries, too
        maker = maker or _maker(folder, recipe)
    plan = decode_plan(recipe, settle_plan(folder, recipe, prepared, maker.name))
    with watch.during("loading"):
        compiled = _compile_ahead(recipe, prepared, plan, maker)
        with out_of_memory.explained("loading the base model", out_of_memory.LOADING):
            loaded, prompt_ids = _load_and_encode(folder, recipe, prepared, partial(maker.for_generation, adapter))
    if compiled is not None:
        with watch.during("set_up"):
            compiled.exception()  # waits; what went wrong is said where the engine is made
            out_of_memory.clear_workspaces()  # the threads' own
    with watch.during("checks"), out_of_memory.explained("checking the adapter", out_of_memory.ANSWERING):
        difference = adapter_check.verify(adapter, loaded, prepared.encoder.pad_id)
    return Ready(loaded, plan, difference, prompt_ids)


def decode_plan(recipe: Recipe, settled: RunPlan) -> DecodePlan:
    """Return how answers are decoded: as planned, in batches of the size that the recipe may have been given since."""
    fixed = recipe.generate.batch_size
    return settled.decode if fixed == "auto" else replace(settled.decode, slots=fixed)


def _maker(folder: RunDir, recipe: Recipe) -> choose.Backend:
    trained = folder.done("train") or {}
    return choose.make_backend(recipe.model, recipe.lora, seed=recipe.seed, name=trained.get("backend"))


def _load_and_encode(
    folder: RunDir, recipe: Recipe, prepared: Prepared, load_model: Callable[[], choose.Loaded]
) -> tuple[choose.Loaded, list[list[int]]]:
    """Load the model; meanwhile a thread compares base and tokenizer with the run's, and encodes the prompts."""
    encoder = prepared.encoder
    assert encoder is not None

    def host_work() -> list[list[int]]:
        base_check.refuse_another(folder, recipe, prepared)
        return [encoder.prompt_ids(prompt.messages) for prompt in prepared.prompts]

    with ThreadPoolExecutor(1, thread_name_prefix="host") as thread:
        encoded = thread.submit(host_work)
        try:
            loaded = load_model()
        except Exception:
            encoded.result()  # another base, which that tells of, is the better explanation
            raise
        return loaded, encoded.result()


def _compile_ahead(recipe: Recipe, prepared: Prepared, plan: DecodePlan, maker: choose.Backend) -> Future[None] | None:
    """On a card, let decoding's kernels be compiled and checked while the base is being loaded."""
    if not isinstance(maker, Base) or maker.device != "cuda":
        return None
    from fast_ft.generate.engine import kernel_checks

    config = model_config(recipe)
    shape = ModelShape.from_config(config)
    is_nf4 = recipe.model.load_in_4bit or "quantization_config" in config
    planes = is_nf4 and not plan.dequantise and all(inputs % 128 == 0 for inputs, _ in shape.linear_shapes)
    rows = min(plan.slots, len(prepared.prompts) * recipe.generate.num_return_sequences)
    kind = kernel_checks.Kind(
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        hidden=shape.hidden_size,
        inner=shape.intermediate_size,
        dtype=maker.dtype,
        device="cuda:0",
        steps=tuple(shapes(max(1, rows), planes=True)),
        planes=planes,
    )
    return kernel_checks.ahead(kind)


@contextlib.contextmanager
def _collects_new_objects_only() -> Iterator[None]:
    """Let collections within walk only what is made within: with all libraries loaded, each walk takes half a second.

    What earlier phases left in reference cycles is collected first.
    """
    import peft  # noqa: F401
    import transformers  # noqa: F401

    out_of_memory.release()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def keep_aside(pred: Path) -> Path:
    """Keep answers that others will replace beside them, under their digest: pred-1a2b3c4d.json. Return that."""
    kept = pred.with_name(f"{pred.stem}-{atomic_files.sha256_file(pred)[:8]}.json")
    atomic_files.write_bytes(kept, pred.read_bytes())
    return kept


def base_answers(ready: Ready, recipe: Recipe, prepared: Prepared, task: Task) -> Generation | None:
    """Answer the first judge.base_prompts prompts with the adapter switched off, for before and after."""
    prompts, pace = prepared.prompts[: recipe.judge.base_prompts], task.pace
    if not prompts:
        return None
    if pace is not None and (pace.cut_at is not None or pace.left() <= 0):
        note("note: no answers of the base model: budget.generate_minutes is used up")
        return None
    assert prepared.encoder is not None
    with ready.loaded.model.disable_adapter():
        return answers.generate(ready.loaded, prepared.encoder, prompts, recipe.generate, ready.plan, task)


def _answer(
    folder: RunDir,
    recipe: Recipe,
    prepared: Prepared,
    maker: choose.Backend | None,
    clock: Clock,
    started: float,
) -> Answered:
    """Make the adapter's answers and the base model's. Only partial files are written."""
    assert prepared.encoder is not None
    minutes = recipe.budget.generate_minutes
    pace = AnswerPace(minutes, clock, since=started) if minutes is not None else None
    watch = Stopwatch()
    task = Task(recipe.seed, folder.pred_partial, pace=pace, on_answer=folder.on_answer, watch=watch)
    with contextlib.ExitStack() as stack:
        if maker is None:  # a sweep's base stays, and is apart from collections already
            with watch.during("loading"):
                maker = _maker(folder, recipe)
                stack.enter_context(_collects_new_objects_only())
        ready = load(folder, recipe, prepared, folder.adapter, maker, watch)
        tuned_task = replace(task, prompt_ids=ready.prompt_ids)
        tuned = answers.generate(
            ready.loaded, prepared.encoder, prepared.prompts, recipe.generate, ready.plan, tuned_task
        )
        base_task = replace(task, partial=folder.base_partial, title="answers of the base model")
        base = base_answers(ready, recipe, prepared, base_task)
        ready.loaded.free()
    warnings = sanity_checks.answer_warnings(tuned.flat, recipe.generate.max_new_tokens)
    for text in warnings:
        note(f"warning: {text}")
    facts = _facts(recipe, prepared, tuned, base) | {
        "seconds_by": {name: round(seconds, 3) for name, seconds in watch.seconds().items()},
        "adapter_difference_nats": round(ready.difference, 6),
    }
    files, ends = {folder.pred: _content(prepared, tuned)}, {"tuned": _ends(tuned)}
    if base is not None:
        files[folder.base_pred], ends["base"] = _content(prepared, base), _ends(base)
    return Answered(files, ends, facts, [*tuned.notes, *warnings])


def _facts(recipe: Recipe, prepared: Prepared, tuned: Generation, base: Generation | None) -> dict[str, Any]:
    """Return what the manifest says of answers."""
    made, most, minutes = tuned.flat, recipe.generate.max_new_tokens, recipe.budget.generate_minutes
    cut = sum(not answer.ended and answer.tokens < most for answer in made)
    asked = bool(prepared.prompts[: recipe.judge.base_prompts])
    fewer = asked and (base is None or any(answer.within is not None for answer in base.flat))
    return {
        "answers": len(made),
        "base_answers": len(base.answers) if base is not None else 0,
        **({"cut_by_budget": cut, "cut_at": max(a.tokens for a in made if not a.ended)} if cut else {}),
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


def _content(prepared: Prepared, result: Generation) -> bytes:
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
