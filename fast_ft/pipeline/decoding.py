"""How prompts are decoded: as the run's plan has it where it was settled for them, else as the memory has room for."""

from __future__ import annotations

from dataclasses import replace

from fast_ft.common import gpu, host_memory
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import PreparedData
from fast_ft.hub import download
from fast_ft.hub.families import GIB, FamilySpec
from fast_ft.pipeline import base_check
from fast_ft.plan import decode_pool, planner
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.plan.run_plan import RunPlan
from fast_ft.recipe.loader import resolved, validated
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir
from fast_ft.run.made_with import as_made

_CONTEXT_GIB = 1.0  #: by which a plan's memory may be over the card's: a CUDA context is counted for so much at most


def decode_plan(recipe: Recipe, prepared: PreparedData, settled: RunPlan) -> DecodePlan:
    """Return how the prompts at hand are decoded by a run with this plan.

    What was settled for the same prompts and settings is obeyed, unless the card here, or the machine without one, is
    too small for it. Else slots and cache are settled for them, within the memory that the run was planned for, on a
    CPU within what is free. Products stay the run's.
    """
    family = _family(recipe)
    told = _what_is_answered(recipe, prepared, family)
    plan, memory_gib = settled.decode, _memory_gib(recipe, settled)
    most = host_memory.whole_bytes() / GIB if memory_gib is None else memory_gib
    if plan is None or plan.settled_for != told or plan.gib > most:
        family = planner.as_loaded(recipe, family, on_card=memory_gib is not None)
        capability = gpu.capability()
        plan = decode_pool.settle_decoding(
            family.shape,
            planner.answers(recipe, prepared, family),
            planner.wanted(recipe, family).generation_batch,
            memory_gib=memory_gib,
            load_in_4bit=family.is_4bit(asked=recipe.model.load_in_4bit),
            tiles=capability is None or decode_pool.has_tiles(capability),
            host_gib=host_memory.own_bytes() / GIB,
        )
    return replace(plan, products=settled.products, settled_for=told)


def named(recipe: Recipe, prepared: PreparedData, settled: RunPlan) -> RunPlan:
    """Return a new plan with what its pool was settled for, the prompts at hand."""
    if settled.decode is None:
        return settled
    told = _what_is_answered(recipe, prepared, _family(recipe))
    return replace(settled, decode=replace(settled.decode, settled_for=told))


def attributed(folder: RunDir, recipe: Recipe, prepared: PreparedData, settled: RunPlan) -> RunPlan:
    """Return a plan that tells what its pool was settled for. That of an earlier version of the program did not.

    It was obeyed for whatever the run answered, so it holds for the prompts and settings on the run's record. Where
    the prompts at hand are others, or the record cannot be read, the pool is left out.
    """
    if settled.decode is None or settled.decode.settled_for:
        return settled
    record = folder.record()
    was, is_ = record.digests.get("test"), prepared.digests.get("test")
    if base_check.prompt_changes(record, prepared) or (record.tokens.prompts is None and was != is_):
        return replace(settled, decode=None)
    try:
        made = as_made(folder.manifest() | {"recipe": resolved(folder.recipe())})
        section = validated(made, {}, str(folder.manifest_path), consequences=False).generate
    except InputError:  # of another version
        return replace(settled, decode=None)
    decode = settled.decode.given(section)
    return named(recipe.model_copy(update={"generate": section}), prepared, replace(settled, decode=decode))


def _family(recipe: Recipe) -> FamilySpec:
    return download.family(recipe.model.name_or_path, recipe.model.revision, weights=False)


def _what_is_answered(recipe: Recipe, prepared: PreparedData, family: FamilySpec) -> str:
    batch = planner.wanted(recipe, family).generation_batch
    return decode_pool.what_is_answered(planner.answers(recipe, prepared, family), batch)


def _memory_gib(recipe: Recipe, settled: RunPlan) -> float | None:
    """Return the memory that answers may take here: as the run was planned for, or what a smaller card has.

    None on a CPU. Of a run that was planned on a CPU, the card here is asked.
    """
    whole = gpu.whole_gpu_gib()
    if whole is None:
        return None
    planned = settled.train.memory_gib
    if not planned:
        here = planner.card_here()
        planned = here.memory_gib if here is not None else whole
    memory = planned if planned <= whole + _CONTEXT_GIB else whole
    budget = recipe.budget.memory_gib
    return memory if budget == "auto" else min(memory, float(budget))
