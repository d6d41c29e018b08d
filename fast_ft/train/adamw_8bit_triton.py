"""The step of AdamW with moments of 8 bits as one Triton kernel; adamw_8bit.py holds the same in plain torch.

Imported only where there is an NVIDIA GPU. Each program takes some blocks of 256 weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 4  #: of 256 weights, in a program


@triton.jit
def _code_of(value, table):  # type: ignore[no-untyped-def]
    """Return the place in the sorted table of 256 numbers of the one that is nearest to each value."""
    low = value.to(tl.int32) * 0
    high = low + 255
    for _ in tl.static_range(8):
        middle = (low + high) // 2
        above = value > tl.load(table + middle)
        low = tl.where(above, middle, low)
        high = tl.where(above, high, middle)
    near = value - tl.load(table + low) <= tl.load(table + high) - value
    return tl.where(near, low, high)


@triton.jit
def _unit(moment):  # type: ignore[no-untyped-def]
    """Return each row's largest absolute value, and the row divided by it."""
    largest = tl.max(tl.abs(moment), axis=1)
    return largest, moment / tl.where(largest > 0, largest, 1.0)[:, None]


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    weight, gradient, codes1, codes2, table1, table2, largest1, largest2, numbers, count, blocks,
    beta1, beta2, rest1, rest2, epsilon, decay, BLOCKS: tl.constexpr,
):  # fmt: skip
    if tl.load(numbers) > 0:
        return  # gradients that are no finite numbers: nothing changes
    rate = tl.load(numbers + 1)
    correction = tl.load(numbers + 2)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None].to(tl.int64) * 256 + tl.arange(0, 256)[None, :]
    real = at < count
    g = tl.load(gradient + at, mask=real, other=0.0)
    first = tl.load(table1 + tl.load(codes1 + at, mask=real, other=0).to(tl.int32))
    first = first * tl.load(largest1 + block, mask=block < blocks, other=0.0)[:, None]
    second = tl.load(table2 + tl.load(codes2 + at, mask=real, other=0).to(tl.int32))
    second = second * tl.load(largest2 + block, mask=block < blocks, other=0.0)[:, None]
    first = tl.where(real, first * beta1 + g * rest1, 0.0)
    second = tl.where(real, second * beta2 + g * g * rest2, 0.0)
    w = tl.load(weight + at, mask=real, other=0.0)
    moved = w * decay - rate * (first / (tl.sqrt(second) * correction + epsilon))
    tl.store(weight + at, moved, mask=real)
    largest, unit = _unit(first)
    code = _code_of(unit, table1)
    # A moment keeps its sign, as in bitsandbytes: a small negative one does not become nothing.
    code = tl.where((unit < 0) & (tl.load(table1 + code) >= 0), code - 1, code)
    tl.store(codes1 + at, code.to(tl.uint8), mask=real)
    tl.store(largest1 + block, largest, mask=block < blocks)
    largest, unit = _unit(second)
    tl.store(codes2 + at, _code_of(unit, table2).to(tl.uint8), mask=real)
    tl.store(largest2 + block, largest, mask=block < blocks)


def update_(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Any],
    numbers_3: Tensor,
    constants: tuple[float, float, float, float],
) -> None:
    """Change N weights and their moments in place; see adamw_8bit.update_."""
    assert weight.dtype == gradient.dtype == torch.float32 and weight.is_contiguous() and gradient.is_contiguous()
    beta1, beta2, epsilon, decay = constants
    blocks = state["absmax1"].numel()
    _step[(triton.cdiv(blocks, _BLOCKS),)](
        weight, gradient, state["state1"], state["state2"], state["qmap1"], state["qmap2"], state["absmax1"],
        state["absmax2"], numbers_3, weight.numel(), blocks, beta1, beta2, 1 - beta1, 1 - beta2, epsilon, decay,
        BLOCKS=_BLOCKS,
    )  # fmt: skip
