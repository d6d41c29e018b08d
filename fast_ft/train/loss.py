"""The loss over trained tokens, from hidden states, without ever holding all logits.

Shapes: N positions, C positions of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fast_ft.models.fused_block import ops_torch

_CHUNK = 1024  #: positions whose logits exist at a time: 1,024 x 32,000 in fp16 are 0.06 GiB


def response_loss(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ops: ModuleType = ops_torch) -> Tensor:
    """Return the cross-entropy in nats, summed over the positions whose target is not IGNORE_INDEX: a 0-d fp32 tensor.

    `weight_VD` is the head; it gets a gradient where it is trained. `target_N` holds token ids, or IGNORE_INDEX, which
    is negative. `ops` is the module whose `cross_entropy_` is used (models/fused_block/dispatch.py).
    """
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return ResponseLoss.apply(hidden_ND, weight_VD, target_N, ops)


class ResponseLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, so that logits need not be kept.

    Logits exist for 1,024 positions at a time, all in the same buffer, and their gradients are written over them.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ops: ModuleType) -> Tensor:
        """Return the summed loss, and keep the gradients of `hidden_ND` and of a trained `weight_VD` for `backward`."""
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_VD = weight_VD.new_zeros(weight_VD.shape) if ctx.needs_input_grad[1] else None
        if grad_VD is not None:  # a head in fp32 that is trained is multiplied in the pass's own dtype
            weight_VD = weight_VD.to(hidden_ND.dtype)
        gradient_ND = torch.empty(hidden_ND.shape, dtype=weight_VD.dtype, device=hidden_ND.device)
        buffer_CV = weight_VD.new_empty(min(_CHUNK, len(hidden_ND)), len(weight_VD))
        for start in range(0, len(hidden_ND), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits_CV = buffer_CV[: len(target_N[part])]
            torch.mm(hidden_ND[part].to(logits_CV.dtype), weight_VD.t(), out=logits_CV)
            total += ops.cross_entropy_(logits_CV, target_N[part]).sum()  # the logits are their gradients now
            torch.mm(logits_CV, weight_VD, out=gradient_ND[part])
            if grad_VD is not None:
                grad_VD.addmm_(logits_CV.t().to(grad_VD.dtype), hidden_ND[part].to(grad_VD.dtype))
        ctx.save_for_backward(gradient_ND, grad_VD)
        ctx.dtype = hidden_ND.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Return the gradients of `hidden_ND` and of a trained `weight_VD`, times the gradient of the loss (0-d)."""
        gradient_ND, grad_VD = ctx.saved_tensors
        grad = (gradient_ND * outer[0]).to(ctx.dtype)
        return grad, None if grad_VD is None else grad_VD * outer[0], None, None
