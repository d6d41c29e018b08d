"""What lies between a layer's products, in plain torch: on a CPU, and where the kernels of ops_triton.py do not work.

Both modules have the same functions, but for `packed_attention`, which is ops_triton.py's alone. `order` means nothing
here. Both round as transformers' Llama does.

Shapes: S rows, T tokens, H heads, G KV heads, D head dimension, E columns, C columns of the cache, W pages.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.first_half import FirstHalf
from fast_ft.generate.engine.kv_cache import dequantised, quantised, spreading
from fast_ft.models.nf4 import Order
from fast_ft.models.packed_attention import window_mask

COLUMNS = 256  #: a captured step of `paged_attention` copies a multiple of this number of cells of each row
FUSES = False  #: a first half is a product of its own anyway
PACKED = False  #: whether `packed_attention` is here


def rope(position_T: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin as `rotate_into_cache` takes them."""
    angle_TD = (position_T[:, None].float() * frequencies).repeat(1, 2)[:, None]
    cos, sin = (angle_TD.cos() * scale).to(dtype), angle_TD.sin() * scale
    half = len(frequencies)
    return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).to(dtype)


def rotate_into_cache(
    qkv: Tensor, heads: int, cos_sin: tuple[Tensor, Tensor], cell_T: Tensor, keys: Tensor, values: Tensor,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Turn q and k by rope, write k and v to their cells of (cells, G, D), and return q, k, v: THD, TGD, TGD.

    With `scales` (2, 2, cells, G) the cells hold 8 bits, and q and k are turned by `spreading` too; what is returned is
    as exact as without.
    """
    cos, sin = cos_sin
    qkv_THD = qkv.view(len(qkv), -1, keys.shape[-1])
    rotated = heads + keys.shape[1]
    qk_THD = qkv_THD[:, :rotated]
    qk_THD = torch.addcmul(qk_THD * cos, qk_THD.roll(qk_THD.shape[-1] // 2, dims=-1), sin)
    if scales is not None:
        qk_THD = qk_THD @ spreading(qk_THD.shape[-1], qk_THD.dtype, qk_THD.device)
    q, k, v = qk_THD[:, :heads], qk_THD[:, heads:], qkv_THD[:, rotated:]
    for index, (part, fresh) in enumerate(((keys, k), (values, v))):
        if scales is None:
            part.index_copy_(0, cell_T, fresh)
        else:
            fresh_TGD, fresh_scales = quantised(fresh)
            part.index_copy_(0, cell_T, fresh_TGD)
            scales[index].index_copy_(1, cell_T, fresh_scales)
    return q, k, v


def paged_attention(
    q_SHD: Tensor,
    keys: Tensor,
    values: Tensor,
    table_SW: Tensor,
    length_S: Tensor,
    *,
    columns: int,
    order: Order = Order.ROWS,
    window: int | None = None,
    scales: Tensor | None = None,
    first: FirstHalf | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of one token of each row over its first `length_S` + 1 cells, its own included; SE.

    Of these it sees the last `window`; None: all. `columns`, a multiple of PAGE, is at least the longest row's. Each
    row's pages are copied side by side. `scales` (2, 2, cells, G) are those of 8-bit keys and values. x A is written
    where `first` asks for it. `splits` means nothing here.
    """
    page_T = table_SW[:, : columns // PAGE].flatten()
    column_C = torch.arange(columns, device=table_SW.device)
    hidden_SC = column_C > length_S[:, None]
    if window is not None:
        hidden_SC |= column_C <= length_S[:, None] - window

    def side_by_side(part: Tensor) -> Tensor:
        paged = part.view(-1, PAGE, *part.shape[1:])
        return paged.index_select(0, page_T).view(len(q_SHD), columns, *part.shape[1:])

    k_SCGD, v_SCGD = side_by_side(keys), side_by_side(values)
    if scales is not None:
        k_SCGD, v_SCGD = (
            dequantised(part, torch.stack([side_by_side(each) for each in of_part]), q_SHD.dtype)
            for part, of_part in zip((k_SCGD, v_SCGD), scales, strict=True)
        )
    for part_SCGD in (k_SCGD, v_SCGD):  # what a cell held before must not count, not even as 0 * NaN
        if part_SCGD.is_cuda:
            part_SCGD.masked_fill_(hidden_SC[..., None, None], 0.0)
            continue
        for part_CGD, length in zip(part_SCGD, length_S.tolist(), strict=True):  # faster there than a mask
            part_CGD[length + 1 :].zero_()
            if window is not None:
                part_CGD[: max(0, length + 1 - window)].zero_()
    mixed_SE = _sdpa(q_SHD[:, None], k_SCGD, v_SCGD, mask=~hidden_SC[:, None, None])[:, 0].flatten(1)
    return _with_first(mixed_SE, first)


def causal(q_THD: Tensor, keys_TGD: Tensor, values_TGD: Tensor, window: int | None = None) -> Tensor:
    """Attention of a row's last T tokens over all of it, each over the last `window` up to itself (None: all); TE."""
    count, whole = len(q_THD), len(keys_TGD)
    hides = window is not None and window < whole
    mask = window_mask(count, whole, window, q_THD.device) if hides or 1 < count < whole else None
    parts = (q_THD[None], keys_TGD[None], values_TGD[None])
    return _sdpa(*parts, mask=mask, is_causal=mask is None and count > 1)[0].flatten(1)


def add_norm(
    x_TE: Tensor, delta: Tensor | None, weight_E: Tensor, eps: float, *, order: Order = Order.ROWS,
    first: FirstHalf | None = None,
) -> Tensor:  # fmt: skip
    """Add `delta` (TE or None) to x in place and return its RMS norm, TE; and x A, where `first` asks for it."""
    if delta is not None:
        x_TE.add_(delta)
    return _with_first(rms_norm(x_TE, weight_E.shape, weight_E, eps), first)


def gated(x: Tensor, dtype: torch.dtype, *, order: Order = Order.ROWS, first: FirstHalf | None = None) -> Tensor:
    """Return silu of the first half of the columns times the second; and x A, where `first` asks for it."""
    gate, up = x.chunk(2, dim=-1)
    return _with_first(silu(gate) * up, first)


def _with_first(x_TE: Tensor, first: FirstHalf | None) -> Tensor:
    if first is not None:
        torch.mm(x_TE, first.a_ER, out=first.xa_TR)
    return x_TE


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """SDPA over (rows, tokens, heads, D). On a card grouped heads are repeated: not every kernel there knows them."""
    group = q.shape[2] // k.shape[2]
    if group > 1 and q.is_cuda:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)
    return mixed.transpose(1, 2)
