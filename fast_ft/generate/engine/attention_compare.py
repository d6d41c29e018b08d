"""Comparisons of kernel_checks: attention over pages and over prompts, and writing to the cache, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fast_ft.generate.engine import ops_torch
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.kernel_compare import Numbers, first_for, refuse_difference
from fast_ft.generate.engine.kernel_kind import Kind
from fast_ft.generate.engine.kv_cache import dequantised, quantised
from fast_ft.models import nf4


def attention(kind: Kind, kernels: Any) -> dict[str, Callable[[], None]]:
    """Return comparisons of attention and of the cache (the module ops_triton), by their names.

    Each compiles few kernels, so that threads may share them; an exception says what is wrong.
    """
    # How each (row, head) is divided hangs on a step's rows, and is another kernel.
    divided = sorted({kernels.splits_for(n, kind.heads) for n in kind.steps}) if kernels.FUSES else [None]
    return {
        "rope, cache and attention over prompts": partial(_prompts, kind, kernels),
        **{f"attention over pages, parts a head: {n or 1}": partial(_pages, kind, kernels, n) for n in divided},
    }


class _Cells:
    """Rows with keys and values in a cache: three pages each, of which `length` cells and one more are filled."""

    def __init__(self, kind: Kind) -> None:
        draw = Numbers(kind)
        device, whole, self.count = draw.device, kind.heads + 2 * kind.kv_heads, 18
        frequencies = torch.arange(0, kind.head_dim, 2, device=device).float() / kind.head_dim
        self.frequencies, self.dtype, self.heads = 1e4**-frequencies, draw.dtype, kind.heads
        self.qkv = draw.normal(self.count, whole * kind.head_dim)
        memory = draw.normal(2, (3 * self.count + 1) * PAGE, kind.kv_heads, kind.head_dim)
        self._held, self._steps = memory, None
        if kind.kv_bits == 8:  # keys and values each have a scale and a middle
            self._held, self._steps = (torch.stack(each) for each in zip(*map(quantised, memory), strict=True))
        # Lengths and table lie in one tensor, at places of odd alignment, as in a step: kernels are compiled for that.
        state = torch.zeros(self.count, 7 + 3, dtype=torch.int64, device=device)
        pages = torch.randperm(3 * self.count, generator=draw.generator, device=device) + 1
        state[:, 7:] = pages.view(self.count, 3)
        state[:, 1] = torch.tensor([PAGE, 0, 3 * PAGE - 1] * (self.count // 3), device=device)
        self.length, self.table = state[:, 1], state[:, 7:]

    def rotated(self, ops: Any) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
        """Return (q, k, v after rope; keys, values and scales of all cells, where these are), made by `ops`."""
        keys, values = self._held.clone()
        scales = None if self._steps is None else self._steps.clone()
        cos_sin = ops.rope(self.length, self.frequencies, 1.0, self.dtype)
        cell = self.table.gather(1, (self.length // PAGE)[:, None])[:, 0] * PAGE + self.length % PAGE
        made = ops.rotate_into_cache(self.qkv.clone(), self.heads, cos_sin, cell, keys, values, scales)
        return made, (keys, values, scales)


def _prompts(kind: Kind, kernels: Any) -> None:
    cells = _Cells(kind)
    found = []
    for ops in (ops_torch, kernels):
        (q, k, v), (keys, values, scales) = cells.rotated(ops)
        packed = _packed(ops, q, k, v)
        if scales is not None:
            keys, values = dequantised(keys, scales[0], cells.dtype), dequantised(values, scales[1], cells.dtype)
        found.append([keys, values, *packed])
    refuse_difference(kind, "rope, cache and attention over prompts", *found)


def _pages(kind: Kind, kernels: Any, splits: int | None) -> None:
    cells = _Cells(kind)
    (q, _, _), (keys, values, scales) = cells.rotated(ops_torch)
    found = []
    for ops in (ops_torch, kernels):
        made = []
        for order, window in product(kind.orders, (None, PAGE + 3)):
            first = first_for(kind, kind.products[1][1], kind.halves[1], cells.count)
            mixed = ops.paged_attention(
                q, keys, values, cells.table, cells.length, columns=3 * PAGE, order=order, window=window, scales=scales,
                first=first, splits=splits,
            )  # fmt: skip
            # to plain torch the order means nothing
            made.append(nf4.arranged(mixed, order) if ops is ops_torch else mixed)
            made += [] if first is None else [first.xa_TR]
        found.append(made)
    refuse_difference(kind, "attention over pages", *found)


def _packed(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return attention over prompts of 1 token and of the others, and over the same behind a start that they share."""
    count, shared = len(q), 5
    cuts = ((0, 1), (1, count))
    behind = [torch.cat([torch.cat([part[:shared], part[a:b]]) for a, b in cuts]) for part in (k, v)]
    if not ops.PACKED:
        key_cuts = ((0, shared + 1), (shared + 1, count + 2 * shared))
        both = ((k, v, cuts), (*behind, key_cuts))
        return [
            torch.cat([ops.causal(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in zip(cuts, of_keys, strict=True)])
            for k, v, of_keys in both
        ]
    starts, key_starts = (
        torch.tensor([0, end, last], dtype=torch.int32, device=q.device)
        for end, last in ((1, count), (shared + 1, count + 2 * shared))
    )
    keys = (key_starts, count + shared)
    return [
        ops.packed_attention(q, k, v, starts, count),
        ops.packed_attention(q, *behind, starts, count, None, keys),
    ]
