"""The KV cache's tensors: keys and values of all sequences, in the pages that block_manager.py hands out."""

from __future__ import annotations

from collections.abc import Sized
from typing import Protocol

import torch
from torch import Tensor

from fast_ft.generate.engine.block_manager import PAGE


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
    """Keys and values of every layer, (layers, cells, KV heads, head dimension); page 0 is nobody's."""

    def __init__(self, model: CachedModel, pages: int) -> None:
        self.pages = pages
        shape = (len(model.layers), (pages + 1) * PAGE, model.kv_heads, model.head_dim)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros(shape, dtype=model.dtype, device=model.device)

    def copy(self, source_T: Tensor, target_T: Tensor) -> None:
        """Copy cells `source_T` to cells `target_T`, in all layers."""
        for part in (self.keys, self.values):
            for layer in part:
                layer.index_copy_(0, target_T, layer[source_T])
