"""A recipe's plan: settled for the card at hand when a run begins, or for any card by `python -m fast_ft plan`."""

from __future__ import annotations

import json
from typing import Any

from fast_ft import environment, forecast, hub, plan, rules
from fast_ft.errors import InputError
from fast_ft.plan import ModelShape, Plan
from fast_ft.prepare import Prepared
from fast_ft.recipe import Recipe


def settle(
    recipe: Recipe,
    prepared: Prepared,
    config: dict[str, Any],
    *,
    fused_kernels: bool,
    memory_gib: float | None,
    tflops: float | None,
) -> Plan:
    """Return the plan of a recipe on a card; see plan.settle. `config` is the base model's config.json."""
    assert prepared.encoder is not None
    micro, batch = recipe.train.per_device_train_batch_size, recipe.generate.batch_size
    checkpointing = recipe.train.gradient_checkpointing
    if memory_gib is not None and recipe.budget.memory_gib != "auto":
        memory_gib = min(memory_gib, float(recipe.budget.memory_gib))
    return plan.settle(
        ModelShape.from_config(config),
        [len(row.input_ids) for row in prepared.rows.values()],
        [len(prepared.encoder.prompt_ids(prompt.messages)) for prompt in prepared.prompts],
        effective_batch_size=recipe.train.effective_batch_size,
        wanted_micro_batch=None if micro == "auto" else micro,
        wanted_generation_batch=None if batch == "auto" else batch,
        max_new_tokens=recipe.generate.max_new_tokens,
        candidates=recipe.generate.num_return_sequences,
        r=recipe.lora.r,
        optim=recipe.train.optim,
        load_in_4bit=recipe.model.load_in_4bit,
        wanted_checkpointing=None if checkpointing == "auto" else checkpointing,
        fused_kernels=fused_kernels,
        memory_gib=memory_gib,
        tflops=tflops if recipe.train.capture else None,
    )


def describe(recipe: Recipe, prepared: Prepared, gpu: str | None) -> dict[str, Any]:
    """Return what training will take, by stage and in all; with a card also its plan, GiB and projected minutes.

    `gpu` is a name of cards.json; None: the card here, by its measured rate, or no card at all.
    """
    stages: list[dict[str, Any]] = []
    jobs = prepared.jobs(recipe.train, recipe.seed)
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
    content: dict[str, Any] = {"stages": stages}
    card = forecast.card(gpu) if gpu is not None else _card_here()
    if card is None:
        return content
    config = base_config(recipe)
    settled = settle(
        recipe, prepared, config, fused_kernels=recipe.model.backend != "peft",
        memory_gib=card.memory_gib, tflops=card.tflops[1],
    )  # fmt: skip
    shape = ModelShape.from_config(config)
    ends: list[float] = []
    for rate in card.tflops:
        by_stage = [
            sum(
                forecast.step_seconds(
                    shape, settled, [len(job.rows[i].input_ids) for i in batch], rate, card.gb_per_s,
                    load_in_4bit=recipe.model.load_in_4bit,
                )
                for batch in job.batches
            ) / 60
            for job in jobs
        ]  # fmt: skip
        for entry, minutes in zip(stages, by_stage, strict=True):
            entry.setdefault("projected_minutes", []).insert(0, round(minutes, 1))
        ends.insert(0, round(sum(by_stage), 1))
    budget = recipe.budget.train_minutes
    content |= {
        "card": {"name": card.name, "tflops": list(card.tflops), "rates_from": card.source, "lacks": card.missing()},
        "plan": settled.to_json(),
        "projected_minutes": ends,
        "budget_minutes": budget,
        "verdict": _verdict(ends, budget, settled),
    }
    return content


def base_config(recipe: Recipe) -> dict[str, Any]:
    """Return the base model's config.json; Llama-2-7B's is known without a network."""
    try:
        folder = hub.model_folder(recipe.model.name_or_path, recipe.model.revision, weights=False)
    except InputError:
        if recipe.model.name_or_path in rules.MODELS:
            return dict(rules.LLAMA_2_7B)
        raise
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _card_here() -> forecast.Card | None:
    """The GPU of this machine: its free memory and measured matmul rate; its bandwidth from the nearest known card."""
    here = environment.gpu()
    if here is None:
        return None
    memory, rate = environment.free_gpu_gib(), environment.matmul_tflops()
    assert memory is not None and rate is not None, "nvidia-smi sees a GPU that torch does not"
    return forecast.like(here["name"], memory, rate)


def _verdict(minutes: list[float], budget: float | None, settled: Plan) -> str:
    if settled.train_gib > settled.memory_gib:
        return f"does not fit: {settled.train_gib:.1f} GiB predicted, {settled.memory_gib:.1f} are there"
    if budget is None:
        return "fits into memory; no budget of minutes is set"
    if minutes[1] <= budget:
        return f"fits: at most {minutes[1]:.0f} of {budget:g} minutes projected"
    if minutes[0] > budget:
        return f"does not fit: at least {minutes[0]:.0f} minutes projected, {budget:g} allowed"
    return f"unsure: {minutes[0]:.0f} to {minutes[1]:.0f} minutes projected, {budget:g} allowed"
