"""The KV cache's tensors: keys and values of all sequences, in the pages that block_manager.py hands out.

With 8 bits, each token's key and value of each head are integers of -127 to 127, times a scale and plus a middle of
their own. A few channels of keys are much larger than the others, and would take most of the range. So queries and keys
are turned by one more orthogonal matrix, Hadamard's, which spreads each channel over all of a head and leaves their
products as they are (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from collections.abc import Sized
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from fast_ft.generate.engine.block_manager import PAGE

_COPIED = 256  #: cells at a time, of all layers: a 7B's take 64 MiB on their way


class CachedModel(Protocol):
    """What a cache must know of a model: FusedModel has it."""

    @property
    def layers(self) -> Sized:
        """The layers."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class KVCache:
    """Keys and values of every layer, (layers, cells, KV heads, head dimension); page 0 is nobody's.

    They are in the model's dtype; with `bits` 8 in int8, and `scales` are theirs in the model's dtype: (layers, 2, 2,
    cells, KV heads), keys first, and of each the scales first and then the middles.
    """

    def __init__(self, model: CachedModel, pages: int, *, bits: int = 16) -> None:
        self.pages, self.dtype = pages, model.dtype
        shape = (len(model.layers), (pages + 1) * PAGE, model.kv_heads, model.head_dim)
        kind = torch.int8 if bits == 8 else model.dtype
        self.keys = torch.zeros(shape, dtype=kind, device=model.device)
        self.values = torch.zeros(shape, dtype=kind, device=model.device)
        self.scales: Tensor | None = None
        if bits == 8:
            self.scales = torch.zeros(shape[0], 2, 2, *shape[1:3], dtype=model.dtype, device=model.device)

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a layer's keys, values and scales, as the kernels take them."""
        return self.keys[index], self.values[index], None if self.scales is None else self.scales[index]

    def read(self, index: int, cell_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values in some cells, TGD, in the model's dtype."""
        keys, values, scales = self.layer(index)
        if scales is None:
            return keys[cell_T], values[cell_T]
        return (
            dequantised(keys[cell_T], scales[0, :, cell_T], self.dtype),
            dequantised(values[cell_T], scales[1, :, cell_T], self.dtype),
        )

    def copy(self, source_T: Tensor, target_T: Tensor) -> None:
        """Copy cells `source_T` to cells `target_T`, in all layers."""
        for source, target in zip(source_T.split(_COPIED), target_T.split(_COPIED), strict=True):
            self.keys.index_copy_(1, target, self.keys[:, source])
            self.values.index_copy_(1, target, self.values[:, source])
            if self.scales is not None:
                self.scales.index_copy_(3, target, self.scales[:, :, :, source])


@lru_cache(maxsize=4)
def spreading(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Hadamard's matrix over a head's numbers, orthogonal and symmetric, DD.

    Where the head dimension is no power of two, it is that of its largest such part, once for each.
    """
    block = width & -width
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return torch.block_diag(*[matrix / block**0.5] * (width // block)).to(device, dtype)


def quantised(x_TGD: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 numbers, TGD, and the scale and the middle of each token and head, (2, T, G) in x's dtype."""
    lowest_TG, highest_TG = x_TGD.float().aminmax(dim=-1)
    scales = torch.stack([(highest_TG - lowest_TG) / 254, (highest_TG + lowest_TG) / 2]).to(x_TGD.dtype)
    scale_TG1, middle_TG1 = scales.float()[..., None].unbind()
    steps_TGD = (x_TGD.float() - middle_TG1) / scale_TG1.clamp(min=1e-30)
    return (steps_TGD + 0.5).floor().clamp(-127, 127).to(torch.int8), scales


def dequantised(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `quantised` took, but for its rounding; `scales` is (2, as `x` without its last dimension)."""
    scale, middle = scales.float()[..., None].unbind()
    return torch.addcmul(middle, x.float(), scale).to(dtype)
