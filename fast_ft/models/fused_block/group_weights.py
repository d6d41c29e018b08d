"""The frozen weights of a group of linear layers as its products take them: 16 bits, or 4 that are unpacked each time.

Shapes: N outputs of all layers, n outputs of one layer, E inputs, R ranks of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fast_ft.common import out_of_memory
from fast_ft.models import nf4
from fast_ft.models.fused_block import ops_torch
from fast_ft.models.fused_block.dispatch import ops_for
from fast_ft.models.weight_layout import side_by_side

if TYPE_CHECKING:
    from torch import Tensor

_TOLERANCE = 0.01  #: of the largest weight: both round to 16 bits


def has_4_bits(base: Any) -> bool:
    """Return whether a linear layer's weights are bitsandbytes' 4-bit ones."""
    return hasattr(base.weight, "quant_state")


class Weights:
    """Weights of several layers in the dtype of the products, side by side, (N, E)."""

    def __init__(self, bases: Sequence[Any]) -> None:
        self._whole_NE = side_by_side([base.weight for base in bases])

    def __call__(self) -> Tensor:
        return self._whole_NE

    def into(self, out_NE: Tensor) -> Tensor:
        """Copy the weights there, and return it."""
        return out_NE.copy_(self._whole_NE)

    def beside(self, b_NR: Tensor, room: int) -> Tensor:
        """Never asked for: a group of such weights has no room."""
        raise NotImplementedError

    above = beside


class WeightBuffer:
    """One buffer for the 16-bit weights of the group that is computing. `largest`: how many weights it must hold."""

    def __init__(self) -> None:
        self.largest = 0
        self._buffer: Tensor | None = None

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the buffer's start as (rows, columns). What it held before is lost."""
        if self._buffer is None:
            self._buffer = torch.zeros(self.largest, dtype=dtype, device=device)  # zeros: all of it is finite
        return self._buffer[: rows * columns].view(rows, columns)


class FourBitWeights:
    """NF4 weights of several layers, side by side. Call it for them in 16 bits, (N, E), until the next group's call.

    `beside` and `above` return them together with a LoRA's matrix; `room` is the most that this takes.

    Doubly quantised scales (bytes) stay so: `scale` are the bytes, `nested` = (what each byte stands for, 256; the
    scale, and the offset, of each group of 256 bytes). Else `nested` is None and `scale` is fp32.
    """

    def __init__(self, bases: Sequence[Any], dtype: torch.dtype, buffer: WeightBuffer, room: int = 0) -> None:
        states = [base.weight.quant_state for base in bases]
        self.shape = (sum(state.shape[0] for state in states), states[0].shape[1])
        self.dtype, self._buffer = dtype, buffer
        buffer.largest = max(
            buffer.largest, (self.shape[0] + room) * self.shape[1], self.shape[0] * (self.shape[1] + room)
        )
        # the same bytes, whatever dtype they were stored as (bnb_4bit_quant_storage)
        self.packed = side_by_side([base.weight for base in bases]).view(-1).view(torch.uint8)
        self.scale = torch.cat([state.absmax.view(-1) for state in states])
        for state, part in zip(states, self.scale.split([state.absmax.numel() for state in states]), strict=True):
            state.absmax = part
        self.nested: tuple[Tensor, Tensor, Tensor] | None = None
        if states[0].nested:
            groups = [state.state2.absmax.float().view(-1) for state in states]
            offsets = [torch.full_like(g, float(s.offset)) for g, s in zip(groups, states, strict=True)]
            nested = (states[0].state2.code.float(), torch.cat(groups), torch.cat(offsets))
            if all(state.absmax.numel() % 256 == 0 for state in states):
                self.nested = nested
            else:  # a small layer's last group is not whole, so groups of all do not line up
                parts = zip(states, groups, offsets, strict=True)
                self.scale = torch.cat([ops_torch.scales(s.absmax, (nested[0], g, o)) for s, g, o in parts])
        self.unpack = ops_for(self.packed).unpack

    def __call__(self) -> Tensor:
        return self.into(self._buffer.take(*self.shape, self.dtype, self.packed.device))

    def into(self, out_NE: Tensor) -> Tensor:
        """Write the weights there, in 16 bits, and return it."""
        self.unpack(self.packed, self.scale, self.nested, out_NE)
        return out_NE

    def beside(self, b_NR: Tensor, room: int) -> Tensor:
        """Return [W, B], (N, E + room); what stands behind B is finite."""
        rows, columns = self.shape
        out_NX = self._buffer.take(rows, columns + room, self.dtype, self.packed.device)
        place_NR = out_NX[:, columns : columns + b_NR.shape[1]]
        self.unpack(self.packed, self.scale, self.nested, out_NX[:, :columns], b_NR, place_NR)
        return out_NX

    def above(self, a_RE: Tensor, room: int) -> Tensor:
        """Return [W; A], (N + room, E); what stands below A is finite."""
        rows, columns = self.shape
        out_XE = self._buffer.take(rows + room, columns, self.dtype, self.packed.device)
        self.unpack(self.packed, self.scale, self.nested, out_XE[:rows], a_RE, out_XE[rows : rows + len(a_RE)])
        return out_XE


class MixedWeights(Weights):
    """Weights of layers of which some have 4 bits. Call it for them in 16 bits, (N, E), until the next group's call."""

    def __init__(self, bases: Sequence[Any], dtype: torch.dtype, buffer: WeightBuffer) -> None:
        self.shape = (sum(base.out_features for base in bases), bases[0].in_features)
        self.dtype, self._buffer, self._device = dtype, buffer, bases[0].weight.device
        buffer.largest = max(buffer.largest, self.shape[0] * self.shape[1])
        self._parts = [FourBitWeights([base], dtype, buffer) if has_4_bits(base) else Weights([base]) for base in bases]
        self._widths = [base.out_features for base in bases]

    def __call__(self) -> Tensor:
        out_NE = self._buffer.take(*self.shape, self.dtype, self._device)
        for part, out_nE in zip(self._parts, out_NE.split(self._widths), strict=True):
            part.into(out_nE)
        return out_NE


def check_unpacking(base: Any, dtype: torch.dtype) -> str | None:
    """Return why a 4-bit layer's weights are not unpacked as bitsandbytes unpacks them, or None."""
    try:
        expected_NE = nf4.dequantised(base.weight.data, base.weight.quant_state, torch.float32)
        made_NE = FourBitWeights([base], dtype, WeightBuffer())().float()
        difference = ((made_NE - expected_NE).abs().max() / expected_NE.abs().max()).item()
    except Exception as error:  # a compiler on a card that it does not know may fail in any way
        if out_of_memory.is_short(error):
            raise
        return f"4-bit weights are not unpacked here ({type(error).__name__}: {str(error)[:200]})"
    if not difference <= _TOLERANCE:  # a NaN, too
        return f"unpacked 4-bit weights differ from bitsandbytes' by {difference:.3g} of the largest"
    return None
