"""Which way trains a run: chosen when it begins, and kept to whenever it goes on.

The plan in the manifest names the way that the first step took. Gradients of two ways differ in their last bits, so a
run that goes on takes the same one, or is refused by name.

Importing Unsloth takes half a minute, so it begins before anything else, in a thread.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from fast_ft.common import gpu, process_group
from fast_ft.common.errors import InputError
from fast_ft.hub import download, model_files
from fast_ft.models.loaders import choose, unsloth
from fast_ft.models.loaders.base import LoaderBase
from fast_ft.pipeline import set_up
from fast_ft.plan.ways import Ways, ways
from fast_ft.recipe import lora_kinds
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir, output_folder
from fast_ft.train import checkpoints


def begin(recipe: Recipe, recipe_path: str | Path) -> None:
    """Begin to import Unsloth where this run will need it, and to read the base's weights into the page cache.

    The base is downloaded only after the import has shown that the way that the recipe names can be taken.

    Raises:
        InputError: that way cannot be taken on this machine. Nothing was downloaded or loaded.
    """
    root = output_folder(recipe, recipe_path)
    known = os.path.isfile(root / "manifest.json")  # noqa: PTH113 (False for a name that no file can have)
    folder = RunDir.at(root) if known else None
    if folder is not None and _is_done(folder, recipe):
        return
    first, capability = _fixed(folder) if folder is not None else None, gpu.capability()
    if first is None:
        names = ways(recipe, capability, process_group.here().size).names
        if len(names) == 1:  # else there is another one
            choose.refuse_absent(names[0])
        first = names[0]
    if first == "peft":
        return
    is_here = _is_here(recipe)
    if is_here and set_up.base_family(recipe).general is not None:
        return  # PEFT trains it
    is_named = recipe.model.backend == "unsloth"  # of a base that is not here nobody knows yet whether auto comes to it
    if first == "unsloth" and capability is not None and (is_here or is_named):
        choose.prepare_libraries()
        unsloth.begin_import()
        if not is_here and (problem := unsloth.import_problem()):
            raise choose.Unavailable("unsloth", f"it does not import ({problem})")
    if is_here:
        folder_of_base = download.model_folder(recipe.model.name_or_path, recipe.model.revision)
        threading.Thread(target=model_files.read_ahead, args=(folder_of_base,), name="read ahead").start()


def training_loader(folder: RunDir, recipe: Recipe, world_size: int) -> LoaderBase:
    """Return the loader that trains this run: the one that it began with, or the first that can.

    Raises:
        InputError: the way cannot be taken here.
    """
    fixed = _fixed(folder)
    if fixed is not None:
        return _same_again(folder, recipe, fixed, world_size)
    found: Ways = ways(recipe, gpu.capability(), world_size)
    maker = choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, ways=found.names)
    if found.why and maker.name == found.names[0]:
        maker.notes.append(f"Trained through {lora_kinds.TITLES[maker.name]}: {found.why}.")
    if folder.plan.is_file() and folder.record().plan.get("backend", "") not in ("", maker.name):
        folder.plan.unlink()  # nothing was trained by it, and it counts another way's costs
    return maker


def _same_again(folder: RunDir, recipe: Recipe, fixed: str, world_size: int) -> LoaderBase:
    """Return the loader of the way that a run began with."""
    try:
        if fixed == "unsloth" and world_size > 1:
            raise choose.Unavailable(fixed, "Unsloth trains in one process only")
        return choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, ways=(fixed,))
    except choose.Unavailable as error:
        raise InputError(
            f"{folder.root}: this run began through {fixed!r} and goes on through nothing else, and here that cannot "
            f"be used: {error.reason}. Make it possible, or train again: another output_dir, model.backend=auto."
        ) from None


def _fixed(folder: RunDir) -> str | None:
    """Return the way of a run that has taken steps which it goes on from, or None."""
    if not folder.plan.is_file() or checkpoints.newest(folder.checkpoints) is None:
        return None
    return folder.record().plan.get("backend") or None


def _is_done(folder: RunDir, recipe: Recipe) -> bool:
    """Return whether no phase is left that loads the base."""
    phases = ("train", *(["generate"] if recipe.data.test else []))
    return all(folder.done(phase) is not None and not folder.lost(phase) for phase in phases)


def _is_here(recipe: Recipe) -> bool:
    """Return whether the base's files are on this machine already."""
    try:
        with download.nothing_fetched():
            download.model_folder(recipe.model.name_or_path, recipe.model.revision)
    except InputError:
        return False
    return True
