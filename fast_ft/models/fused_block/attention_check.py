"""Does attention over packed rows say here what plain torch says, forward and backward? Asked once before training.

On a card it is a private operator of torch, whose arguments and results may change with any version, and which has
kernels of its own for each generation of cards.

Shapes: T tokens, H heads, G KV heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fast_ft.models import packed_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_TOLERANCE = 0.02  #: of the largest value
_LENGTHS = (1, 130, 17)  #: of the rows; a part of a kernel's tile, more than one, and a single token
_KV_HEADS = 2


def check(like: Tensor, group: int, head: int) -> str | None:
    """Return why attention cannot be relied on with tensors of `like`'s device and dtype, or None.

    `group` queries' heads share a key's; `head` is a head's dimension.
    """
    draw = torch.Generator(like.device).manual_seed(0)
    tokens, heads = sum(_LENGTHS), group * _KV_HEADS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=like.device).to(like.dtype)

    q, k, v, grad = (normal(1, tokens, n, head) for n in (heads, _KV_HEADS, _KV_HEADS, heads))
    ends = [sum(_LENGTHS[:n]) for n in range(len(_LENGTHS) + 1)]
    rows = packed_attention.PackedRows(
        torch.tensor([*ends, tokens], dtype=torch.int32, device=like.device), max(_LENGTHS)
    )
    try:
        out, kept = packed_attention.forward(q, k, v, rows)
        back = packed_attention.backward(grad, q, k, v, out, kept, rows)
        for made, expected in zip((out, back), _plain(q, k, v, grad, _LENGTHS), strict=True):
            difference = (made.float() - expected).abs().max() / expected.abs().max()
            if not difference.item() <= _TOLERANCE:  # a NaN, too
                return f"torch's attention differs from plain torch by {difference.item():.3g} on this card"
    except Exception as error:  # a private operator may change its arguments, or have no kernel for this card
        return f"torch's attention does not run here ({type(error).__name__}: {str(error)[:200]})"
    return None


def _plain(
    q_1THD: Tensor, k_1TGD: Tensor, v_1TGD: Tensor, grad_1THD: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the result, (1, T, H, D), and the gradients of q, k and v side by side, (T, H + 2 G, D), in fp32."""
    wide = [part[0].float().requires_grad_() for part in (q_1THD, k_1TGD, v_1TGD)]
    group = wide[0].shape[1] // wide[1].shape[1]
    mixed = []
    with torch.enable_grad():
        for q_nHD, k_nGD, v_nGD in zip(*(part.split(list(lengths)) for part in wide), strict=True):
            k_nHD, v_nHD = (part.repeat_interleave(group, dim=1) for part in (k_nGD, v_nGD))
            score_Hnn = torch.einsum("qhd,khd->hqk", q_nHD, k_nHD) * q_nHD.shape[2] ** -0.5
            later_nn = torch.ones_like(score_Hnn[0], dtype=torch.bool).triu(1)
            weight_Hnn = score_Hnn.masked_fill(later_nn, float("-inf")).softmax(dim=-1)
            mixed.append(torch.einsum("hqk,khd->qhd", weight_Hnn, v_nHD))
        out_THD = torch.cat(mixed)
        grads = torch.autograd.grad(out_THD, wide, grad_1THD[0].float())
    return out_THD.detach()[None], torch.cat(grads, dim=1)
