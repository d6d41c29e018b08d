"""What lies between a layer's products, in Triton: attention over pages, rope and cache, norms, gate. NVIDIA GPUs only.

`PLANES` puts a row's columns into the order in which nf4_triton reads them (`plane`). `PARTS` is the number of partial
sums, side by side in the first dimension, that a product left to be added here; 1 is the product itself.

Shapes: T tokens or rows, H heads, G KV heads, D head dimension, E columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.ops_torch import causal
from fast_ft.models import packed_attention as attention

__all__ = ["COLUMNS", "PACKED", "add_norm", "causal", "gated", "packed_attention", "paged_attention", "rope",
           "rotate_into_cache"]  # fmt: skip

COLUMNS = 0  #: attention reads as many cells as a row has
PACKED = True
# Numbers that differ from step to step or from run to run are not specialised: each kind would be compiled again.
_ALL = 1 << 30  #: cells of a row's window where it has none
FEW = 16  #: rows that would leave most of a card idle, were each (row, head) one warp's


@triton.jit
def plane(column):  # type: ignore[no-untyped-def]
    """Where a column stands in plane order (nf4.plane_order)."""
    return column // 128 * 128 + column // 2 % 8 * 16 + column // 16 % 8 * 2 + column % 2


@triton.jit(do_not_specialize=["scales_step", "scale_row", "table_row", "length_step", "window"])
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, scales, table, length, out, scale, q_row, cell_step, head_step, scales_step, scale_row, table_row,
    length_step, window, heads, group, PAGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    PLANES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One program a (row, head): a pass over the cells in the row's window, BLOCK at a time, with a running maximum and
    sum."""
    row, head = tl.program_id(0), tl.program_id(1)
    count = tl.load(length + row * length_step) + 1
    d = tl.arange(0, D)
    q_D = tl.load(q + row * q_row + head * D + d).to(tl.float32) * scale
    inside = (head // group).to(tl.int64) * head_step + d[None, :]
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sum_D = tl.zeros((D,), tl.float32)
    middle = tl.zeros((), tl.float32)
    for start in tl.range(tl.maximum(count - window, 0), count, BLOCK, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK)
        real = t < count
        page = tl.load(table + row * table_row + t // PAGE, mask=real, other=0)
        cell = page * PAGE + t % PAGE
        at = cell[:, None] * cell_step + inside
        k_TD = tl.load(keys + at, mask=real[:, None], other=0)
        v_TD = tl.load(values + at, mask=real[:, None], other=0)
        score_T = tl.sum(k_TD.to(tl.float32) * q_D[None, :], axis=1)
        if SCALED:
            scale_at = scales + cell * scale_row + head // group
            middle_T = tl.load(scale_at + scales_step, mask=real, other=0.0).to(tl.float32)
            score_T = score_T * tl.load(scale_at, mask=real, other=0.0).to(tl.float32) + middle_T * tl.sum(q_D, axis=0)
        score_T = tl.where(real, score_T, float("-inf"))
        higher = tl.maximum(largest, tl.max(score_T, axis=0))
        fade = tl.exp(largest - higher)
        weight_T = tl.exp(score_T - higher)
        total = total * fade + tl.sum(weight_T, axis=0)
        if SCALED:
            middle_T = tl.load(scale_at + 3 * scales_step, mask=real, other=0.0).to(tl.float32)
            middle = middle * fade + tl.sum(weight_T * middle_T, axis=0)
            weight_T *= tl.load(scale_at + 2 * scales_step, mask=real, other=0.0).to(tl.float32)
        sum_D = sum_D * fade + tl.sum(weight_T[:, None] * v_TD.to(tl.float32), axis=0)
        largest = higher
    column = head * D + d
    place = plane(column) if PLANES else column
    tl.store(out + row * heads * D + place, ((sum_D + middle) / total).to(out.dtype.element_ty))


def paged_attention(
    q_SHD: Tensor, keys: Tensor, values: Tensor, table_SW: Tensor, length_S: Tensor, *, columns: int = 0,
    planes: bool = False, window: int | None = None, scales: Tensor | None = None, block: int | None = None,
    warps: int | None = None, stages: int = 1,
) -> Tensor:  # fmt: skip
    """As ops_torch.paged_attention; the columns come in plane order where `planes` says so."""
    rows, heads, head_dim = q_SHD.shape
    # one warp reaches the most of the memory's speed; of few rows, a long one waits for its cells in turn
    block, warps = block or (128 if rows <= FEW else 32), warps or (8 if rows <= FEW else 1)
    if head_dim & (head_dim - 1):
        raise ValueError(f"a head dimension of {head_dim} is no power of two")
    out = q_SHD.new_empty(rows, heads * head_dim)
    _attend[(rows, heads)](
        q_SHD, keys, values, keys if scales is None else scales, table_SW, length_S, out, head_dim**-0.5,
        q_SHD.stride(0), keys.stride(0), keys.stride(1), 0 if scales is None else scales.stride(1), keys.shape[1],
        table_SW.stride(0), length_S.stride(0), window or _ALL, heads, heads // keys.shape[1],
        PAGE=PAGE, D=head_dim, BLOCK=block, STAGES=stages, PLANES=planes, SCALED=scales is not None, num_warps=warps,
    )  # fmt: skip
    return out


def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, starts: Tensor, longest: int, window: int | None = None
) -> Tensor:
    """Causal attention within each of the rows that lie side by side, TE; starts and longest: attention.PackedRows."""
    rows = attention.PackedRows(starts, longest)
    mixed_THD, *_ = attention.one_kernel(
        q_THD[None], k_TGD[None], v_TGD[None], rows, window=window, goes_backward=False
    )
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
    LOG: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """One program a token and HEADS of its q, k and v heads."""
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
        SPREAD=head_dim**-0.5, num_warps=4,
    )  # fmt: skip
    return out.view(tokens, whole, head_dim).split((heads, kv_heads, kv_heads), dim=1)


