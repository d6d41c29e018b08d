"""Attention over paged keys and values, one query a row, in Triton. Imported only where there is an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, table, length, out, scale, q_row, table_row, length_step, heads, group,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a (row, head): a pass over the row's cells, BLOCK at a time, with a running maximum and sum."""
    row, head = tl.program_id(0), tl.program_id(1)
    count = tl.load(length + row * length_step) + 1
    d = tl.arange(0, D)
    q_D = tl.load(q + row * q_row + head * D + d).to(tl.float32) * scale
    cell_size = heads // group * D
    inside = head // group * D + d[None, :]
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sum_D = tl.zeros((D,), tl.float32)
    for start in range(0, count, BLOCK):
        t = start + tl.arange(0, BLOCK)
        real = t < count
        page = tl.load(table + row * table_row + t // PAGE, mask=real, other=0)
        at = (page * PAGE + t % PAGE)[:, None] * cell_size + inside
        k_TD = tl.load(keys + at, mask=real[:, None], other=0.0).to(tl.float32)
        score_T = tl.where(real, tl.sum(k_TD * q_D[None, :], axis=1), float("-inf"))
        higher = tl.maximum(largest, tl.max(score_T, axis=0))
        fade = tl.exp(largest - higher)
        weight_T = tl.exp(score_T - higher)
        v_TD = tl.load(values + at, mask=real[:, None], other=0.0).to(tl.float32)
        sum_D = sum_D * fade + tl.sum(weight_T[:, None] * v_TD, axis=0)
        total = total * fade + tl.sum(weight_T, axis=0)
        largest = higher
    tl.store(out + (row * heads + head) * D + d, (sum_D / total).to(out.dtype.element_ty))


def paged_attention(
    q_SHD: Any, keys: Any, values: Any, table_SW: Any, length_S: Any, *, page: int, block: int = 32, warps: int = 4
) -> Any:
    """As cache.gathered, in pages of `page` cells. `keys` and `values` are contiguous (cells, KV heads, D)."""
    rows, heads, head_dim = q_SHD.shape
    if head_dim & (head_dim - 1):
        raise ValueError(f"a head dimension of {head_dim} is no power of two")
    q_SHD = q_SHD if q_SHD.stride()[1:] == (head_dim, 1) else q_SHD.contiguous()
    out = q_SHD.new_empty(rows, heads, head_dim)
    _attend[(rows, heads)](
        q_SHD, keys, values, table_SW, length_S, out, head_dim**-0.5,
        q_SHD.stride(0), table_SW.stride(0), length_S.stride(0), heads, heads // keys.shape[1],
        PAGE=page, D=head_dim, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out
