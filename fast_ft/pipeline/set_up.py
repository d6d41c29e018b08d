"""What comes before a model is loaded, to train or to answer: the base is checked, and the plan settled."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files, environment, gpu, process_group, untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded
from fast_ft.data.prepare import PreparedData
from fast_ft.hub import download, families
from fast_ft.hub.families import FamilySpec
from fast_ft.models import base_layers, lora_files
from fast_ft.pipeline import decoding
from fast_ft.plan import base_fits, cards, planner
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.plan.run_plan import RunPlan
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir
from fast_ft.train import checkpoints


def card_to_plan_for(folder: RunDir, recipe: Recipe) -> cards.Card | None:
    """Return the card here, as a run without a plan is planned for; None on a CPU, and where there is a plan already.

    A budget.memory_gib of the recipe's binds this process from here on.
    """
    if gpu.gpu() is None:
        return None
    environment.for_libraries()  # before the card is touched
    if recipe.budget.memory_gib != "auto":
        gpu.cap_gpu_gib(float(recipe.budget.memory_gib))
    return None if folder.plan.is_file() else planner.card_here()


def settle_plan(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    backend_name: str,
    card: cards.Card | None,
    world_size: int = 1,
) -> RunPlan:
    """Return this run's plan: the one in plan.json if there is one, else a new one for `card`, written there."""
    if folder.plan.is_file():
        content = _plan_content(folder)
        if folder.manifest().get("plan") != content:  # a stop came between keep_plan's two writes
            folder.update(plan=content)
        return decoding.attributed(folder, recipe, prepared, RunPlan.from_json(content, folder.plan))
    family = base_family(recipe)
    settled = planner.settle(recipe, prepared, family, backend=backend_name, card=card, world_size=world_size)
    settled = decoding.named(recipe, prepared, settled)
    keep_plan(folder, settled)
    return settled


def settle_for_training(
    folder: RunDir, recipe: Recipe, prepared: PreparedData, backend_name: str, card: cards.Card | None
) -> tuple[RunPlan, list[str]]:
    """Return the run's plan, and what to note where it goes on in another number of processes."""
    world_size = process_group.here().size
    settled = settle_plan(folder, recipe, prepared, backend_name, card, world_size)
    before = settled.train.world_size
    if before == world_size:
        return settled, []
    settled = replace(settled, train=replace(settled.train, world_size=world_size))
    keep_plan(folder, settled)
    if checkpoints.newest(folder.checkpoints) is None:
        return settled, []
    text = f"training goes on in {world_size} processes, after {before}: equal but for rounding, and what noise draws"
    return settled, [text]


def keep_plan(folder: RunDir, settled: RunPlan) -> None:
    """Write a plan to plan.json, and to the manifest: that alone is then enough to do the run again."""
    content = settled.to_json()
    if not folder.plan.is_file() or _plan_content(folder) != content:
        atomic_files.write_json(folder.plan, content)
    if folder.manifest().get("plan") != content:
        folder.update(plan=content)


def keep_attributed(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> None:
    """Let the plan of an earlier version tell what its pool was settled for, before the run's record changes."""
    if folder.plan.is_file():
        keep_plan(folder, decoding.attributed(folder, recipe, prepared, _plan(folder)))


def keep_products(folder: RunDir, products: str) -> None:
    """Add to the run's plan how 4-bit weights are multiplied in steps of further numbers of rows."""
    keep_plan(folder, _plan(folder).with_products(products))


def _plan(folder: RunDir) -> RunPlan:
    return RunPlan.from_json(_plan_content(folder), folder.plan)


def _plan_content(folder: RunDir) -> dict[str, Any]:
    return untrusted_files.json_object(folder.plan, remedy="Delete it, and a new plan is made.")


def keep_pool(folder: RunDir, pool: DecodePlan) -> None:
    """Write into the run's plan what memory has left of its pool: a run that is resumed begins with that."""
    keep_plan(folder, _plan(folder).with_decoding(pool))


def check_model(recipe: Recipe, prepared: PreparedData | None = None, *, answers: bool = True) -> None:
    """Fetch the base model if need be, its configuration first, and check it before its weights are fetched.

    Raises:
        InputError: the base is incomplete, unsupported or against the rules, or rows or prompts do not fit it.
    """
    name, revision = recipe.model.name_or_path, recipe.model.revision
    folder = download.model_folder(name, revision, weights=False)
    family = FamilySpec.of(folder)
    base_fits.check(family, recipe, prepared, answers=answers)
    if family.shape.tied and recipe.lora.modules_to_save:
        raise InputError(
            "lora.modules_to_save: this base has one matrix for its embeddings and its head, and neither can be "
            "trained without the other: write []"
        )
    tracker = recipe.train.report_to
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise InputError(f"train.report_to: {tracker} is not installed: `pip install {tracker}`, or write none")
    if recipe.rules is not None and (broken := policy_ntu_hw5.check_model_config(families.read_config(folder))):
        raise InputError("\n".join(broken))
    base_layers.check(folder, family, recipe.lora)
    if family.is_4bit(asked=recipe.model.load_in_4bit) and gpu.gpu() is None:
        base_layers.check_4bit_on_cpu(folder, family)
    download.model_folder(name, revision)


def check_prompts(recipe: Recipe, prepared: PreparedData) -> None:
    """Raise InputError where a prompt and its longest answer do not fit the base's context. No weights are fetched."""
    name, revision = recipe.model.name_or_path, recipe.model.revision
    base_fits.check(download.family(name, revision, weights=False), recipe, prepared)


def adapter_to_start_from(folder: RunDir, recipe: Recipe) -> Path | None:
    """Return the adapter's folder that training starts from, checked and noted in the manifest; None for a new one.

    A run with a checkpoint goes on from that.

    Raises:
        InputError: there is no such adapter, or it is not what the recipe's `lora` describes.
    """
    if recipe.model.adapter is None or checkpoints.newest(folder.checkpoints) is not None:
        return None
    adapter = expanded(recipe.model.adapter)
    base = download.model_folder(recipe.model.name_or_path, recipe.model.revision)
    lora_files.check_start(adapter, base, recipe.lora)
    weights = atomic_files.sha256_file(adapter / "adapter_model.safetensors")
    folder.update(starts_from={"adapter": str(adapter), "sha256": weights})
    return adapter


def base_family(recipe: Recipe) -> FamilySpec:
    """Return what the base model's configuration says."""
    return download.family(recipe.model.name_or_path, recipe.model.revision)
