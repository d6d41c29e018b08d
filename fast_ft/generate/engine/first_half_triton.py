"""LoRA's first half, x A, in Triton: beside what makes x for few rows, else by a kernel of its own. NVIDIA GPUs only.

    up to TOGETHER rows   `share` and `gather`, in the kernel that makes x: no launch, but A is read for each row
    more                  `apart`: tensor cores, 16 rows at a time

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

_ROWS, _BLOCK = 16, 256  #: of a program of `apart`


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


@triton.jit(do_not_specialize=["rows"])
def _apart(  # type: ignore[no-untyped-def]
    x, a, parts, counter, xa, rows, columns, programs, ROWS: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr,
    RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program ROWS rows and BLOCK columns."""
    begin(EARLY)
    group, part = tl.program_id(0), tl.program_id(1)
    m, r, p = tl.arange(0, ROWS), tl.arange(0, 16), tl.arange(0, 16)
    row, e = group * ROWS + m, part * BLOCK + tl.arange(0, BLOCK)
    held, real = row[:, None] < rows, e < columns
    x_at = place(row[:, None], e[None, :], rows, columns, ORDER)
    x_ME = tl.load(x + x_at, mask=held & real[None, :], other=0.0)
    group_parts = parts + group * programs * ROWS * RANKS
    for block in tl.static_range(RANKS // 16):
        rank = block * 16 + r
        a_ER = tl.load(a + e[:, None] * RANKS + rank[None, :], mask=real[:, None], other=0.0)
        sum_MR = tl.dot(x_ME, a_ER, input_precision="ieee")
        tl.store(group_parts + (part * ROWS + m[:, None]) * RANKS + rank[None, :], sum_MR)
    tl.debug_barrier()
    if tl.atomic_add(counter + group, 1) == programs - 1:
        tl.store(counter + group, 0)
        for block in tl.static_range(RANKS // 16):
            rank = block * 16 + r
            sum_MR = tl.zeros((ROWS, 16), tl.float32)
            for some in range(0, programs, 16):
                one = some + p[:, None, None]
                at = group_parts + (one * ROWS + m[None, :, None]) * RANKS + rank[None, None, :]
                sum_MR += tl.sum(tl.load(at, mask=one < programs, other=0.0, cache_modifier=".cg"), axis=0)
            tl.store(xa + row[:, None] * RANKS + rank[None, :], sum_MR.to(xa.dtype.element_ty), mask=held)


def apart(x_TE: Tensor, first: FirstHalf, *, order: Order = Order.ROWS) -> None:
    """Compute a first half from x, which comes in an order."""
    tokens, columns = x_TE.shape
    groups, programs, ranks = triton.cdiv(tokens, _ROWS), triton.cdiv(columns, _BLOCK), first.a_ER.shape[1]
    parts = torch.empty(groups * programs * _ROWS * ranks, dtype=torch.float32, device=x_TE.device)
    _apart[(groups, programs)](
        x_TE, first.a_ER, parts, counters(x_TE.device, "rows"), first.xa_TR, tokens, columns, programs, ROWS=_ROWS,
        BLOCK=_BLOCK, ORDER=int(order), RANKS=ranks, num_warps=4, **early(x_TE.device),
    )  # fmt: skip
