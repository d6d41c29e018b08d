"""Base model and adapter: load, add LoRA, save, load again. Three ways, one recipe.

PeftLoader uses transformers, PEFT and bitsandbytes alone; it runs on a CPU too, and is the yardstick. FusedLoader is
the same with our own decoder blocks in training (block/), for NVIDIA GPUs: fastest, and loaded in half the time.
UnslothLoader uses Unsloth's patched kernels, for NVIDIA GPUs too.

Importing unsloth patches transformers and trl. So a backend is made before either is imported, and unsloth is named
here and in models/loaders/unsloth.py only.
"""

from __future__ import annotations

import logging

from fast_ft.common import environment
from fast_ft.common.errors import InputError
from fast_ft.models.loaders.base import Backend, LoadedModel
from fast_ft.models.loaders.peft import FusedLoader, PeftLoader
from fast_ft.models.loaders.unsloth import UnslothLoader
from fast_ft.recipe import schema

__all__ = ["ALONE_ONLY", "Backend", "FusedLoader", "LoadedModel", "PeftLoader", "make_loader"]

#: Said where a recipe that means Unsloth is trained by several processes.
ALONE_ONLY = "Unsloth trains in one process only: several train through PEFT, more slowly each."


def make_loader(
    model: schema.Model, lora: schema.Lora, *, seed: int, name: str | None = None, world_size: int = 1
) -> Backend:
    """Return the backend that the recipe asks for; or `name`, the one that an adapter was trained with.

    auto is recipe.card_backend where there is an NVIDIA GPU. Where our blocks do not know the model or the card, it is
    Unsloth, and where that does not import or several processes train, PEFT; the run says so.
    """
    environment.for_libraries()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a CPU kernel that it would fetch from the hub
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
        notes = [f"Not trained through our own blocks: {problem}."]
    if world_size > 1:
        peft_backend = PeftLoader(*arguments)
        peft_backend.notes += [*notes, ALONE_ONLY]
        return peft_backend
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError, RuntimeError, OSError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if wanted == "unsloth":
            raise InputError(
                f"model.backend: 'unsloth' does not import ({reason}). Install the versions in requirements.txt, "
                "or use model.backend=peft."
            ) from error
        backend: Backend = PeftLoader(*arguments)
        notes.append(f"Unsloth does not import ({reason}): the run went through PEFT, more slowly.")
    else:
        backend = UnslothLoader(*arguments)
    backend.notes += notes
    return backend
