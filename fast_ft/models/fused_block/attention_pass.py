"""Attention over packed rows as autograd sees it, for layers that are not ours.

torch's own formula for the gradient of its memory-efficient attention forgets the window.

Shapes: T tokens, H heads, G KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.function import FunctionCtx


class AttentionPass(torch.autograd.Function):
    """A forward and a backward pass of packed_attention, from (1, T, H or G, D)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor, ...]],
    ) -> Tensor:  # fmt: skip
        """Return attention's result, (1, T, H, D), and keep what `backward` needs."""
        out_THD, kept = forward(q_THD, k_TGD, v_TGD)
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, out_THD, *kept)
        ctx.function = backward
        return out_THD

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q_THD, k_TGD, v_TGD, out_THD, *kept = ctx.saved_tensors
        made = ctx.function(grads[0].contiguous(), q_THD, k_TGD, v_TGD, out_THD, tuple(kept))
        return (*(each[None] for each in made), None, None)
