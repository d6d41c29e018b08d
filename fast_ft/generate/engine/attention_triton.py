"""Attention of a step over the cache's pages, in Triton. NVIDIA GPUs only.

Of few rows, each (row, head) is divided over several programs, for one would wait for its cells in turn while most of
the card is idle. The last of them adds up what all have left.

Shapes: S rows, H heads, G KV heads, D head dimension, W pages of a row's table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.first_half import FirstHalf, counters
from fast_ft.generate.engine.first_half_triton import begin, early, fetch, gather, place, share
from fast_ft.models.nf4 import Order

# Numbers that differ from step to step or from run to run are not specialised: each kind would be compiled again.
_ALL = 1 << 30  #: cells of a row's window where it has none
_PROGRAMS = 2048  #: that fill a card (of 512 to 16,384 tried on an H200)
_MOST_SPLITS = 32
BLOCK = 32  #: cells at a time: one warp reaches the most of the memory's speed


@triton.jit
def _wide(bytes, CARD: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 as fp32: on a card by putting bytes together, for conversions take several times as long."""
    if CARD:
        above = tl.inline_asm_elementwise(
            """{
            .reg .b32 u;
            xor.b32 u, $4, 0x80808080;
            prmt.b32 $0, u, 0x4B000000, 0x7440;
            prmt.b32 $1, u, 0x4B000000, 0x7441;
            prmt.b32 $2, u, 0x4B000000, 0x7442;
            prmt.b32 $3, u, 0x4B000000, 0x7443;
            }""",
            "=r,=r,=r,=r,r", [bytes], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        return above.to(tl.float32, bitcast=True) - 8388736.0  # 2^23 and 128
    return bytes.to(tl.float32)


@triton.jit(do_not_specialize=["scales_step", "scale_row", "table_row", "length_step", "window"])
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, scales, table, length, out, partial, split_counter, a, parts, row_counter, xa, scale, q_row,
    cell_step, head_step, scales_step, scale_row, table_row, length_step, window, heads, group, PAGE: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, ORDER: tl.constexpr, SCALED: tl.constexpr,
    RANKS: tl.constexpr, POW2: tl.constexpr, CARD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program a (row, head, split): a pass over the split's cells of the row's window, BLOCK at a time, with a
    running maximum and sum."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if (row == 0) & (split == 0):
        fetch(a, head * D, heads * D, RANKS, D, EARLY)
    begin(EARLY)
    count = tl.load(length + row * length_step) + 1
    first = tl.maximum(count - window, 0)
    if SPLITS > 1:
        each = (count - first + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
        first += split * each
        count = tl.minimum(first + each, count)
    d = tl.arange(0, D)
    q_D = tl.load(q + row * q_row + head * D + d).to(tl.float32) * scale
    inside = (head // group).to(tl.int64) * head_step + d[None, :]
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sum_D = tl.zeros((D,), tl.float32)
    middle = tl.zeros((), tl.float32)
    for start in tl.range(first, count, BLOCK, num_stages=1):
        t = start + tl.arange(0, BLOCK)
        real = t < count
        page = tl.load(table + row * table_row + t // PAGE, mask=real, other=0)
        cell = page * PAGE + t % PAGE
        at = cell[:, None] * cell_step + inside
        k_TD = tl.load(keys + at, mask=real[:, None], other=0)
        v_TD = tl.load(values + at, mask=real[:, None], other=0)
        if SCALED:
            score_T = tl.sum(_wide(k_TD, CARD) * q_D[None, :], axis=1)
            scale_at = scales + cell * scale_row + head // group
            middle_T = tl.load(scale_at + scales_step, mask=real, other=0.0).to(tl.float32)
            score_T = score_T * tl.load(scale_at, mask=real, other=0.0).to(tl.float32) + middle_T * tl.sum(q_D, axis=0)
        else:
            score_T = tl.sum(k_TD.to(tl.float32) * q_D[None, :], axis=1)
        score_T = tl.where(real, score_T, float("-inf"))
        higher = tl.maximum(largest, tl.max(score_T, axis=0))
        fade = tl.exp(largest - higher)
        weight_T = tl.exp(score_T - higher)
        total = total * fade + tl.sum(weight_T, axis=0)
        if SCALED:
            middle_T = tl.load(scale_at + 3 * scales_step, mask=real, other=0.0).to(tl.float32)
            middle = middle * fade + tl.sum(weight_T * middle_T, axis=0)
            weight_T *= tl.load(scale_at + 2 * scales_step, mask=real, other=0.0).to(tl.float32)
            sum_D = sum_D * fade + tl.sum(weight_T[:, None] * _wide(v_TD, CARD), axis=0)
        else:
            sum_D = sum_D * fade + tl.sum(weight_T[:, None] * v_TD.to(tl.float32), axis=0)
        largest = higher
    if SPLITS > 1:
        mine = row * heads + head
        left = partial + (mine * SPLITS + split) * (D + 2)
        tl.store(left + d, sum_D + middle)
        tl.store(left + D, largest)
        tl.store(left + D + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(split_counter + mine, 1) == SPLITS - 1:
            tl.store(split_counter + mine, 0)
            at_S = partial + (mine * SPLITS + tl.arange(0, SPLITS)) * (D + 2) + D
            top = tl.max(tl.load(at_S, cache_modifier=".cg"), axis=0)
            total = tl.zeros((), tl.float32)
            sum_D = tl.zeros((D,), tl.float32)
            for some in tl.static_range(0, SPLITS, 2):  # two at a time: all of them would fill the registers
                left_2 = partial + (mine * SPLITS + some + tl.arange(0, 2)) * (D + 2)
                weight_2 = tl.exp(tl.load(left_2 + D, cache_modifier=".cg") - top)
                total += tl.sum(weight_2 * tl.load(left_2 + D + 1, cache_modifier=".cg"), axis=0)
                sum_2D = tl.load(left_2[:, None] + d[None, :], cache_modifier=".cg")
                sum_D += tl.sum(weight_2[:, None] * sum_2D, axis=0)
            _finish(sum_D / total, out, a, parts, row_counter, xa, row, head, heads, D, ORDER, RANKS, POW2)
    else:
        _finish((sum_D + middle) / total, out, a, parts, row_counter, xa, row, head, heads, D, ORDER, RANKS, POW2)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    mixed_D, out, a, parts, counter, xa, row, head, heads, D: tl.constexpr, ORDER: tl.constexpr, RANKS: tl.constexpr,
    POW2: tl.constexpr,
):  # fmt: skip
    """Write a head's columns, and its share of x A."""
    column = head * D + tl.arange(0, D)
    mixed_D = mixed_D.to(out.dtype.element_ty)
    tl.store(out + place(row, column, tl.num_programs(0), heads * D, ORDER), mixed_D)
    if RANKS > 0:  # noqa: SIM102 - known when it is compiled
        if share(mixed_D.to(tl.float32), column, column >= 0, a, parts, counter, row, head, heads, RANKS):
            gather(parts, counter, xa, row, 1.0, heads, POW2, RANKS)


def paged_attention(
    q_SHD: Tensor, keys: Tensor, values: Tensor, table_SW: Tensor, length_S: Tensor, *, columns: int = 0,
    order: Order = Order.ROWS, window: int | None = None, scales: Tensor | None = None, first: FirstHalf | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """As ops_torch.paged_attention; the rows come in that order."""
    rows, heads, head_dim = q_SHD.shape
    if head_dim & (head_dim - 1):
        raise ValueError(f"a head dimension of {head_dim} is no power of two")
    splits = splits or splits_for(rows, heads)
    out = q_SHD.new_empty(rows, heads * head_dim)
    ranks = 0 if first is None else first.a_ER.shape[1]
    wide = {"dtype": torch.float32, "device": out.device}
    partial = torch.empty(rows * heads * splits * (head_dim + 2), **wide) if splits > 1 else out
    parts = torch.empty(rows * heads * ranks, **wide) if ranks else out
    a, xa = (out, out) if first is None else first
    _attend[(rows, heads, splits)](
        q_SHD, keys, values, keys if scales is None else scales, table_SW, length_S, out, partial,
        counters(out.device, "splits"), a, parts, counters(out.device, "rows"), xa, head_dim**-0.5,
        q_SHD.stride(0), keys.stride(0), keys.stride(1), 0 if scales is None else scales.stride(1), keys.shape[1],
        table_SW.stride(0), length_S.stride(0), window or _ALL, heads, heads // keys.shape[1],
        PAGE=PAGE, D=head_dim, BLOCK=BLOCK, SPLITS=splits, ORDER=int(order), SCALED=scales is not None, RANKS=ranks,
        POW2=triton.next_power_of_2(heads), CARD=out.is_cuda, num_warps=1,
        maxnreg=128, **early(out.device),  # 16 programs an SM of 65,536 registers
    )  # fmt: skip
    return out


def splits_for(rows: int, heads: int) -> int:
    """Return over how many programs each (row, head) is divided: a power of two that fills a card."""
    most = min(_MOST_SPLITS, max(1, _PROGRAMS // (rows * heads)))
    return 1 << most.bit_length() - 1
