"""A recipe's plan: settled for the card at hand when a run begins, or for any card by `python -m fast_ft plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fast_ft.common import gpu
from fast_ft.common.wording import minutes_between
from fast_ft.data.batches import StageJob
from fast_ft.data.prepare import PreparedData
from fast_ft.hub import download
from fast_ft.hub.families import ModelShape
from fast_ft.models.loaders.base import ALONE_ONLY
from fast_ft.plan import cards, plans
from fast_ft.plan.cost_model import CONTEXT_GIB, Training
from fast_ft.plan.decode_pool import Answers
from fast_ft.plan.micro_batches import share
from fast_ft.plan.plans import Machine, RunPlan, TrainPlan, Wanted
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe, card_backend

_MEAN_ANSWER = 250  #: tokens; answers end when they are done, long before max_new_tokens


def settle(
    recipe: Recipe,
    prepared: PreparedData,
    config: dict[str, Any],
    *,
    backend: str,
    card: cards.Card | None,
    world_size: int = 1,
) -> RunPlan:
    """Return the plan of a recipe on a card, None being a CPU; see plan.settle. `config` is the base's config.json."""
    memory = card.memory_gib if card is not None else None
    if memory is not None and recipe.budget.memory_gib != "auto":
        memory = min(memory, float(recipe.budget.memory_gib))
    return plans.settle(
        ModelShape.from_config(config),
        training(recipe, prepared, backend=backend),
        step_lengths(recipe, prepared),
        Answers(
            [len(ids) for ids in prepared.prompt_ids],
            recipe.generate.max_new_tokens,
            recipe.generate.num_return_sequences,
        ),
        wanted(recipe),
        Machine(memory, card.expected if card is not None else None, world_size),
    )


def training(recipe: Recipe, prepared: PreparedData, *, backend: str) -> Training:
    """Return what the recipe says of a pass's cost."""
    lengths = [len(row.input_ids) for row in prepared.rows.values()] or [1]
    return Training(
        r=recipe.lora.r,
        optim=recipe.train.optim,
        load_in_4bit=recipe.model.load_in_4bit,
        backend=backend,
        rows=recipe.train.effective_batch_size,
        longest=max(lengths),
        typical=round(sum(n * n for n in lengths) / sum(lengths)),
        draws=recipe.lora.lora_dropout > 0,
    )


def step_lengths(recipe: Recipe, prepared: PreparedData) -> list[list[int]]:
    """Return the token counts of each step's rows, over all stages."""
    return [step for job in prepared.jobs for step in job.lengths]


def wanted(recipe: Recipe) -> Wanted:
    """Return what the recipe fixes of its plan."""

    def fixed(value: Any) -> Any:
        return None if value == "auto" else value

    return Wanted(
        micro_batch=fixed(recipe.train.per_device_train_batch_size),
        generation_batch=fixed(recipe.generate.batch_size),
        recompute=fixed(recipe.train.gradient_checkpointing),
        capture=recipe.train.capture,
    )


def describe(recipe: Recipe, prepared: PreparedData, gpu: str | None, world_size: int = 1) -> dict[str, Any]:
    """Return what training will take, by stage and in all; with a card also its plan, GiB and projected minutes.

    `gpu` is a name of cards.json; None: the card here, by its measured rate, or no card at all. `world_size`
    processes train together, each on such a card.
    """
    jobs = prepared.jobs
    stages: list[dict[str, Any]] = []
    for job in jobs:
        seen = [job.rows[index] for batch in job.batches for index in batch]
        stages.append(
            {
                "stage": job.name,
                "rows": len(job.rows),
                "steps": len(job.batches),
                "tokens": sum(len(row.input_ids) for row in seen),
                "supervised_tokens": sum(row.supervised for row in seen),
                "longest_row": max(len(row.input_ids) for row in job.rows),
            }
        )
    backend, why = backend_of(recipe, world_size)
    content: dict[str, Any] = {"stages": stages}
    if world_size > 1:
        content["processes"] = {"world_size": world_size, "largest_share": largest_share(jobs, world_size), "note": why}
    card = cards.card(gpu) if gpu is not None else card_here()
    if card is None:
        return content
    config = base_config(recipe)
    settled = settle(recipe, prepared, config, backend=backend, card=card, world_size=world_size)
    shape, work = ModelShape.from_config(config), training(recipe, prepared, backend=backend)
    ends: list[float] = []
    for rates in card.rates:
        by_stage = [
            sum(plans.step_seconds(shape, work, settled.train, step, rates) for step in job.lengths) / 60
            for job in jobs
        ]
        for entry, minutes in zip(stages, by_stage, strict=True):
            entry.setdefault("projected_minutes", []).insert(0, round(minutes, 1))
        ends.insert(0, round(sum(by_stage), 1))
    budget = policy_ntu_hw5.minutes(recipe, "train_minutes")
    content |= {
        "card": {"name": card.name, "tflops": list(card.tflops), "rates_from": card.source, "lacks": card.missing()},
        "plan": settled.to_json(),
        "projected_minutes": ends,
        "budget_minutes": budget,
        "answer_minutes": answer_minutes(recipe, prepared, settled.decode.slots, shape, card),
        "answer_budget_minutes": policy_ntu_hw5.minutes(recipe, "generate_minutes"),
        "verdict": _verdict(ends, budget, settled.train),
    }
    return content


