"""What lies between a block's products, in plain torch: for CPUs, and the reference for ops_triton.py.

Shapes: T tokens, E hidden, N heads that are rotated, D head dimension, M inner size of the MLP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fast_ft.models import nf4

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 128  #: positions whose exponents are summed at a time: torch makes copies of their logits


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, room: int = 0) -> tuple[Tensor, Tensor]:
    """Return (the norm, TE, and `room` columns of zeros; 1 / the root mean square of each row, fp32 T)."""
    x32_TE = x_TE.float()
    scale_T = (x32_TE.square().mean(dim=-1) + eps).rsqrt()
    return _with_room((x32_TE * scale_T[:, None]).to(x_TE.dtype) * weight_E, room), scale_T


def rms_norm_backward(
    grad_TE: Tensor, x_TE: Tensor, weight_E: Tensor, scale_T: Tensor, residual_TE: Tensor, room: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (the gradient of x, TE, and `room` columns of zeros; the norm, TE).

    The gradient is what comes through the norm, and `residual_TE`, which went past it.
    """
    unit_TE = x_TE.float() * scale_T[:, None]
    inner_TE = grad_TE.float() * weight_E.float()
    through_TE = (inner_TE - unit_TE * (inner_TE * unit_TE).mean(dim=-1, keepdim=True)) * scale_T[:, None]
    return _with_room(residual_TE + through_TE.to(x_TE.dtype), room), unit_TE.to(x_TE.dtype) * weight_E


def rotate_(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotate each head by its token's angles, in place."""
    cos, sin, x = cos_TD[:, None].float(), sin_TD[:, None].float(), x_TND.float()
    x_TND.copy_(x * cos + _turned(x) * sin)


def rotate_back(
    dq_THD: Tensor, dk_TGD: Tensor, dv_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor, room: int = 0
) -> Tensor:
    """Return gradients of q and k before `rotate_`, and that of v, side by side, TN, and `room` columns of zeros."""
    cos, sin = cos_TD[:, None].float(), sin_TD[:, None].float()
    both = torch.cat((dq_THD, dk_TGD), dim=1).float()
    before = (both * cos - _turned(both) * sin).to(dv_TGD.dtype)
    return _with_room(torch.cat((before, dv_TGD), dim=1).flatten(1), room)


def _turned(x_TND: Tensor) -> Tensor:
    half = x_TND.shape[-1] // 2
    return torch.cat((-x_TND[..., half:], x_TND[..., :half]), dim=-1)


def _with_room(x_TE: Tensor, room: int) -> Tensor:
    return torch.nn.functional.pad(x_TE, (0, room)) if room else x_TE


def swiglu(gate_up_T2M: Tensor, room: int = 0) -> Tensor:
    """Return silu(gate) * up, TM, and `room` columns of zeros."""
    gate, up = gate_up_T2M.chunk(2, dim=-1)
    return _with_room((gate.float() * gate.float().sigmoid()).to(gate.dtype) * up, room)


def swiglu_backward_(gate_up_T2M: Tensor, grad_TM: Tensor) -> None:
    """Put the gradients of gate and up in their places, and swiglu's own result in the gradient's."""
    gate, up = (part.float() for part in gate_up_T2M.chunk(2, dim=-1))
    grad, share = grad_TM.float(), gate.sigmoid()
    inner = gate.shape[-1]
    both = (grad * up * share * (1 + gate * (1 - share)), grad * gate * share)
    result_TM = (gate * share).to(grad_TM.dtype) * up.to(grad_TM.dtype)  # before gate and up are written over
    gate_up_T2M[:, :inner], gate_up_T2M[:, inner:] = both
    grad_TM.copy_(result_TM)


def cross_entropy_(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Return each position's cross-entropy in nats, fp32 C; put the gradients of the logits in their places.

    Both are 0 where the target is negative. One copy of the logits in fp32 is made.
    """
    kept_C, index_C1 = target_C >= 0, target_C.clamp(min=0)[:, None]
    p_CV = logits_CV.float()  # logits still; themselves, where they are in fp32
    norm_C = torch.cat([torch.logsumexp(few_CV, dim=-1) for few_CV in p_CV.split(_FEW)])
    loss_C = (norm_C - p_CV.gather(1, index_C1)[:, 0]) * kept_C
    p_CV.sub_(norm_C[:, None]).exp_()
    p_CV.scatter_(1, index_C1, p_CV.gather(1, index_C1) - 1)
    logits_CV.copy_(p_CV.mul_(kept_C[:, None]))
    return loss_C


def unpack(
    packed: Tensor, scale: Tensor, nested: tuple[Tensor, Tensor, Tensor] | None, out: Tensor,
    lora: Tensor | None = None, place: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the weights that `packed` (bytes of two NF4 codes, the upper half first) holds to `out`, row by row.

    `scale` is fp32, one for 64 weights; or, with `nested`, bytes: see `scales`. With `lora`, copy it to `place`, too.
    """
    scale = scale if nested is None else scales(scale, nested)
    code = torch.tensor(nf4.CODES, device=packed.device)
    nibbles = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=1)
    out.copy_((code[nibbles.long()].view(-1, 64) * scale.view(-1, 1)).view(out.shape))
    if lora is not None and place is not None:
        place.copy_(lora)


def scales(scale: Tensor, nested: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the blocks' scales, fp32, of bytes that are quantised themselves.

    `nested` is (the number that each byte stands for, 256; the scale, and the offset, of each group of 256 bytes).
    """
    scale_code, group_scale, group_offset = nested
    group = torch.arange(scale.numel(), device=scale.device) // 256
    return scale_code[scale.long()] * group_scale[group] + group_offset[group]
