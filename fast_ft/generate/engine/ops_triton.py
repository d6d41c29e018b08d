"""What lies between a layer's products, in Triton: rope and cache, norms, gate. NVIDIA GPUs only.

Attention over pages is in attention_triton.py. Prompts attend to themselves by torch's kernels (`packed_attention`).

`ORDER` puts x into the order in which the product for few rows reads it (`place`). `PARTS` is the number of partial
sums, side by side in the first dimension, that a product left to be added here; 1 is the product itself.

Shapes: T tokens or rows, H heads, G KV heads, D head dimension, E columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_ft.generate.engine.attention_triton import paged_attention, splits_for
from fast_ft.generate.engine.first_half import TOGETHER, FirstHalf, counters
from fast_ft.generate.engine.first_half_triton import apart, begin, early, fetch, gather, place, share
from fast_ft.generate.engine.ops_torch import causal
from fast_ft.models import packed_attention as attention
from fast_ft.models.nf4 import Order

__all__ = ["COLUMNS", "FUSES", "PACKED", "add_norm", "causal", "gated", "packed_attention", "paged_attention", "rope",
           "rotate_into_cache", "splits_for"]  # fmt: skip

COLUMNS = 0  #: attention reads as many cells as a row has
PACKED = True
FUSES = True  #: a FirstHalf is computed here
# Numbers that differ from step to step or from run to run are not specialised: each kind would be compiled again.
# Columns of a program that computes its share of a first half, of a norm and of a gate (timed on an H200).
_NORMED, _GATED = 512, 1024


def packed_attention(
    q_THD: Tensor, k_KGD: Tensor, v_KGD: Tensor, starts: Tensor, longest: int, window: int | None = None,
    keys: tuple[Tensor, int] | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention within each of the rows that lie side by side, TE; starts and longest: attention.PackedRows.

    With `keys`, the same of the keys: a row may have more keys than queries, and its queries are then the last ones.
    """
    rows = attention.PackedRows(starts, longest)
    mixed_THD, *_ = attention.one_kernel(
        q_THD[None], k_KGD[None], v_KGD[None], rows, window=window, goes_backward=False,
        keys=None if keys is None else attention.PackedRows(*keys),
    )  # fmt: skip
    return mixed_THD[0].flatten(1)


def rope(position_T: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32, one for each pair."""
    angle_TD = position_T[:, None].float() * frequencies
    return angle_TD.cos() * scale, angle_TD.sin() * scale


@triton.jit
def _spread(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each row times Hadamard's matrix, unscaled: LOG times sums and differences of neighbours, sums first."""
    for _ in tl.static_range(LOG):
        even, odd = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, WIDTH))
    return x


