"""Layers whose activations are not kept but computed again in the backward pass, to save memory.

Such a layer keeps its input only. Nothing here waits for the device, so a pass with such layers can be captured in a
CUDA graph. Random states are kept only where a layer draws random numbers (dropout); such a pass cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fast_ft.models.base_layers import decoder_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from fast_ft.models.patches import ModelPatches


def recompute(model: PeftModel, count: int, patches: ModelPatches) -> None:
    """Let the first `count` decoder layers of a model keep their input only, until `patches` is undone.

    The first layers are chosen because the backward pass comes to them last: what the later layers kept is free again
    by then, and what is computed again lies in its place.
    """
    keep_random_state = has_dropout(model)
    for layer in decoder_layers(model)[:count]:
        patches.replace(layer, "forward", partial(_checkpointed, layer.forward, keep_random_state))


def has_dropout(model: PeftModel) -> bool:
    """Return whether the model's layers draw random numbers in training."""
    return any(module.p > 0 for module in model.modules() if type(module).__name__ == "Dropout")


def _checkpointed(
    forward: Callable[..., Any], keep_random_state: bool, hidden_BTE: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Call a layer's `forward`; where gradients are wanted, keep its input only."""
    import torch
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(hidden_BTE, *args, **kwargs)
    return checkpoint(forward, hidden_BTE, *args, use_reentrant=False, preserve_rng_state=keep_random_state, **kwargs)
