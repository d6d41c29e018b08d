"""AdamW over the adapter's weights, and the learning rate's schedule over one stage or several."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fast_ft.models import weight_layout
from fast_ft.recipe import schema
from fast_ft.recipe.steps import warmup_steps


class FlatWeights:
    """The adapter's weights as one flat parameter, and their gradients as another tensor; the model's own are views.

    An optimizer over it launches one kernel a step in place of one for each of some hundred matrices.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = [p for p in model.parameters() if p.requires_grad]
        whole = weight_layout.flatten(self._weights)
        self.parameter, self.gradient = nn.Parameter(whole), torch.zeros_like(whole)
        sizes = [p.numel() for p in self._weights]
        parts = zip(self._weights, self.gradient.split(sizes), strict=True)
        self._gradients = [part.view_as(weight) for weight, part in parts]

    def zero_gradients(self) -> None:
        """Set all gradients to 0, in place: a CUDA graph adds to these tensors."""
        self.gradient.zero_()
        self.parameter.grad = self.gradient
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient

    def clip(self, most: float) -> Tensor:
        """Scale the gradient down to a norm of at most `most`; return its norm before (0-d), which nobody waits for."""
        norm = torch.linalg.vector_norm(self.gradient)
        if most < math.inf:
            self.gradient.mul_((most / (norm + 1e-6)).clamp(max=1.0))
        return norm


def make_optimizer(flat: FlatWeights, section: schema.Train) -> Optimizer:
    """Return a new AdamW over the adapter's weights. All of them decay, as in Trainer: none is a bias or a norm."""
    weights = [flat.parameter]
    arguments: dict[str, Any] = {"lr": section.learning_rate, "weight_decay": section.weight_decay}
    arguments |= {"betas": (0.9, 0.999), "eps": 1e-8}  # spelled out: libraries' defaults differ
    if section.optim == "adamw_8bit":
        from fast_ft.train.adamw_8bit import AdamW8bit

        return AdamW8bit(weights, **arguments)
    return torch.optim.AdamW(weights, fused=flat.parameter.is_cuda, **arguments)


def decides_on_device(optimizer: Optimizer) -> bool:
    """Return whether this optimizer skips a step where its `found_inf`, on the device, says so; else the host does."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))  # what torch's GradScaler asks


def make_scheduler(
    optimizer: Optimizer,
    section: schema.Train,
    learning_rate: float,
    total: int,
    start: int,
    scale: Callable[[int], float] = lambda step: 1.0,
) -> LambdaLR:
    """Return transformers' schedule over `total` steps, standing at step `start`, with this peak learning rate.

    `scale(step)` is one more factor on the rate; its steps are counted from `start`.
    """
    import transformers

    shape = transformers.get_scheduler(
        section.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
        num_warmup_steps=min(warmup_steps(section, total), total),
        num_training_steps=total,
    )
    factor = shape.lr_lambdas[0] if hasattr(shape, "lr_lambdas") else lambda _: 1.0
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # else LambdaLR keeps the peak of the stage before
        group["lr"] = learning_rate
    return LambdaLR(optimizer, lambda step: factor(start + step) * scale(step))