@triton.jit(do_not_specialize=["tokens", "scales_step"])
def _rotate(  # type: ignore[no-untyped-def]
    qkv, cos, sin, cell, keys, values, scales, out, tokens, heads, kv_heads, cell_step, head_step, list_step,
    scales_step, HALF: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr,
    LOG: tl.constexpr, SPREAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program a token and HEADS of its q, k and v heads."""
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    width = (heads + 2 * kv_heads) * HALF * 2
    real = head < heads + 2 * kv_heads
    at = token * width + head * HALF * 2 + d
    a = tl.load(qkv + at, mask=real).to(tl.float32)
    b = tl.load(qkv + at + HALF, mask=real).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        a += tl.load(qkv + part * tokens * width + at, mask=real)
        b += tl.load(qkv + part * tokens * width + at + HALF, mask=real)
    turns = head < heads + kv_heads
    c = tl.where(turns, tl.load(cos + token * HALF + d), 1.0)
    s = tl.where(turns, tl.load(sin + token * HALF + d), 0.0)
    kind = out.dtype.element_ty
    a, b = a * c - b * s, b * c + a * s
    if SCALED:
        spread_a, spread_b = _spread(a + b, HEADS, HALF, LOG), _spread(a - b, HEADS, HALF, LOG)
        a, b = tl.where(turns, spread_a * SPREAD, a), tl.where(turns, spread_b * SPREAD, b)
    a, b = a.to(kind), b.to(kind)
    tl.store(out + at, a, mask=real)
    tl.store(out + at + HALF, b, mask=real)
    is_key = (head >= heads) & turns
    is_value = real & (head >= heads + kv_heads)
    own = tl.load(cell + token * list_step)
    if SCALED:
        highest = tl.max(tl.maximum(a, b).to(tl.float32), axis=1)[:, None]
        lowest = tl.min(tl.minimum(a, b).to(tl.float32), axis=1)[:, None]
        scale = ((highest - lowest) / 254).to(kind)
        middle = ((highest + lowest) / 2).to(kind)
        step = tl.maximum(scale.to(tl.float32), 1e-30)
        a = tl.clamp(tl.floor((a.to(tl.float32) - middle.to(tl.float32)) / step + 0.5), -127, 127).to(tl.int8)
        b = tl.clamp(tl.floor((b.to(tl.float32) - middle.to(tl.float32)) / step + 0.5), -127, 127).to(tl.int8)
        scale_at = scales + own * kv_heads + head - heads
        tl.store(scale_at, scale, mask=is_key)
        tl.store(scale_at + scales_step, middle, mask=is_key)
        tl.store(scale_at + 2 * scales_step - kv_heads, scale, mask=is_value)
        tl.store(scale_at + 3 * scales_step - kv_heads, middle, mask=is_value)
    in_cell = own * cell_step + d
    k_at = keys + in_cell + (head - heads) * head_step
    v_at = values + in_cell + (head - heads - kv_heads) * head_step
    tl.store(k_at, a, mask=is_key)
    tl.store(k_at + HALF, b, mask=is_key)
    tl.store(v_at, a, mask=is_value)
    tl.store(v_at + HALF, b, mask=is_value)


def rotate_into_cache(
    qkv: Tensor, heads: int, cos_sin: tuple[Tensor, Tensor], cell_T: Tensor, keys: Tensor, values: Tensor,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ops_torch.rotate_into_cache; `qkv` may be parts, (parts, T, columns)."""
    cos, sin = cos_sin
    parts = len(qkv) if qkv.dim() == 3 else 1
    tokens, kv_heads, head_dim = qkv.shape[-2], keys.shape[1], keys.shape[2]
    whole = heads + 2 * kv_heads
    dtype = (keys if scales is None else scales).dtype
    out = qkv if parts == 1 else qkv.new_empty(tokens, whole * head_dim, dtype=dtype)
    _rotate[(tokens, triton.cdiv(whole, 8))](
        qkv, cos, sin, cell_T, keys, values, keys if scales is None else scales, out, tokens, heads, kv_heads,
        keys.stride(0), keys.stride(1), cell_T.stride(0), 0 if scales is None else scales.stride(1),
        HALF=head_dim // 2, HEADS=8, PARTS=parts, SCALED=scales is not None, LOG=(head_dim // 2).bit_length() - 1,
        SPREAD=head_dim**-0.5, num_warps=4, **early(out.device),
    )  # fmt: skip
    return out.view(tokens, whole, head_dim).split((heads, kv_heads, kv_heads), dim=1)


@triton.jit(do_not_specialize=["tokens"])
def _add_norm(  # type: ignore[no-untyped-def]
    x,
    delta,
    weight,
    out,
    eps,
    tokens,
    columns,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ORDER: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    real = e < columns
    weight_E = tl.load(weight + e, mask=real, other=0.0).to(tl.float32)  # which no launch writes
    begin(EARLY)
    x_E = tl.load(x + token * columns + e, mask=real, other=0.0)
    if PARTS > 0:
        sum_E = x_E.to(tl.float32)
        for part in tl.static_range(PARTS):
            sum_E += tl.load(delta + (part * tokens + token) * columns + e, mask=real, other=0.0).to(tl.float32)
        x_E = sum_E.to(x.dtype.element_ty)
        tl.store(x + token * columns + e, x_E, mask=real)
    wide_E = x_E.to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(wide_E * wide_E, axis=0) / columns + eps)
    y_E = wide_E * factor * weight_E
    tl.store(out + place(token, e, tokens, columns, ORDER), y_E.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def _add_norm_first(  # type: ignore[no-untyped-def]
    x, delta, weight, out, a, parts, squares, counter, xa, eps, tokens, columns, programs, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, PARTS: tl.constexpr, ORDER: tl.constexpr, RANKS: tl.constexpr, POW2: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """As _add_norm, over BLOCK columns of a token each. The norm's factor is known to the last one, which writes y."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = part * BLOCK + tl.arange(0, BLOCK)
    real = e < columns
    weight_E = tl.load(weight + e, mask=real, other=0.0).to(tl.float32)  # which no launch writes
    if token == 0:
        fetch(a, part * BLOCK, columns, RANKS, BLOCK, EARLY)
    begin(EARLY)
    x_E = tl.load(x + token * columns + e, mask=real, other=0.0)
    if PARTS > 0:
        sum_E = x_E.to(tl.float32)
        for index in tl.static_range(PARTS):
            sum_E += tl.load(delta + (index * tokens + token) * columns + e, mask=real, other=0.0).to(tl.float32)
        x_E = sum_E.to(x.dtype.element_ty)
        tl.store(x + token * columns + e, x_E, mask=real)
    wide_E = x_E.to(tl.float32)
    tl.store(squares + token * programs + part, tl.sum(wide_E * wide_E, axis=0))
    y_E = wide_E * weight_E
    if share(y_E, e, real, a, parts, counter, token, part, programs, RANKS):
        p = tl.arange(0, POW2)
        square_P = tl.load(squares + token * programs + p, mask=p < programs, other=0.0, cache_modifier=".cg")
        factor = 1 / tl.sqrt(tl.sum(square_P, axis=0) / columns + eps)
        gather(parts, counter, xa, token, factor, programs, POW2, RANKS)
        all_E = tl.arange(0, WHOLE)
        held = all_E < columns
        row_E = tl.load(x + token * columns + all_E, mask=held, other=0.0, cache_modifier=".cg").to(tl.float32)
        normed_E = row_E * factor * tl.load(weight + all_E, mask=held, other=0.0).to(tl.float32)
        at_E = place(token, all_E, tokens, columns, ORDER)
        tl.store(out + at_E, normed_E.to(out.dtype.element_ty), mask=held)


def add_norm(
    x_TE: Tensor, delta: Tensor | None, weight_E: Tensor, eps: float, *, order: Order = Order.ROWS,
    first: FirstHalf | None = None,
) -> Tensor:  # fmt: skip
    """As ops_torch.add_norm; `delta` may be parts, (parts, T, E)."""
    tokens, columns = x_TE.shape
    parts = 0 if delta is None else len(delta) if delta.dim() == 3 else 1
    out, delta = x_TE.new_empty(tokens, columns), x_TE if delta is None else delta
    whole = triton.next_power_of_2(columns)
    if first is None or tokens > TOGETHER:
        _add_norm[(tokens,)](
            x_TE, delta, weight_E, out, eps, tokens, columns, BLOCK=whole, PARTS=parts, ORDER=int(order), num_warps=8,
            **early(out.device),
        )  # fmt: skip
        if first is not None:
            apart(out, first, order=order)
        return out
    programs, ranks = triton.cdiv(columns, _NORMED), first.a_ER.shape[1]
    left = torch.empty(tokens * programs * (ranks + 1), dtype=torch.float32, device=out.device)
    _add_norm_first[(tokens, programs)](
        x_TE, delta, weight_E, out, first.a_ER, left[tokens * programs :], left, counters(out.device, "rows"),
        first.xa_TR, eps, tokens, columns, programs, BLOCK=_NORMED, WHOLE=whole, PARTS=parts, ORDER=int(order),
        RANKS=ranks, POW2=triton.next_power_of_2(programs), num_warps=4, **early(out.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _gate(  # type: ignore[no-untyped-def]
    x, out, a, parts, counter, xa, tokens, columns, programs, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ORDER: tl.constexpr, RANKS: tl.constexpr, POW2: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = part * BLOCK + tl.arange(0, BLOCK)
    real = e < columns
    if token == 0:
        fetch(a, part * BLOCK, columns, RANKS, BLOCK, EARLY)
    begin(EARLY)
    at = token * 2 * columns + e
    gate = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(x + at + columns, mask=real, other=0.0).to(tl.float32)
    for index in tl.static_range(1, PARTS):
        gate += tl.load(x + index * tokens * 2 * columns + at, mask=real, other=0.0)
        up += tl.load(x + index * tokens * 2 * columns + at + columns, mask=real, other=0.0)
    y = (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty)
    tl.store(out + place(token, e, tokens, columns, ORDER), y, mask=real)
    if RANKS > 0:  # noqa: SIM102 - known when it is compiled
        if share(y.to(tl.float32), e, real, a, parts, counter, token, part, programs, RANKS):
            gather(parts, counter, xa, token, 1.0, programs, POW2, RANKS)


def gated(x: Tensor, dtype: torch.dtype, *, order: Order = Order.ROWS, first: FirstHalf | None = None) -> Tensor:
    """As ops_torch.gated; `x` may be parts, (parts, T, 2E)."""
    parts = len(x) if x.dim() == 3 else 1
    tokens, columns = x.shape[-2], x.shape[-1] // 2
    out = x.new_empty(tokens, columns, dtype=dtype)
    programs, ranks = triton.cdiv(columns, _GATED), 0 if first is None else first.a_ER.shape[1]
    a, xa = (out, out) if first is None else first
    left = torch.empty(tokens * programs * ranks, dtype=torch.float32, device=out.device) if ranks else out
    _gate[(tokens, programs)](
        x, out, a, left, counters(out.device, "rows"), xa, tokens, columns, programs, BLOCK=_GATED, PARTS=parts,
        ORDER=int(order), RANKS=ranks, POW2=triton.next_power_of_2(programs), num_warps=4, **early(out.device),
    )  # fmt: skip
    return out
