"""Linear layers that share an input, side by side as one product, and their LoRA; forward, and backward by hand.

The frozen weights of a group lie one after the other, so that q, k and v are one product. The model's own parameters
become views of them, so nothing is held twice. 4-bit weights are turned to 16 bits in one buffer that all groups
share, once for the forward and once for the backward product.

Shapes: T tokens, E inputs, N outputs of all layers, n outputs of one layer, R ranks of all layers, r rank of one layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fast_ft.models import nf4
from fast_ft.models.fused_block.group_weights import (
    FourBitWeights,
    MixedWeights,
    WeightBuffer,
    Weights,
    has_4_bits,
)
from fast_ft.models.fused_block.lora_copies import LoraCopies
from fast_ft.models.weight_layout import side_by_side

if TYPE_CHECKING:
    from torch import Tensor, nn

_ALIGNED = 8  #: numbers of 16 bits, which are read and written at a time
_COLUMNS = 64  #: products are fastest over rows that are a multiple of 128 bytes long


def base_of(module: Any) -> Any:
    """Return the linear layer below an adapter's, or the layer itself where it has no adapter."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


class LinearGroup:
    """A group of linear layers, with PEFT's LoRA or without: their base weights, and copies of their LoRA's matrices.

    A layer without LoRA counts as one of rank 0. `dtype` is that of the products. `buffer` takes the weights in 16
    bits, where they are stored in 4. There the LoRA's matrices may stand beside them, so that one product does both:

        [x, x A] [W, B]' = x W' + x A B'        [dy, dy B] [W; A] = dy W + dy B A

    `room` is the number of columns that this takes behind x or dy, filled up with zeros; 0 where it is not done, as
    where ranks are large, or no multiple of 8.
    """

    def __init__(
        self, modules: Sequence[nn.Module], dtype: torch.dtype, buffer: WeightBuffer, copies: LoraCopies
    ) -> None:
        bases = [base_of(module) for module in modules]
        self.widths = [base.out_features for base in bases]
        scalings = {module.scaling["default"] for module in modules if hasattr(module, "lora_A")}
        (self.scaling,) = scalings or {1.0}
        self.bias_N = side_by_side([base.bias for base in bases]) if bases[0].bias is not None else None
        self.lora = _matrices(modules)
        self.ranks, self.room = [len(a) for a in self.lora[::2]], 0
        self.a_RE, self._bs = copies.take(self.lora)
        self._is_joint = len(self._bs) == 1
        in_4_bits = [has_4_bits(base) for base in bases]
        self.weights: FourBitWeights | MixedWeights | Weights
        if all(in_4_bits):
            if self._is_joint and len(self.a_RE) % _ALIGNED == 0 and bases[0].in_features % nf4.BLOCK == 0:
                self.room = -(-len(self.a_RE) // _COLUMNS) * _COLUMNS
            self.weights = FourBitWeights(bases, dtype, buffer, self.room)
        else:
            self.weights = MixedWeights(bases, dtype, buffer) if any(in_4_bits) else Weights(bases)

    def forward(self, x_TX: Tensor, add_TN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y_TN, with `add_TN` added to it; x A, TR, which the backward pass needs).

        `x_TX` are the inputs, or inputs and room, which is written over. The base's part and the LoRA's are summed and
        then rounded. Most of what a young LoRA adds is less than half a step of the base's output in bf16: added to the
        rounded output, it is lost in part. A residual stream's few huge numbers in `add_TN` are rounded once, too.
        """
        rank, inputs = self.a_RE.shape
        x_TE, has_room = x_TX[:, :inputs], x_TX.shape[1] > inputs
        weight_NX = self.weights.beside(self._bs[0], self.room) if has_room else self.weights()
        xa_TR = x_TX[:, inputs : inputs + rank] if has_room else x_TE.new_empty(len(x_TE), rank)
        xa_TR.addmm_(x_TE, self.a_RE.t(), beta=0, alpha=self.scaling)  # beta 0: what the memory held is ignored
        if has_room and add_TN is not None and self.bias_N is None:
            return torch.addmm(add_TN, x_TX, weight_NX.t()), xa_TR.contiguous()
        if has_room:
            y_TN = x_TX @ weight_NX.t()
        else:
            y_TN = x_TE.new_empty(len(x_TE), len(weight_NX))
            for y_Tn, xa_Tr, b_nr in self._parts(y_TN, xa_TR):
                y_Tn.addmm_(xa_Tr, b_nr.t(), beta=0)
            y_TN.addmm_(x_TE, weight_NX.t())
        for more in (self.bias_N, add_TN):
            if more is not None:
                y_TN += more
        return y_TN, xa_TR.contiguous()

    def inner_gradient(self, grad_TX: Tensor) -> Tensor:
        """Return the gradient on the LoRA's inner side, TR, given that of y, or y and room, which is written over."""
        rank, outputs = len(self.a_RE), sum(self.widths)
        has_room = grad_TX.shape[1] > outputs
        inner_TR = grad_TX[:, outputs : outputs + rank] if has_room else grad_TX.new_empty(len(grad_TX), rank)
        for grad_Tn, inner_Tr, b_nr in self._parts(grad_TX[:, :outputs], inner_TR):
            inner_Tr.addmm_(grad_Tn, b_nr, beta=0, alpha=self.scaling)
        return inner_TR

    def input_gradient(self, grad_TX: Tensor, inner_TR: Tensor) -> Tensor:
        """Return the gradient of x, TE, given what `inner_gradient` was given, and its result."""
        if grad_TX.shape[1] > sum(self.widths):
            return grad_TX @ self.weights.above(self.a_RE, self.room)
        return (inner_TR @ self.a_RE).addmm_(grad_TX, self.weights())

    def lora_gradients(self, x_TE: Tensor, grad_TN: Tensor, inner_TR: Tensor, xa_TR: Tensor) -> list[Tensor]:
        """Return the gradients of A and B of each layer, in the order of `lora`, fp32."""
        a_rE = _product_fp32(inner_TR.t(), x_TE).split(self.ranks)
        b_nr = [_product_fp32(grad_Tn.t(), xa_Tr) for grad_Tn, xa_Tr, _ in self._parts(grad_TN, xa_TR)]
        if self._is_joint:
            blocks = zip(b_nr[0].split(self.widths), self.ranks, itertools.accumulate(self.ranks), strict=True)
            b_nr = [rows_nR[:, end - rank : end] for rows_nR, rank, end in blocks]
        return [each for pair in zip(a_rE, b_nr, strict=True) for each in pair]

    def _parts(self, outer_TN: Tensor, inner_TR: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Return what belongs to each matrix B: columns of outputs, columns of the LoRA's inner side, the matrix."""
        if self._is_joint:
            return [(outer_TN, inner_TR, self._bs[0])]
        return zip(outer_TN.split(self.widths, 1), inner_TR.split(self.ranks, 1), self._bs, strict=True)


def _matrices(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return A and B of each layer: fp32 parameters (r, E) and (n, r); empty ones where it has no LoRA."""
    found: list[Tensor] = []
    for module in modules:
        base = base_of(module)
        if hasattr(module, "lora_A"):
            found += [module.lora_A["default"].weight, module.lora_B["default"].weight]
        else:
            device = base.weight.device
            sizes = ((0, base.in_features), (base.out_features, 0))
            found += [torch.zeros(*size, device=device) for size in sizes]
    return found


def _product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Return a product in fp32: its sums are so already, and are not rounded to 16 bits first, on a card."""
    if left.is_cuda and left.element_size() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
