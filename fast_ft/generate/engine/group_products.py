"""How each group of linear layers with one input is multiplied: chosen from the group's own weights.

    4 bits on a card, no DoRA, and a way     decoded in registers for few rows (nf4_linear.InRegisters)
    4 bits on a card                         nf4_linear.pieces, or 16 bits once and for all where `dequantise` says so
    4 bits on a CPU                          the layers as they are
    16 or 32 bits                            one dense product, or packed where packed_linear serves the whole model

A base may leave some layers in 16 bits where the others have 4 (config.json's llm_int8_skip_modules), within a group,
too: neighbours of one kind are then one product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fast_ft.generate.engine.nf4_linear import InRegisters, Way, dequantised, pieces
from fast_ft.generate.engine.packed_linear import PackedProduct
from fast_ft.generate.engine.projections import BaseProduct, Product, apart, base_of, dense, has_dora


def groups_of(layer: Any) -> tuple[tuple[nn.Module, ...], ...]:
    """Return a block's linear layers as they share an input: q, k and v; o; gate and up; down."""
    a, m = layer.self_attn, layer.mlp
    return (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,)


def is_decodable(modules: Sequence[nn.Module]) -> bool:
    """Return whether a group's weights can be decoded in registers, if there is a way for them here."""
    return not has_dora(modules) and all(_is_4bit_on_card(base_of(module)) for module in modules)


@dataclass(frozen=True)
class GroupProducts:
    """Makes the product of each group of one model.

    `way` decodes 4-bit weights in registers for few rows; None: none does here. `dequantise`: the others become 16-bit
    ones once and for all; else they pass through one buffer of `workspace_mib`, small enough to stay in a large card's
    cache in part. `packs`: the weights are packed for a CPU.
    """

    dtype: torch.dtype
    device: torch.device
    way: Way | None
    dequantise: bool
    packs: bool
    workspace_mib: int

    def __call__(self, modules: Sequence[nn.Module]) -> InRegisters | Product:
        """Return the product of a group's layers, LoRA included."""
        bases = [base_of(module) for module in modules]
        if self.way is not None and is_decodable(modules):
            return InRegisters(self.way, modules, bases, self.dtype, self._space)
        if self.packs:
            return PackedProduct(modules, bases)
        parts = [self._linear(list(run)) for _, run in itertools.groupby(bases, _kind)]
        return Product(modules, parts[0] if len(parts) == 1 else apart(parts), self.dtype)

    def _linear(self, bases: Sequence[Any]) -> BaseProduct:
        """Return the product of layers of one kind, without LoRA."""
        if type(bases[0]).__name__ == "Linear":
            return dense(bases)
        if not _is_4bit_on_card(bases[0]):
            return apart(bases)
        if self.dequantise:
            return dequantised(bases, self.dtype)
        return pieces(bases, self.dtype, self._space)

    @cached_property
    def _space(self) -> Tensor:
        return torch.empty(self.workspace_mib * 2**19, dtype=self.dtype, device=self.device)


def _kind(base: Any) -> tuple[str, bool]:
    return type(base).__name__, _is_4bit_on_card(base)


def _is_4bit_on_card(base: Any) -> bool:
    return base.weight.is_cuda and hasattr(base.weight, "quant_state")
