"""Products: linear layers with one input, side by side, and their LoRA.

Each LoRA is two products: all A matrices stacked, all B matrices block-diagonal. Where weights are put side by side,
the model's own parameters become views, so nothing is held twice.

Shapes: T tokens, E inputs, N outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fast_ft.models.nf4 import Order
from fast_ft.models.weight_layout import side_by_side

Linear = Callable[[Tensor], Tensor]  #: TE to TN


class BaseProduct(Protocol):
    """Products of a base's layers without LoRA, TE to TN. `add_TN` is what to add; it may be written over.

    Where it can be, that is added before the sum is rounded: part of what a LoRA adds in bf16 is lost otherwise, since
    it is less than half a step of the base's rounded output.
    """

    def __call__(self, x_TE: Tensor, add_TN: Tensor | None = None, /) -> Tensor:
        """Return the layers' outputs, and `add_TN` with them."""


class Product:
    """Call it with TE; it returns TN. `base` is how the base's weights are multiplied.

    DoRA scales the whole of an output but for its bias.
    """

    def __init__(self, modules: Sequence[nn.Module], base: BaseProduct, dtype: torch.dtype) -> None:
        self.base, self.inputs = base, base_of(modules[0]).in_features
        self.a_ER, self.b_RN = lora(modules, dtype)
        self.size_N = self.shift_N = None
        if has_dora(modules):
            size_N = dora_sizes(modules)
            bias_N = bias_of([base_of(module) for module in modules])
            self.size_N = size_N.to(dtype)
            self.shift_N = None if bias_N is None else (bias_N.float() * (1 - size_N)).to(dtype)
            assert self.b_RN is not None, "DoRA comes with LoRA"
            self.b_RN = (self.b_RN.float() * size_N).to(dtype)

    def first(self, tokens: int) -> None:
        """Return None: a product of this kind computes x A itself."""

    def order(self, rows: int) -> Order:
        """Return the order in which the product wants x: row after row."""
        return Order.ROWS

    def __call__(self, x_TE: Tensor, few: bool = False, first: None = None) -> Tensor:
        if self.a_ER is None or self.b_RN is None:
            return self.base(x_TE)
        xa_TR = x_TE @ self.a_ER
        if self.size_N is None:
            return self.base(x_TE, xa_TR @ self.b_RN)
        y_TN = self.base(x_TE)
        y_TN = y_TN * self.size_N if self.shift_N is None else torch.addcmul(self.shift_N, y_TN, self.size_N)
        return y_TN.addmm_(xa_TR, self.b_RN)


def base_of(module: nn.Module) -> Any:
    """Return the linear layer below an adapter's."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def lora(modules: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return (A stacked, ER; B block-diagonal and scaled, RN), or (None, None) where no adapter is active."""
    a_parts, b_parts, at = [], [], 0
    width = sum(base_of(module).out_features for module in modules)
    for module in modules:
        wide = base_of(module).out_features
        if hasattr(module, "lora_A") and not module.disable_adapters:
            for name in module.active_adapters:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                row = torch.zeros(b.shape[1], width, dtype=dtype, device=b.device)
                row[:, at : at + wide] = (b.float() * module.scaling[name]).T.to(dtype)
                a_parts.append(a.to(dtype))
                b_parts.append(row)
        at += wide
    return (torch.cat(a_parts).T.contiguous(), torch.cat(b_parts)) if a_parts else (None, None)


def padded_ranks(ranks: int) -> int:
    """Return to how many ranks a LoRA is filled up: kernels take 16 at a time."""
    return -(-ranks // 16) * 16


def ranks_of(modules: Sequence[Any]) -> int:
    """Return the ranks of these layers' active adapters, padded."""
    active = [module for module in modules if hasattr(module, "lora_A") and not module.disable_adapters]
    return padded_ranks(sum(len(module.lora_A[name].weight) for module in active for name in module.active_adapters))


def has_dora(modules: Sequence[Any]) -> bool:
    """Return whether an active adapter of one of these layers is DoRA."""
    return any(getattr(module, "lora_magnitude_vector", None) and not module.disable_adapters for module in modules)


def dora_sizes(modules: Sequence[Any]) -> Tensor:
    """Return DoRA's factor on each output, N, fp32: its trained size over the norm of its weights, LoRA's included.

    Source: arXiv 2402.09353, equation 5; computed as PEFT's DoraLinearLayer does. 1 where a layer is no DoRA.
    """
    from peft.utils.integrations import dequantize_module_weight

    parts = []
    for module in modules:
        base = base_of(module)
        weight_NE = dequantize_module_weight(base).float()
        if not has_dora([module]):
            parts.append(torch.ones(len(weight_NE), device=weight_NE.device))
            continue
        (name,) = module.active_adapters
        a, b = module.lora_A[name].weight.float(), module.lora_B[name].weight.float()
        norm_N = torch.linalg.norm(weight_NE + module.scaling[name] * (b @ a), dim=1)
        parts.append(module.lora_magnitude_vector[name].weight.float() / norm_N)
    return torch.cat(parts)


def bias_of(bases: Sequence[Any]) -> Tensor | None:
    """Return the layers' biases side by side, or None."""
    return torch.cat([base.bias for base in bases]) if bases[0].bias is not None else None


def dense(bases: Sequence[Any]) -> BaseProduct:
    """Return one product with 16 or 32-bit weights."""
    return in_one(side_by_side([base.weight for base in bases]), bias_of(bases))


def in_one(weight_NE: Tensor, bias_N: Tensor | None) -> BaseProduct:
    """Return the product with these weights."""

    def product(x_TE: Tensor, add_TN: Tensor | None = None) -> Tensor:
        if add_TN is None:
            return linear(x_TE, weight_NE, bias_N)
        if bias_N is not None:
            add_TN += bias_N
        return add_TN.addmm_(x_TE, weight_NE.t())

    return product


def apart(products: Sequence[BaseProduct]) -> BaseProduct:
    """Return several products of one input as one: of layers as they are, or of runs of layers of one kind."""

    def product(x_TE: Tensor, add_TN: Tensor | None = None) -> Tensor:
        y_TN = torch.cat([each(x_TE) for each in products], dim=-1)
        return y_TN if add_TN is None else y_TN.add_(add_TN)

    return product
