"""Base model and adapter: which loader loads them. Three ways, one recipe.

PeftLoader uses transformers, PEFT and bitsandbytes alone. It runs on a CPU too, and the other two are measured by it.
FusedLoader is the same with our own decoder blocks in training (models/fused_block/), for NVIDIA GPUs: it trains
fastest, and loads in half of Unsloth's time. UnslothLoader uses Unsloth's patched kernels, for NVIDIA GPUs too.

Importing unsloth patches transformers and trl, so a loader is made before either is imported.
"""

from __future__ import annotations

import logging

from fast_ft.common import environment
from fast_ft.common.errors import InputError
from fast_ft.models.loaders import unsloth
from fast_ft.models.loaders.base import ALONE_ONLY, LoaderBase
from fast_ft.models.loaders.peft import FusedLoader, PeftLoader
from fast_ft.models.loaders.unsloth import UnslothLoader
from fast_ft.recipe import schema


def make_loader(
    model: schema.Model, lora: schema.Lora, *, seed: int, name: str | None = None, world_size: int = 1
) -> LoaderBase:
    """Return the loader that the recipe asks for; or `name`, the one that an adapter was trained with.

    auto is recipe.card_backend where there is an NVIDIA GPU. Where our blocks do not know the model or the card, it is
    Unsloth. Where Unsloth does not import, or several processes train, it is PEFT. The loader's notes say so.

    Raises:
        InputError: the recipe asks for a loader that cannot load this model here.
    """
    prepare_libraries()
    arguments = (model, lora, seed)
    wanted = name or model.backend
    if wanted == "peft":
        return PeftLoader(*arguments)
    import torch

    if not torch.cuda.is_available():
        if wanted == "auto" or name == "fused":  # which answers as peft does
            return PeftLoader(*arguments)
        raise InputError(
            f"model.backend: {wanted!r} needs an NVIDIA GPU, and torch sees none. Use model.backend=peft, or "
            "check the driver with nvidia-smi."
        )
    notes = []
    if (name or schema.card_backend(model, lora)) == "fused":
        fused = FusedLoader(*arguments)
        problem = fused.problem() if name is None else None
        if problem is None:
            return fused
        if wanted == "fused":
            raise InputError(f"model.backend: 'fused' cannot train this: {problem}. Use model.backend=auto.")
        notes.append(f"Not trained through our own blocks: {problem}.")
    loader: LoaderBase
    if world_size > 1:
        loader = PeftLoader(*arguments)
        notes.append(ALONE_ONLY)
    elif reason := unsloth.import_problem():
        if wanted == "unsloth":
            raise InputError(
                f"model.backend: 'unsloth' does not import ({reason}). Install the versions in requirements.txt, "
                "or use model.backend=peft."
            )
        loader = PeftLoader(*arguments)
        notes.append(f"Unsloth does not import ({reason}): the run went through PEFT, more slowly.")
    else:
        loader = UnslothLoader(*arguments)
    loader.notes += notes
    return loader


def prepare_libraries() -> None:
    """Set what torch, transformers and Unsloth read when they are imported. What the user has set stays."""
    environment.for_libraries()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel that it would fetch
