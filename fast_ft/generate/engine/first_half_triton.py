"""LoRA's first half, x A, in Triton: in the kernel that makes x, or by a kernel of its own. NVIDIA GPUs only.

    `share`, `gather`   in the kernel that makes x: no launch, but A is read for each row
    `apart`             a launch behind a norm of many rows: tensor cores, 16 rows at a time

Both divide a row's columns over programs, and the one that comes last adds up, always in the same order.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from fast_ft.generate.engine.first_half import FirstHalf, counters
from fast_ft.models.nf4 import Order

#: Of a program of `apart`: rows, columns, columns of one product, partial sums that are read at once. Of twelve
#: divisions the fastest on an H200.
_ROWS, _SPAN, _BLOCK, _AT_ONCE = 16, 512, 256, 8


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Return the settings of a kernel that calls `begin`: from 9.0 on, it is launched while the one before it ends."""
    starts = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if starts else {"EARLY": False}


@triton.jit
def begin(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for what the launches before have written, and let the next launch come near. A kernel's first line."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def fetch(a, row, rows, RANKS: tl.constexpr, COUNT: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring COUNT rows of A into L2 while the launch before still runs: before `begin`, as no launch writes A."""
    if EARLY and RANKS > 0:
        line = tl.arange(0, triton.next_power_of_2(COUNT * RANKS // 64))  # of 128 bytes
        at = tl.minimum(row * RANKS + line * 64, tl.minimum(row + COUNT, rows) * RANKS - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(a + at).to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def place(token, column, tokens, columns, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a token's column stands in x, in the order (nf4.Order) that the product wants."""
    if ORDER == 2:
        piece = column // 128 * 16 + column // 2 % 16
        at = (piece * tokens + token) * 8 + column // 32 % 4 * 2 + column % 2
    elif ORDER == 1:
        at = token * columns + column // 128 * 128 + column // 2 % 8 * 16 + column // 16 % 8 * 2 + column % 2
    else:
        at = token * columns + column
    return at


@triton.jit
def share(y, column, real, a, parts, counter, token, part, PARTS, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Leave y's columns times their rows of A, (E, RANKS), in `parts`; the last of a token's PARTS programs adds up.

    Return whether this is the last one. It must call `gather` then.
    """
    r = tl.arange(0, 16)
    for block in tl.static_range(RANKS // 16):
        rank = block * 16 + r
        a_ER = tl.load(a + column[:, None] * RANKS + rank[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        tl.store(parts + (token * PARTS + part) * RANKS + rank, tl.sum(y[:, None] * a_ER, axis=0))
    tl.debug_barrier()
    return tl.atomic_add(counter + token, 1) == PARTS - 1


@triton.jit
def gather(parts, counter, xa, token, factor, PARTS, POW2: tl.constexpr, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the sum of a token's parts, times a factor, to xa; the counter is zero again."""
    r, p = tl.arange(0, 16), tl.arange(0, POW2)
    for block in tl.static_range(RANKS // 16):
        rank = block * 16 + r
        at = parts + (token * PARTS + p)[:, None] * RANKS + rank[None, :]
        part_PR = tl.load(at, mask=(p < PARTS)[:, None], other=0.0, cache_modifier=".cg")
        tl.store(xa + token * RANKS + rank, (tl.sum(part_PR, axis=0) * factor).to(xa.dtype.element_ty))
    tl.store(counter + token, 0)


@triton.jit
def column_at(k, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the column that stands at the k-th of a row's places, in an order: what `place` undoes."""
    if ORDER == 2:
        column = k // 128 * 128 + k % 8 // 2 * 32 + k // 8 % 16 * 2 + k % 2
    elif ORDER == 1:
        column = k // 128 * 128 + k % 16 // 2 * 16 + k // 16 % 8 * 2 + k % 2
    else:
        column = k
    return column


@triton.jit(do_not_specialize=["rows"])
def _apart(  # type: ignore[no-untyped-def]
    x, a, parts, counter, xa, rows, columns, programs, ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr, ORDER: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program ROWS rows, SPAN places and 16 ranks. Places are read as they lie; A's rows are fetched for them."""
    group, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if (group == 0) & (block == 0):
        fetch(a, part * SPAN, columns, RANKS, SPAN, EARLY)
    begin(EARLY)
    m, r = tl.arange(0, ROWS), tl.arange(0, 16)
    row, rank = group * ROWS + m, block * 16 + r
    held = row[:, None] < rows
    sum_MR = tl.zeros((ROWS, 16), tl.float32)
    for step in tl.static_range(0, SPAN, BLOCK):
        k = part * SPAN + step + tl.arange(0, BLOCK)
        column, real = column_at(k, ORDER), k < columns
        if ORDER == 2:
            x_at = (k[None, :] // 8 * rows + row[:, None]) * 8 + k[None, :] % 8
        else:
            x_at = row[:, None] * columns + k[None, :]
        x_ME = tl.load(x + x_at, mask=held & real[None, :], other=0.0)
        a_ER = tl.load(a + column[:, None] * RANKS + rank[None, :], mask=real[:, None], other=0.0)
        sum_MR = tl.dot(x_ME, a_ER, sum_MR, input_precision="ieee")
    task = group * (RANKS // 16) + block
    of_task = parts + task * programs * ROWS * 16
    inside = m[:, None] * 16 + r[None, :]
    tl.store(of_task + part * ROWS * 16 + inside, sum_MR)
    tl.debug_barrier()
    if tl.atomic_add(counter + task, 1) == programs - 1:
        tl.store(counter + task, 0)
        p = tl.arange(0, AT_ONCE)[:, None, None]
        sum_MR = tl.zeros((ROWS, 16), tl.float32)
        for some in range(0, programs, AT_ONCE):
            left = of_task + (some + p) * ROWS * 16 + inside[None, :, :]
            sum_MR += tl.sum(tl.load(left, mask=some + p < programs, other=0.0, cache_modifier=".cg"), axis=0)
        tl.store(xa + row[:, None] * RANKS + rank[None, :], sum_MR.to(xa.dtype.element_ty), mask=held)


def apart(x_TE: Tensor, first: FirstHalf, *, order: Order = Order.ROWS) -> None:
    """Compute a first half from x, which comes in an order."""
    tokens, columns = x_TE.shape
    groups, programs, blocks = triton.cdiv(tokens, _ROWS), triton.cdiv(columns, _SPAN), first.a_ER.shape[1] // 16
    parts = torch.empty(groups * blocks * programs * _ROWS * 16, dtype=torch.float32, device=x_TE.device)
    _apart[(groups, programs, blocks)](
        x_TE, first.a_ER, parts, counters(x_TE.device, "rows"), first.xa_TR, tokens, columns, programs, ROWS=_ROWS,
        SPAN=_SPAN, BLOCK=_BLOCK, AT_ONCE=_AT_ONCE, ORDER=int(order), RANKS=first.a_ER.shape[1], num_warps=4,
        **early(x_TE.device),
    )  # fmt: skip
