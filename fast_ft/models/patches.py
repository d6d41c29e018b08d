"""What is changed on a model after it was loaded, held in one place so that it can be taken back.

Training replaces the forward pass of layers (our blocks, recomputed activations), hangs hooks on the embeddings, and
lets other libraries do the same: accelerate wraps the model's forward, TRL casts the adapter's weights, bitsandbytes
packs 4-bit weights again on a CPU. A sweep trains many adapters over one model, so each trial must find the model as
the first one did. Whoever changes a model tells its `LoadedModel.patches`:

    patches = loaded.patches.group()                 # the changes of one owner, which can be taken back alone
    patches.replace(layer, "forward", new)
    patches.hook(module.register_forward_hook(new))
    patches.remember(model, "forward")               # before another library replaces it
    patches.keep(weight)                             # before another library puts other numbers in its place
    patches.undo()                                   # the newest change first

Weights that only move in memory keep their values: models/weight_layout.py moves them, and nothing is taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from torch import nn

_ABSENT = object()


class Handle(Protocol):
    """What torch returns for a hook."""

    def remove(self) -> None:
        """Take the hook off its module."""


class ModelPatches:
    """The changes that were made to a model, oldest first. `undo` takes them back and forgets them."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def group(self) -> ModelPatches:
        """Return a group of changes within these: it can be undone alone, and is undone with these."""
        made = ModelPatches()
        self._undo.append(made.undo)
        return made

    def replace(self, module: nn.Module, name: str, new: object) -> None:
        """Give this module an attribute of its own, such as another `forward`."""
        self.remember(module, name)
        setattr(module, name, new)

    def remember(self, module: nn.Module, *names: str) -> None:
        """Remember these attributes of a module, or that it has none of its own, before a library replaces them."""
        for name in names:
            former = module.__dict__.get(name, _ABSENT)
            self._undo.append(lambda name=name, former=former: _put_back(module, name, former))  # type: ignore[misc]

    def hook(self, handle: Handle) -> None:
        """Take note of a hook."""
        self._undo.append(handle.remove)

    def keep(self, weight: nn.Parameter) -> None:
        """Remember which memory a weight lies in, before a library points it at a copy with other numbers."""
        data = weight.data

        def put_back() -> None:
            """Point the weight at its memory again."""
            weight.data = data

        self._undo.append(put_back)

    def keep_4bit(self, layer: Linear4bit) -> None:
        """Remember the weights and scales of a layer of bitsandbytes, which replaces both when it packs them again."""
        data, state = layer.weight.data, copy.copy(layer.weight.quant_state)

        def put_back() -> None:
            """Let the layer have both again. bitsandbytes changes the scales in place, so they are copied."""
            layer.weight.data, layer.weight.quant_state = data, copy.copy(state)
            if getattr(layer, "quant_state", None) is not None:
                layer.quant_state = layer.weight.quant_state

        self._undo.append(put_back)

    def undo(self) -> None:
        """Take every change back, the newest first. What a library put over a change goes with it."""
        while self._undo:
            self._undo.pop()()


def _put_back(module: nn.Module, name: str, former: object) -> None:
    if former is not _ABSENT:
        setattr(module, name, former)
    elif name in module.__dict__:
        delattr(module, name)
