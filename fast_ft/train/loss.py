"""The loss over trained tokens, from hidden states, without ever holding all logits."""

from __future__ import annotations

from typing import Any

from fast_ft.data.encoding import IGNORE_INDEX

_CHUNK = 1024  #: positions whose logits exist at a time: 1,024 x 32,000 in fp32 are 0.12 GiB


def response_loss(hidden: Any, weight: Any, target: Any) -> Any:
    """Return the cross-entropy summed over the positions whose target is not IGNORE_INDEX, a 0-d fp32 tensor.

    `hidden` (N, D) goes through the head `weight` (V, D); `target` (N,) holds ids. Logits exist for 1,024 positions at
    a time, in fp32, and their gradient is computed at once, so that they need not be kept. `weight` gets none. All
    of them pass through the same two buffers: this is where memory peaks.
    """
    import torch

    class ResponseLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_ND: Any, weight_VD: Any, target_N: Any) -> Any:
            total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
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
            ctx.save_for_backward(gradient_ND)
            ctx.dtype = hidden_ND.dtype
            return total

        @staticmethod
        def backward(ctx: Any, *outer: Any) -> Any:
            (gradient_ND,) = ctx.saved_tensors
            return (gradient_ND * outer[0]).to(ctx.dtype), None, None

    with torch.autocast(hidden.device.type, enabled=False):
        return ResponseLoss.apply(hidden, weight, target)
