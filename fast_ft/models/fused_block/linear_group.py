"""Linear layers that share an input, side by side as one product, and their LoRA; forward, and backward by hand.

The frozen weights of a group lie one after the other, so that q, k and v are one product. The model's own parameters
become views of them, so nothing is held twice. 4-bit weights are turned to 16 bits in one buffer that all groups
share, once for the forward and once for the backward product.

Shapes: T tokens, E inputs, N outputs of all layers, n outputs of one layer, R ranks of all layers, r rank of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fast_ft.models.fused_block import ops_torch
from fast_ft.models.fused_block.dispatch import ops_for
from fast_ft.models.weight_layout import side_by_side

if TYPE_CHECKING:
    from torch import Tensor, nn

_TOLERANCE = 0.01  #: of the largest weight: both round to 16 bits


def base_of(module: Any) -> Any:
    """Return the linear layer below an adapter's, or the layer itself where it has no adapter."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


class LinearGroup:
    """A group of linear layers, with PEFT's LoRA or without: their base weights, and where their LoRA's matrices are.

    A layer without LoRA counts as one of rank 0. `dtype` is that of the products. `buffer` takes the weights in 16
    bits, where they are stored in 4.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, buffer: WeightBuffer) -> None:
        bases = [base_of(module) for module in modules]
        self.modules, self.dtype = list(modules), dtype
        self.widths = [base.out_features for base in bases]
        self.inputs = bases[0].in_features
        scalings = {module.scaling["default"] for module in modules if hasattr(module, "lora_A")}
        (self.scaling,) = scalings or {1.0}
        self.bias_N = side_by_side([base.bias for base in bases]) if bases[0].bias is not None else None
        if hasattr(bases[0].weight, "quant_state"):
            self._weights: Callable[[], Tensor] = FourBitWeights(bases, dtype, buffer)
        else:
            whole_NE = side_by_side([base.weight for base in bases])
            self._weights = lambda: whole_NE

    def lora(self) -> list[Tensor]:
        """Return A and B of each layer: fp32 parameters (r, E) and (n, r); empty ones where it has no LoRA."""
        found: list[Tensor] = []
        for module, width in zip(self.modules, self.widths, strict=True):
            if hasattr(module, "lora_A"):
                found += [module.lora_A["default"].weight, module.lora_B["default"].weight]
            else:
                like = base_of(module).weight
                found += [torch.zeros(*size, device=like.device) for size in ((0, self.inputs), (width, 0))]
        return found

    def forward(
        self, x_TE: Tensor, lora: Sequence[Tensor], add_TN: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (y_TN, with `add_TN` added to it; the tensors that the backward pass needs as `kept`).

        `add_TN` comes last: a residual stream's few huge numbers are rounded once, not before the LoRA and after it.
        """
        a_RE = torch.cat([a.to(self.dtype) for a in lora[::2]]) * self.scaling  # here alone: it scales B's side too
        bs = [b.to(self.dtype) for b in lora[1::2]]
        weight_NE = self._weights()
        y_TN = x_TE @ weight_NE.t()
        if self.bias_N is not None:
            y_TN += self.bias_N
        xa_TR = x_TE @ a_RE.t()
        for y_Tn, xa_Tr, b_nr in zip(y_TN.split(self.widths, 1), xa_TR.split(_ranks(bs), 1), bs, strict=True):
            y_Tn.addmm_(xa_Tr, b_nr.t())
        if add_TN is not None:
            y_TN += add_TN
        return y_TN, (a_RE, xa_TR, *bs)

    def input_gradient(self, grad_TN: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return (the gradient of x, TE; the gradient on the LoRA's inner side, TR)."""
        a_RE, xa_TR, *bs = kept
        inner_TR = torch.empty_like(xa_TR)
        parts = zip(inner_TR.split(_ranks(bs), 1), grad_TN.split(self.widths, 1), bs, strict=True)
        for inner_Tr, grad_Tn, b_nr in parts:
            inner_Tr.addmm_(grad_Tn, b_nr, beta=0)  # beta 0: what the memory held before is ignored
        grad_TE = grad_TN @ self._weights()
        return grad_TE.addmm_(inner_TR, a_RE), inner_TR

    def lora_gradients(self, x_TE: Tensor, grad_TN: Tensor, inner_TR: Tensor, kept: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the gradients of A and B of each layer, in the order of `lora`, fp32."""
        _, xa_TR, *bs = kept
        ranks = _ranks(bs)
        a_RE = (inner_TR.t() @ x_TE).float() * self.scaling
        grads: list[Tensor] = []
        parts = zip(a_RE.split(ranks), grad_TN.split(self.widths, 1), xa_TR.split(ranks, 1), strict=True)
        for a_rE, grad_Tn, xa_Tr in parts:
            grads += [a_rE, (grad_Tn.t() @ xa_Tr).float()]
        return grads


class WeightBuffer:
    """One buffer for the 16-bit weights of the group that is computing. `largest`: how many weights it must hold."""

    def __init__(self) -> None:
        self.largest = 0
        self._buffer: Tensor | None = None

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the buffer's start as (rows, columns). What it held before is lost."""
        if self._buffer is None:
            self._buffer = torch.empty(self.largest, dtype=dtype, device=device)
        return self._buffer[: rows * columns].view(rows, columns)


class FourBitWeights:
    """NF4 weights of several layers, side by side. Call it for them in 16 bits, (N, E), until the next group's call.

    Doubly quantised scales (bytes) stay so: `scale` are the bytes, `nested` = (what each byte stands for, 256; the
    scale, and the offset, of each group of 256 bytes). Else `nested` is None and `scale` is fp32.
    """

    def __init__(self, bases: Sequence[Any], dtype: torch.dtype, buffer: WeightBuffer) -> None:
        states = [base.weight.quant_state for base in bases]
        self.shape = (sum(state.shape[0] for state in states), states[0].shape[1])
        self.dtype, self._buffer = dtype, buffer
        buffer.largest = max(buffer.largest, self.shape[0] * self.shape[1])
        self.packed = side_by_side([base.weight for base in bases]).view(-1)
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
        out = self._buffer.take(*self.shape, self.dtype, self.packed.device)
        self.unpack(self.packed, self.scale, self.nested, out)
        return out


def check_unpacking(base: Any, dtype: torch.dtype) -> str | None:
    """Return why a 4-bit layer's weights are not unpacked as bitsandbytes unpacks them, or None."""
    from bitsandbytes.functional import dequantize_4bit

    try:
        expected_NE = dequantize_4bit(base.weight.data, base.weight.quant_state).float()
        made_NE = FourBitWeights([base], dtype, WeightBuffer())().float()
        difference = ((made_NE - expected_NE).abs().max() / expected_NE.abs().max()).item()
    except Exception as error:  # a compiler on a card that it does not know may fail in any way
        return f"4-bit weights are not unpacked here ({type(error).__name__}: {str(error)[:200]})"
    if not difference <= _TOLERANCE:  # a NaN, too
        return f"unpacked 4-bit weights differ from bitsandbytes' by {difference:.3g} of the largest"
    return None


def _ranks(bs: Sequence[Tensor]) -> list[int]:
    return [b.shape[1] for b in bs]
