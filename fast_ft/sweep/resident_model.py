"""A base model that stays loaded while adapters come and go: a worker trains and answers with it, trial after trial.

A trial must not see that another was before it. So what a trial changes on the model is taken back (models/patches.py),
and the adapter's first weights are kept from when a fresh loader made them, and put back. An adapter of another shape
or seed is made by that loader again, over the base without one. The tests compare first loss, gradients and the whole
training with a fresh process, to the last bit on a CPU.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fast_ft.common import gpu, out_of_memory
from fast_ft.models import lora_files
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel, LoaderBase
from fast_ft.models.patches import ModelPatches
from fast_ft.plan.ways import ways
from fast_ft.recipe.schema import Lora, Model, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


@dataclass
class ResidentModel(LoadedModel):
    """A loaded model that outlives its trial. `patches` are what the trial changes on it."""

    def free(self) -> None:
        """Keep the model; take back what the trial changed on it, and give back the gradients' memory."""
        self.patches.undo()
        for weight in self.model.parameters():
            weight.grad = None
        out_of_memory.release()  # trainers hold themselves in cycles


class ResidentLoader:
    """A Loader whose base model is loaded once. `use` tells it the next trial's recipe."""

    def __init__(self) -> None:
        self.name = ""
        self.notes: list[str] = []
        self._loader: LoaderBase  # from the first `use` on
        self._wanted: tuple[Model, tuple[str, ...]] | None = None
        self._capability = gpu.capability()
        self._loaded: LoadedModel | None = None
        self._trial = ModelPatches()
        self._adapter: tuple[Lora, int] | None = None
        self._first: dict[str, Tensor] = {}  # the adapter's weights before any step, on the CPU
        self.seconds = 0.0  #: spent on importing and loading, all in all

    def use(self, recipe: Recipe) -> ResidentLoader:
        """Make ready for this recipe; another base model takes the place of the one that is loaded."""
        names = ways(recipe, self._capability).names
        wanted = (recipe.model, names)
        if wanted != self._wanted:
            self.forget()
            started = time.monotonic()
            self._loader = choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, ways=names)
            self._wanted, self.name = wanted, self._loader.name
            self.seconds += time.monotonic() - started
        self._loader.lora, self._loader.seed = recipe.lora, recipe.seed
        self.notes = self._loader.notes
        return self

    def forget(self) -> None:
        """Give the base model's memory back."""
        gc.unfreeze()  # the base was set apart from collections, and lies in reference cycles
        if self._loaded is not None:
            self._loaded.free()
        self._loaded, self._adapter, self._wanted, self._first = None, None, None, {}
        self._trial = ModelPatches()

    def for_training(self, adapter: Path | None = None) -> ResidentModel:
        """Return the model with the recipe's adapter as a fresh process makes it, or with one in a folder."""
        loaded = self._fresh()
        if adapter is not None:
            lora_files.load(loaded.model, adapter / "adapter_model.safetensors")
        loaded.model.train()
        return loaded

    def for_generation(self, adapter: Path) -> ResidentModel:
        """Return the model with the adapter in a folder, ready to answer.

        Raises:
            InputError: the folder holds no adapter, or one that does not fit the base model.
        """
        lora_files.check(adapter, self._loader.folder)
        loaded = self._fresh()
        lora_files.load(loaded.model, adapter / "adapter_model.safetensors")
        loaded.model.eval()
        return loaded

    def _fresh(self) -> ResidentModel:
        """Return the model as a fresh process has it after loading, with the recipe's adapter before any step."""
        wanted = (self._loader.lora, self._loader.seed)
        if self._loaded is None:
            self._loaded = self._load()
        else:
            out_of_memory.release()  # a trial that failed has left its trainer
            self._trial.undo()  # and what it changed
            if wanted == self._adapter:
                self._put_first_weights_back(self._loaded.model)
            else:
                self._renew_adapter(self._loaded)
        loaded, model = self._loaded, self._loaded.model
        if wanted != self._adapter:
            self._adapter = wanted
            self._first = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._trial = loaded.patches.group()
        self._trial.remember(model, "forward")  # each trainer wraps it once more
        for layer in _repacked_layers(loaded):
            self._trial.keep_4bit(layer)
        return ResidentModel(
            model,
            loaded.open_tokenizer,
            loaded.backend,
            loaded.device,
            loaded.dtype,
            loaded.notes,
            self._trial,
            loaded.general,
        )

    def _load(self) -> LoadedModel:
        started = time.monotonic()
        loaded = self._loader.for_training()
        self.seconds += time.monotonic() - started
        gc.collect()
        gc.freeze()  # libraries and base stay: each trial's collections need not walk them, half a second each
        return loaded

    def _renew_adapter(self, loaded: LoadedModel) -> None:
        """Take the adapter off the base and let the loader add another, as it does after loading."""
        lora_files.put_whole_modules_back(loaded.model)
        base = loaded.model.unload()
        loaded.patches.undo()  # our blocks hold the adapter before
        loaded.model = self._loader.with_adapter(base, loaded.patches)

    def _put_first_weights_back(self, model: PeftModel) -> None:
        import torch

        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    weight.copy_(self._first[name])
                    weight.grad = None


def _repacked_layers(loaded: LoadedModel) -> list[nn.Module]:
    """Return all 4-bit layers on a CPU.

    With AVX-512 bitsandbytes packs them again, in bfloat16, at the first pass in evaluation mode, and back, not quite
    to what they were, when a state_dict is taken.
    """
    if loaded.device != "cpu":
        return []
    return [m for m in loaded.model.modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None]
