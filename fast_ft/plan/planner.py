"""A recipe's plan: settled for the card at hand when a run begins, or for any card by `python -m fast_ft plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fast_ft.common import gpu, gpu_rates, host_memory
from fast_ft.common.wording import minutes_between
from fast_ft.data.batches import StageJob
from fast_ft.data.prepare import PreparedData
from fast_ft.data.shared_start import shared_start
from fast_ft.hub import download
from fast_ft.hub.families import GIB, FamilySpec
from fast_ft.plan import base_fits, cards, decode_time, plans
from fast_ft.plan.constants import MEMORY
from fast_ft.plan.decode_pool import PREFILL_TOKENS, Answers, has_tiles
from fast_ft.plan.micro_batches import share
from fast_ft.plan.plans import Machine, Wanted
from fast_ft.plan.run_plan import RunPlan, TrainPlan
from fast_ft.plan.train_time import train_minutes
from fast_ft.plan.training_work import Training, takes_flash
from fast_ft.plan.ways import ways
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe


def settle(
    recipe: Recipe,
    prepared: PreparedData,
    family: FamilySpec,
    *,
    backend: str,
    card: cards.Card | None,
    world_size: int = 1,
) -> RunPlan:
    """Return the plan of a recipe over a base on a card, None being a CPU; see plans.settle."""
    family = as_loaded(recipe, family, on_card=card is not None)
    memory = card.memory_gib if card is not None else None
    if memory is not None and recipe.budget.memory_gib != "auto":
        memory = min(memory, float(recipe.budget.memory_gib))
    return plans.settle(
        family.shape,
        training(recipe, prepared, family, backend=backend, card=card),
        step_lengths(recipe, prepared),
        answers(recipe, prepared, family),
        wanted(recipe, family),
        Machine(
            memory,
            card.expected if card is not None else None,
            world_size,
            tiles=card is None or has_tiles(card.capability),
            host_gib=host_memory.own_bytes() / GIB if card is None else None,
        ),
    )


def training(
    recipe: Recipe, prepared: PreparedData, family: FamilySpec, *, backend: str, card: cards.Card | None
) -> Training:
    """Return what the recipe, its base and the card say of a pass's cost."""
    shape = family.shape
    lengths = [len(row.input_ids) for row in prepared.rows.values()] or [1]
    made = Training(
        r=recipe.lora.r,
        optim=recipe.train.optim,
        load_in_4bit=family.is_4bit(asked=recipe.model.load_in_4bit),
        backend=backend,
        rows=recipe.train.effective_batch_size,
        longest=max(lengths),
        draws=recipe.lora.lora_dropout > 0,
        flash=takes_flash(card.capability if card is not None else None, shape.head_dim),
        qk_norms=family.qk_norms,
        whole_weights=len(recipe.lora.modules_to_save) * shape.vocab_size * shape.hidden_size,
    )
    if family.general is None:
        return made
    # a row by itself, and torch's own loss over all of it: in 16 bits, in 32 and as logarithms, and its gradients
    return replace(made, loss_positions=made.longest, logit_bytes=16)


def step_lengths(recipe: Recipe, prepared: PreparedData) -> list[list[int]]:
    """Return the token counts of each step's rows, over all stages."""
    return [step for job in prepared.jobs for step in job.lengths]


def wanted(recipe: Recipe, family: FamilySpec) -> Wanted:
    """Return what the recipe and the base fix of the plan: on the general way each row has a pass of its own."""

    def fixed(value: Any) -> Any:
        return None if value == "auto" else value

    return Wanted(
        micro_batch=fixed(recipe.train.per_device_train_batch_size) if family.general is None else 1,
        generation_batch=fixed(recipe.generate.batch_size),
        recompute=fixed(recipe.train.gradient_checkpointing),
        capture=recipe.train.capture and family.general is None,
    )


