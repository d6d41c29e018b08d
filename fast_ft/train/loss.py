"""The loss over trained tokens, from hidden states, without ever holding all logits.

Shapes: N positions, C positions of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fast_ft.data.encoding import IGNORE_INDEX

_CHUNK = 1024  #: positions whose logits exist at a time: 1,024 x 32,000 in fp32 are 0.12 GiB


def response_loss(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Return the cross-entropy in nats, summed over the positions whose target is not IGNORE_INDEX: a 0-d fp32 tensor.

    `weight_VD` is the head; it gets a gradient where it is trained. `target_N` holds token ids.
    """
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return ResponseLoss.apply(hidden_ND, weight_VD, target_N)


class ResponseLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, so that logits need not be kept.

    Logits exist for 1,024 positions at a time, in fp32. All chunks use the same two buffers: memory peaks here.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        """Return the summed loss, and keep the gradients of `hidden_ND` and of a trained `weight_VD` for `backward`."""
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_VD = weight_VD.new_zeros(weight_VD.shape) if ctx.needs_input_grad[1] else None
        if grad_VD is not None:  # a head in fp32 that is trained is multiplied in the pass's own dtype
            weight_VD = weight_VD.to(hidden_ND.dtype)
        gradient_ND = torch.empty(hidden_ND.shape, dtype=weight_VD.dtype, device=hidden_ND.device)
        raw = weight_VD.new_empty(min(_CHUNK, len(hidden_ND)), len(weight_VD))
        wide = raw if raw.dtype == torch.float32 else raw.new_empty(raw.shape, dtype=torch.float32)
        for start in range(0, len(hidden_ND), _CHUNK):
            part = slice(start, start + _CHUNK)
            kept_C = target_N[part] != IGNORE_INDEX
            index_C1 = target_N[part].clamp(min=0)[:, None]
            raw_CV, p_CV = raw[: len(kept_C)], wide[: len(kept_C)]
            torch.mm(hidden_ND[part].to(raw.dtype), weight_VD.t(), out=raw_CV)
            p_CV.copy_(raw_CV)  # logits still
            norm_C = torch.cat([torch.logsumexp(few_CV, dim=-1) for few_CV in p_CV.split(_CHUNK // 8)])
            total += ((norm_C - p_CV.gather(1, index_C1)[:, 0]) * kept_C).sum()
            p_CV.sub_(norm_C[:, None]).exp_()
            p_CV.scatter_(1, index_C1, p_CV.gather(1, index_C1) - 1)
            raw_CV.copy_(p_CV.mul_(kept_C[:, None]))
            torch.mm(raw_CV, weight_VD, out=gradient_ND[part])
            if grad_VD is not None:
                grad_VD.addmm_(raw_CV.t().to(grad_VD.dtype), hidden_ND[part].to(grad_VD.dtype))
        ctx.save_for_backward(gradient_ND, grad_VD)
        ctx.dtype = hidden_ND.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients of `hidden_ND` and of a trained `weight_VD`, times the gradient of the loss (0-d)."""
        gradient_ND, grad_VD = ctx.saved_tensors
        return (gradient_ND * outer[0]).to(ctx.dtype), None if grad_VD is None else grad_VD * outer[0], None
