"""A base model that stays loaded while adapters come and go: what a worker trains and answers with, trial after trial.

A trial must not see that another was before it. So the adapter's first weights are kept from when a fresh backend made
them, and put back; an adapter of another shape or seed is made by that backend again, over the base without one. The
tests compare first loss, gradients and the whole training with a fresh process, to the last bit on a CPU.
"""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fast_ft.common import out_of_memory
from fast_ft.models import lora_files
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.recipe.schema import Model, Recipe, card_backend


@dataclass
class ResidentModel(LoadedModel):
    """A loaded model that outlives its trial."""

    def free(self) -> None:
        """Keep it; only the gradients' memory is given back."""
        for weight in self.model.parameters():
            weight.grad = None
        out_of_memory.release()  # trainers hold themselves in cycles


class ResidentLoader:
    """A Backend (see models/loaders/choose.py) whose base model is loaded once. `use` tells it the next trial's
    recipe.
    """

    def __init__(self) -> None:
        self.name = ""
        self.notes: list[str] = []
        self._maker: Any = None
        self._wanted: tuple[Model, str] | None = None
        self._loaded: LoadedModel | None = None
        self._adapter: tuple[Any, ...] | None = None
        self._first: dict[str, Any] = {}  # the adapter's weights before any step, on the CPU
        self._forward: Any = None
        self._base: list[tuple[Any, Any, Any]] = []
        self.seconds = 0.0  #: spent on importing and loading, all in all

    def use(self, recipe: Recipe) -> ResidentLoader:
        """Make ready for this recipe; another base model takes the place of the one that is loaded."""
        wanted = (recipe.model, card_backend(recipe.model, recipe.lora))
        if wanted != self._wanted:
            self.forget()
            started = time.monotonic()
            self._maker = choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed)
            self._wanted, self.name = wanted, self._maker.name
            self.seconds += time.monotonic() - started
        self._maker.lora, self._maker.seed = recipe.lora, recipe.seed
        self.notes = self._maker.notes
        return self

    def forget(self) -> None:
        """Give the base model's memory back."""
        gc.unfreeze()  # the base was set apart from collections, and lies in reference cycles
        if self._loaded is not None:
            self._loaded.free()
        self._loaded, self._adapter, self._wanted, self._first, self._base = None, None, None, {}, []
        self._forward = None

    def for_training(self, adapter: Path | None = None) -> LoadedModel:
        """Return the model with the recipe's adapter as a fresh process makes it, or with one in a folder."""
        loaded = self._fresh()
        if adapter is not None:
            lora_files.load(loaded.model, adapter / "adapter_model.safetensors")
        loaded.model.train()
        return self._lent(loaded)

    def for_generation(self, adapter: Path) -> LoadedModel:
        """Return the model with the adapter in a folder, ready to answer."""
        lora_files.check(adapter, self._maker.folder)
        loaded = self._fresh()
        lora_files.load(loaded.model, adapter / "adapter_model.safetensors")
        loaded.model.eval()
        return self._lent(loaded)

    def _lent(self, loaded: LoadedModel) -> LoadedModel:
        return ResidentModel(loaded.model, loaded.tokenizer, loaded.backend, loaded.device, loaded.dtype, loaded.notes)

    def _fresh(self) -> LoadedModel:
        lora = self._maker.lora
        shape = (lora, self._maker.seed)
        if self._loaded is not None:
            out_of_memory.release()  # a trial that failed has left its trainer
        else:
            started = time.monotonic()
            self._loaded = self._maker.for_training()
            self.seconds += time.monotonic() - started
            self._base = _packed(self._loaded)
            gc.collect()
            gc.freeze()  # libraries and base stay: each trial's collections need not walk them, half a second each
        _put_base_back(self._base)
        if self._adapter is None:
            pass
        elif shape != self._adapter:
            self._renew(self._loaded)
        else:
            self._put_back(self._loaded.model)
            return self._loaded
        self._adapter, model = shape, self._loaded.model
        self._first = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._forward = model.__dict__.get("forward")
        return self._loaded

    def _renew(self, loaded: LoadedModel) -> None:
        """Take the adapter off the base and let the backend add another, as it does after loading."""
        loaded.model = self._maker.with_adapter(_stripped(loaded.model.unload()))

    def _put_back(self, model: Any) -> None:
        """Put the adapter's first weights back in place."""
        import torch

        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    weight.copy_(self._first[name])
                    weight.grad = None
        model.__dict__.pop("forward", None)  # each trainer wraps it once more
        if self._forward is not None:
            model.forward = self._forward


def _packed(loaded: LoadedModel) -> list[tuple[Any, Any, Any]]:
    """Return (module, weights, scales) of all 4-bit layers on a CPU.

    With AVX-512 bitsandbytes packs them anew, in bfloat16, at the first pass in evaluation mode, and back, not quite to
    what they were, when a state_dict is taken. Tensors are replaced, not written into, so holding them is enough.
    """
    if loaded.device != "cpu":
        return []
    found = [m for m in loaded.model.modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None]
    return [(module, module.weight.data, copy.copy(module.weight.quant_state)) for module in found]


def _put_base_back(packed: list[tuple[Any, Any, Any]]) -> None:
    for module, weights, scales in packed:
        module.weight.data, module.weight.quant_state = weights, copy.copy(scales)
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = module.weight.quant_state


def _stripped(base: Any) -> Any:
    """Take off the base what an adapter left on it: PEFT would warn of a second one, blocks hold the first one's."""
    for name in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(name, None)
    for layer in base.model.layers:
        if "forward" in layer.__dict__:
            layer.forward = _bare(layer.forward)
    return base


def _bare(forward: Any) -> Any:
    """Return a layer's forward without recomputation (models/activation_checkpointing.py) and blocks
    (models/fused_block/block.py) around it.
    """
    while isinstance(forward, partial) or hasattr(forward, "former"):
        forward = forward.args[0] if isinstance(forward, partial) else forward.former
    return forward