def answer_minutes(
    recipe: Recipe,
    prepared: PreparedData,
    slots: int,
    shape: ModelShape,
    card: cards.Card,
) -> list[float] | None:
    """Return projected minutes of the answers, `slots` at a time, on a card of these rates; None without prompts.

    The low end is of short answers, with 4-bit weights read once a step; the high end of full-length ones, with weights
    turned to 16 bits in each. No published run on a T4 is at hand to hold this against.
    """
    if not prepared.prompts:
        return None
    rows = len(prepared.prompts) * recipe.generate.num_return_sequences
    ends = []
    for tokens, bytes_a_weight, rate in (
        (min(_MEAN_ANSWER, recipe.generate.max_new_tokens), 0.516, card.tflops[1]),
        (recipe.generate.max_new_tokens, 4.5, card.tflops[0]),
    ):
        step = shape.linear_weights * (bytes_a_weight / (card.gb_per_s * 1e9) + 2 * slots / (rate * 1e12))
        ends.append(round(rows * tokens / slots * step / 60, 1))
    return ends


def backend_of(recipe: Recipe, world_size: int) -> tuple[str, str]:
    """Return the backend that trains the recipe on cards, and why it is another than the recipe's, or ""."""
    name = card_backend(recipe.model, recipe.lora)
    return ("peft", ALONE_ONLY) if world_size > 1 and name == "unsloth" else (name, "")


def largest_share(jobs: Sequence[StageJob], world_size: int) -> float:
    """Return the part of all tokens that goes to whichever process has most in a step: at best 1 / world_size."""
    steps = [step for job in jobs for step in job.lengths]
    fullest = sum(max(sum(step[i] for i in part) for part in share(step, world_size)) for step in steps)
    return round(fullest / sum(map(sum, steps)), 4)


def base_config(recipe: Recipe) -> dict[str, Any]:
    """Return the base model's config.json; Llama-2-7B's is known without a network."""
    if recipe.model.name_or_path in policy_ntu_hw5.MODELS:
        return dict(policy_ntu_hw5.LLAMA_2_7B)
    return download.model_config(recipe.model.name_or_path, recipe.model.revision, weights=False)


def card_here() -> cards.Card | None:
    """The GPU of this machine: its free memory and measured matmul rate; its bandwidth from the nearest known card."""
    here = gpu.gpu()  # asked first: torch takes seconds to import, and a CPU needs none of it here
    memory, rate = (gpu.free_gpu_gib(), gpu.matmul_tflops()) if here else (None, None)
    if here is None or memory is None or rate is None:
        return None
    return cards.like(here["name"], memory + CONTEXT_GIB, rate)


def _verdict(minutes: list[float], budget: float | None, settled: TrainPlan) -> str:
    if settled.train_gib > settled.memory_gib:
        return f"does not fit: {settled.train_gib:.1f} GiB predicted, {settled.memory_gib:.1f} are there"
    if budget is None:
        return "fits into memory; no budget of minutes is set"
    if minutes[1] <= budget:
        return f"fits: at most {max(1, math.ceil(minutes[1]))} of {budget:g} minutes projected"
    if minutes[0] > budget:
        return f"does not fit: at least {minutes[0]:g} minutes projected, {budget:g} allowed"
    return f"unsure: {minutes_between(*minutes)} minutes projected, {budget:g} allowed"
