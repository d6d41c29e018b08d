"""Linear layers that share an input, side by side as one product, and their LoRA; forward, and backward by hand.

The frozen weights of a group lie one after the other, so that q, k and v are one product; the model's own parameters
become views of them, and nothing is held twice. 4-bit weights are turned to 16 bits into one buffer that all groups
share, once for the forward and once for the backward product.

Shapes: T tokens, E inputs, N outputs of all layers, R ranks of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fast_ft.models.fused_block import ops_torch
from fast_ft.models.fused_block.dispatch import ops_for


class LinearGroup:
    """A group: base weights, and the places of its LoRA's matrices. `space` is the buffer for 16-bit weights."""

    def __init__(self, modules: Sequence[Any], dtype: Any, space: Space) -> None:
        bases = [module.get_base_layer() for module in modules]
        self.modules, self.dtype = list(modules), dtype
        self.widths = [base.out_features for base in bases]
        self.inputs = bases[0].in_features
        (self.scaling,) = {module.scaling["default"] for module in modules}
        self.bias_N = side_by_side([base.bias for base in bases]) if bases[0].bias is not None else None
        if hasattr(bases[0].weight, "quant_state"):
            self._weights: Any = FourBitWeights(bases, dtype, space)
        else:
            whole_NE = side_by_side([base.weight for base in bases])
            self._weights = lambda: whole_NE

    def lora(self) -> list[Any]:
        """Return A and B of each layer: fp32 parameters (r, E) and (n, r)."""
        return [part["default"].weight for module in self.modules for part in (module.lora_A, module.lora_B)]

    def forward(self, x_TE: Any, lora: Sequence[Any], add_TN: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """Return (y_TN, with `add_TN` added to it; what `backward` wants to see again)."""
        import torch

        a_RE = torch.cat([a.to(self.dtype) for a in lora[::2]]) * self.scaling  # here alone: it scales B's side too
        bs = [b.to(self.dtype) for b in lora[1::2]]
        weight_NE = self._weights()
        y_TN = x_TE @ weight_NE.t() if add_TN is None else torch.addmm(add_TN, x_TE, weight_NE.t())
        if self.bias_N is not None:
            y_TN += self.bias_N
        xa_TR = x_TE @ a_RE.t()
        for y_Tn, xa_Tr, b_nr in zip(y_TN.split(self.widths, 1), xa_TR.split(_ranks(bs), 1), bs, strict=True):
            y_Tn.addmm_(xa_Tr, b_nr.t())
        return y_TN, (a_RE, xa_TR, *bs)

    def input_gradient(self, grad_TN: Any, kept: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return (the gradient of x, TE; the gradient on the LoRA's inner side, TR)."""
        import torch

        a_RE, xa_TR, *bs = kept
        inner_TR = torch.empty_like(xa_TR)
        parts = zip(inner_TR.split(_ranks(bs), 1), grad_TN.split(self.widths, 1), bs, strict=True)
        for inner_Tr, grad_Tn, b_nr in parts:
            inner_Tr.addmm_(grad_Tn, b_nr, beta=0)  # beta 0: what the memory held does not count
        grad_TE = grad_TN @ self._weights()
        return grad_TE.addmm_(inner_TR, a_RE), inner_TR

    def lora_gradients(self, x_TE: Any, grad_TN: Any, inner_TR: Any, kept: tuple[Any, ...]) -> list[Any]:
        """Return the gradients of A and B of each layer, in the order of `lora`, fp32."""
        _, xa_TR, *bs = kept
        ranks = _ranks(bs)
        a_RE = (inner_TR.t() @ x_TE).float() * self.scaling
        grads: list[Any] = []
        parts = zip(a_RE.split(ranks), grad_TN.split(self.widths, 1), xa_TR.split(ranks, 1), strict=True)
        for a_rE, grad_Tn, xa_Tr in parts:
            grads += [a_rE, (grad_Tn.t() @ xa_Tr).float()]
        return grads


class Space:
    """One buffer for the 16-bit weights of whichever group is at work."""

    def __init__(self) -> None:
        self.largest = 0
        self._buffer: Any = None

    def take(self, rows: int, columns: int, dtype: Any, device: Any) -> Any:
        import torch

        if self._buffer is None:
            self._buffer = torch.empty(self.largest, dtype=dtype, device=device)
        return self._buffer[: rows * columns].view(rows, columns)


class FourBitWeights:
    """NF4 weights of several layers, side by side; call it for them in 16 bits (N, E), until the next group's call."""

    def __init__(self, bases: Sequence[Any], dtype: Any, space: Space) -> None:
        import torch

        states = [base.weight.quant_state for base in bases]
        self.shape = (sum(state.shape[0] for state in states), states[0].shape[1])
        self.dtype, self._space = dtype, space
        space.largest = max(space.largest, self.shape[0] * self.shape[1])
        self.packed = side_by_side([base.weight for base in bases]).view(-1)
        self.scale = torch.cat([state.absmax.view(-1) for state in states])
        for state, part in zip(states, self.scale.split([state.absmax.numel() for state in states]), strict=True):
            state.absmax = part
        self.nested: Any = None
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

    def __call__(self) -> Any:
        out = self._space.take(*self.shape, self.dtype, self.packed.device)
        self.unpack(self.packed, self.scale, self.nested, out)
        return out


def _ranks(bs: Sequence[Any]) -> list[int]:
    return [b.shape[1] for b in bs]


def side_by_side(parameters: Sequence[Any]) -> Any:
    """Return all of them one after the other; they themselves become views of it."""
    import torch

    if len(parameters) == 1:
        return parameters[0].data
    if _lie_so(parameters):
        first = parameters[0].data
        return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
    whole = torch.cat([each.data for each in parameters])
    start = 0
    for each in parameters:
        each.data = whole[start : start + len(each)]
        start += len(each)
    return whole


def _lie_so(parameters: Sequence[Any]) -> bool:
    """Tell whether they lie one after the other already: training's blocks and decoding share them in a sweep."""
    memory, at = parameters[0].untyped_storage().data_ptr(), parameters[0].storage_offset()
    for each in parameters:
        if not each.is_contiguous() or (each.untyped_storage().data_ptr(), each.storage_offset()) != (memory, at):
            return False
        at += each.numel()
    return True