def describe(recipe: Recipe, prepared: PreparedData, gpu: str | None, world_size: int = 1) -> dict[str, Any]:
    """Return what training will take, by stage and in all; with a card also its plan, GiB and projected minutes.

    `gpu` is a name that `cards.card` knows; see `card_for`. `world_size` processes train together, each on such a card.
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
    family = as_loaded(recipe, base_family(recipe))
    base_fits.check(family, recipe, prepared)
    card = card_for(recipe, gpu)
    (backend, *_), why = ways(recipe, card.capability if card is not None else None, world_size)
    if family.general is not None:
        backend, why = "peft", family.general
    content: dict[str, Any] = {"stages": stages, **({"way": family.way} if family.way else {})}
    if world_size > 1:
        content["processes"] = {"world_size": world_size, "largest_share": largest_share(jobs, world_size), "note": why}
    if card is None:
        return content
    settled = settle(recipe, prepared, family, backend=backend, card=card, world_size=world_size)
    shape, work = family.shape, training(recipe, prepared, family, backend=backend, card=card)
    steps, held_out = [job.lengths for job in jobs], [len(row.input_ids) for row in prepared.validation]
    both = [
        train_minutes(shape, work, settled.train, steps, held_out, recipe.train.eval_steps, rates)
        for rates in reversed(card.rates)  # the quick end first
    ]
    for index, entry in enumerate(stages):
        entry["projected_minutes"] = [round(each.stages[index], 1) for each in both]
    ends = [round(sum(each.stages), 1) for each in both]
    if held_out:
        minutes = [round(each.validation, 1) for each in both]
        content["validation"] = {"rows": len(held_out), "times": both[0].measurements, "projected_minutes": minutes}
    budget = policy_ntu_hw5.minutes(recipe, "train_minutes")
    content |= {
        "card": {"name": card.name, "tflops": list(card.tflops), "rates_from": card.source, "lacks": card.missing()},
        "plan": settled.to_json(),
        "why": why,
        "projected_minutes": ends,
        "budget_minutes": budget,
        "answer_minutes": answer_minutes(recipe, prepared, settled, family, card),
        "answer_budget_minutes": policy_ntu_hw5.minutes(recipe, "generate_minutes"),
        "verdict": _verdict(ends, budget, settled.train),
    }
    return content


def answer_minutes(
    recipe: Recipe, prepared: PreparedData, settled: RunPlan, family: FamilySpec, card: cards.Card
) -> list[float] | None:
    """Return projected minutes of the answers, from the quick end to the slow; None where none were planned.

    See decode_time.answer_minutes.
    """
    if settled.decode is None:
        return None
    asked, slots = answers(recipe, prepared, family), settled.decode.slots
    in_4_bits = family.is_4bit(asked=recipe.model.load_in_4bit)
    return decode_time.answer_minutes(family.shape, card.rates, asked, slots, load_in_4bit=in_4_bits)


def answers(recipe: Recipe, prepared: PreparedData, family: FamilySpec) -> Answers:
    """Return the prompts' token counts, and what each is answered with at most."""
    return Answers(
        [len(ids) for ids in prepared.prompt_ids],
        recipe.generate.max_new_tokens,
        recipe.generate.num_return_sequences,
        shared_tokens=0 if any(family.windows) else shared_start({*map(tuple, prepared.prompt_ids)}, PREFILL_TOKENS),
        pooled=family.general is None,
        kv_cache=recipe.generate.kv_cache,
    )


def largest_share(jobs: Sequence[StageJob], world_size: int) -> float:
    """Return the part of all tokens that goes to whichever process has most in a step: at best 1 / world_size."""
    steps = [step for job in jobs for step in job.lengths]
    fullest = sum(max(sum(step[i] for i in part) for part in share(step, world_size)) for step in steps)
    return round(fullest / sum(map(sum, steps)), 4)


def base_family(recipe: Recipe) -> FamilySpec:
    """Return what the base model's configuration says; Llama-2-7B's is known without a network."""
    if recipe.model.name_or_path in policy_ntu_hw5.MODELS:
        return FamilySpec.from_config(policy_ntu_hw5.LLAMA_2_7B | {"max_position_embeddings": 4096})
    return download.family(recipe.model.name_or_path, recipe.model.revision, weights=False)


def as_loaded(recipe: Recipe, family: FamilySpec, *, on_card: bool = True) -> FamilySpec:
    """Return a base's description with the bytes that its numbers have on a card, or on a CPU, by this recipe.

    Where it is not one of ours, also with the linear layers that it has.
    """
    wide = 4 if recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and not on_card) else 2
    family = replace(family, shape=replace(family.shape, number_bytes=wide))
    if family.general is None or family.shape.own_linears:
        return family
    from fast_ft.models import base_layers  # loads torch

    return base_layers.counted(
        download.model_folder(recipe.model.name_or_path, recipe.model.revision, weights=False), family
    )


def card_for(recipe: Recipe, gpu_name: str | None) -> cards.Card | None:
    """Return the card of this name; without one the card here; without that the one that the recipe names, or None."""
    if gpu_name is not None:
        return cards.card(gpu_name)
    if (here := card_here()) is not None or recipe.budget.gpu is None:
        return here
    return cards.card(recipe.budget.gpu, "budget.gpu:")


def card_here() -> cards.Card | None:
    """Return the GPU of this machine, with its free memory and measured rates; None on a CPU.

    Raises:
        InputError: The GPU is too old for the installed torch.
    """
    here = gpu.gpu()  # asked first: torch takes seconds to import, and a CPU needs none of it here
    if here is None or (memory := gpu.free_gpu_gib()) is None:
        return None
    capability, built_for = gpu.capabilities()
    cards.refuse_old(here["name"], capability, built_for)
    measured = gpu_rates.measure()
    return (
        None if measured is None else cards.at_hand(here["name"], capability, memory + MEMORY["context_gib"], measured)
    )


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
