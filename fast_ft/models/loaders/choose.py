"""Base model and adapter: which loader loads them. Three ways, one recipe.

PeftLoader uses transformers, PEFT and bitsandbytes alone. It runs on a CPU too, and the other two are measured by it.
FusedLoader is the same with our own decoder blocks in training (models/fused_block/), for NVIDIA GPUs. UnslothLoader
trains through Unsloth's functions, for NVIDIA GPUs too.

Importing unsloth patches transformers and trl, so a loader is made before either is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from importlib import metadata

from fast_ft.common import environment, gpu
from fast_ft.common.errors import InputError
from fast_ft.hub import download
from fast_ft.hub.families import FamilySpec
from fast_ft.models.loaders import unsloth
from fast_ft.models.loaders.base import LoaderBase
from fast_ft.models.loaders.peft import FusedLoader, PeftLoader
from fast_ft.models.loaders.unsloth import UnslothLoader
from fast_ft.recipe import schema


class Unavailable(InputError):
    """A way of training that cannot be used on this machine. `reason` is a clause."""

    def __init__(self, way: str, reason: str) -> None:
        super().__init__(
            f"model.backend: {way!r} cannot be used here: {reason}. Use model.backend=auto, which takes a way that can."
        )
        self.reason = reason


def make_loader(
    model: schema.Model, lora: schema.Lora, *, seed: int, name: str | None = None, ways: Sequence[str] | None = None
) -> LoaderBase:
    """Return the loader that the recipe asks for; or `name`, the one that an adapter was trained with.

    `ways` are names of loaders, as plan/ways.py orders them: the first that can load this model here is taken, and the
    loader's notes say why it is not an earlier one. Without them the recipe's own is taken, PEFT's on a CPU.

    Raises:
        Unavailable: no loader that was asked for can load this model here.
    """
    prepare_libraries()
    family = download.family(model.name_or_path, model.revision)
    if family.general is not None:
        if name is None and model.backend in ("fused", "unsloth"):
            raise Unavailable(model.backend, family.general)
        return PeftLoader(model, lora, seed)
    import torch

    if not torch.cuda.is_available() and (name == "fused" or (name is ways is None and model.backend == "auto")):
        name = "peft"  # an adapter of our own blocks is PEFT's
    if name is not None:
        ways = (name,)
    elif ways is None:
        ways = ("fused", "unsloth", "peft") if model.backend == "auto" else (model.backend,)
    notes: list[str] = []
    for way in ways:
        problem = unfit(way, family, model.max_length) if name is None else None
        loader = problem or _loader(way, model, lora, seed, answers=name is not None)
        if isinstance(loader, LoaderBase):
            loader.notes += notes
            return loader
        notes.append(f"Not trained through {way}: {loader}.")
        last = loader
    raise Unavailable(ways[-1], last)


def refuse_absent(backend: str) -> None:
    """Refuse what a recipe names and this machine has not, as far as that can be told at once.

    Raises:
        Unavailable: there is no NVIDIA GPU, or Unsloth is not installed.
    """
    if backend not in ("unsloth", "fused"):
        return
    if gpu.capability() is None:
        raise Unavailable(backend, "it needs an NVIDIA GPU, and there is none that this process may use")
    if backend == "unsloth" and importlib.util.find_spec("unsloth") is None:
        raise Unavailable(backend, "Unsloth is not installed; requirements-gpu.txt, or fast_ft[gpu], brings it")


def unfit(way: str, family: FamilySpec, max_length: int) -> str | None:
    """Return what of a base a way of training ("fused", "unsloth" or "peft") does not know, or None.

    `max_length` is that of the rows: a window makes a difference to longer ones only.
    """
    if way not in ("fused", "unsloth"):
        return None
    if family.general is None and way == "unsloth" and (window := family.window_below(max_length)):
        return f"rows of up to {max_length} tokens are longer than the window of {window}, which its passes do not know"
    return family.general


def prepare_libraries() -> None:
    """Set what torch, transformers and Unsloth read when they are imported. What the user has set stays.

    transformers and TRL each look through all installed packages as they are imported, for up to a second where these
    are many; here that is done once.
    """
    environment.for_libraries()
    if not hasattr(metadata.packages_distributions, "cache_info"):
        vars(metadata)["packages_distributions"] = functools.cache(metadata.packages_distributions)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel that it would fetch


def _loader(way: str, model: schema.Model, lora: schema.Lora, seed: int, *, answers: bool) -> LoaderBase | str:
    """Return a way's loader, or why it cannot load this model here. To answer, it need not be able to train."""
    import torch

    if way == "peft":
        return PeftLoader(model, lora, seed)
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and torch sees none; check the driver with nvidia-smi"
    if way == "unsloth":
        if reason := unsloth.import_problem():
            return f"it does not import ({reason}); requirements-gpu.txt has the versions that do"
        return UnslothLoader(model, lora, seed)
    fused = FusedLoader(model, lora, seed)
    return fused if answers else fused.problem() or fused