@triton.jit(do_not_specialize=["tokens"])
def _add_norm(  # type: ignore[no-untyped-def]
    x, delta, weight, out, eps, tokens, columns, BLOCK: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    real = e < columns
    x_E = tl.load(x + token * columns + e, mask=real, other=0.0)
    if PARTS > 0:
        sum_E = x_E.to(tl.float32)
        for part in tl.static_range(PARTS):
            sum_E += tl.load(delta + (part * tokens + token) * columns + e, mask=real, other=0.0).to(tl.float32)
        x_E = sum_E.to(x.dtype.element_ty)
        tl.store(x + token * columns + e, x_E, mask=real)
    wide_E = x_E.to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(wide_E * wide_E, axis=0) / columns + eps)
    y_E = wide_E * factor * tl.load(weight + e, mask=real, other=0.0).to(tl.float32)
    place = plane(e) if PLANES else e
    tl.store(out + token * columns + place, y_E.to(out.dtype.element_ty), mask=real)


def add_norm(x_TE: Tensor, delta: Tensor | None, weight_E: Tensor, eps: float, *, planes: bool = False) -> Tensor:
    """As ops_torch.add_norm; `delta` may be parts, (parts, T, E)."""
    tokens, columns = x_TE.shape
    parts = 0 if delta is None else len(delta) if delta.dim() == 3 else 1
    out = x_TE.new_empty(tokens, columns)
    _add_norm[(tokens,)](
        x_TE, x_TE if delta is None else delta, weight_E, out, eps, tokens, columns,
        BLOCK=triton.next_power_of_2(columns), PARTS=parts, PLANES=planes, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _gate(  # type: ignore[no-untyped-def]
    x, out, tokens, columns, BLOCK: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = e < columns
    at = token * 2 * columns + e
    gate = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(x + at + columns, mask=real, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        gate += tl.load(x + part * tokens * 2 * columns + at, mask=real, other=0.0)
        up += tl.load(x + part * tokens * 2 * columns + at + columns, mask=real, other=0.0)
    place = plane(e) if PLANES else e
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + token * columns + place, y.to(out.dtype.element_ty), mask=real)


def gated(x: Tensor, dtype: torch.dtype, *, planes: bool = False) -> Tensor:
    """As ops_torch.gated; `x` may be parts, (parts, T, 2E)."""
    parts = len(x) if x.dim() == 3 else 1
    tokens, columns = x.shape[-2], x.shape[-1] // 2
    out = x.new_empty(tokens, columns, dtype=dtype)
    _gate[(tokens, triton.cdiv(columns, 1024))](
        x, out, tokens, columns, BLOCK=1024, PARTS=parts, PLANES=planes, num_warps=4
    )
    return out
