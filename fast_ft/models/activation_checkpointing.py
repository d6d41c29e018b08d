"""Layers whose activations are not kept but computed again in the backward pass, to save memory.

Such a layer keeps its input only. Nothing here waits for the device, so a pass with such layers can be captured in a
CUDA graph; random states are kept only where a layer draws (dropout), and then it cannot be captured.
"""

from __future__ import annotations

from functools import partial
from typing import Any


def recompute(model: Any, count: int) -> None:
    """Let the first `count` decoder layers of a PEFT model keep their input only; 0: all layers keep everything.

    The first ones: when the backward pass comes to them, what the later ones kept is free again, and what is computed
    again lies where that was.
    """
    layers = model.get_base_model().model.layers
    random = has_dropout(model)
    for index, layer in enumerate(layers):
        former = layer.__dict__.get("forward")
        if isinstance(former, partial) and former.func is _again:
            del layer.forward  # the class's own shows again, if nothing else stood in its place
            if former.args[0] != layer.forward:
                layer.forward = former.args[0]
        if index < count:
            layer.forward = partial(_again, layer.forward, random)


def has_dropout(model: Any) -> bool:
    """Return whether the model's layers draw random numbers in training, as dropout does."""
    return any(module.p > 0 for module in model.modules() if type(module).__name__ == "Dropout")


def _again(forward: Any, random: bool, hidden: Any, *given: Any, **named: Any) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(hidden, *given, **named)
    return checkpoint(forward, hidden, *given, use_reentrant=False, preserve_rng_state=random, **named)
