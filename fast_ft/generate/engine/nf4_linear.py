"""Products with 4-bit weights on a GPU, in the way that suits the card and the number of rows.

    InRegisters    few rows: decoded in registers by the first of nf4_hopper.py, nf4_mma.py and nf4_triton.py that can
                   on this card; many: dequantised in pieces, multiplied
    pieces         bitsandbytes' fused product for few rows, else dequantised in pieces: where the kernel does not work
    dequantised    to 16 bits once and for all: where memory allows it

The scales' own quantisation is undone once (0.4 GiB in a 7B), which saves two kernels a weight and step.

Shapes: T tokens, E inputs, N outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fast_ft.generate.engine.first_half import FirstHalf, first_half
from fast_ft.generate.engine.projections import BaseProduct, bias_of, in_one, lora, padded_ranks
from fast_ft.models import nf4
from fast_ft.models.weight_layout import side_by_side

FEW = 128  #: rows up to which weights are decoded in registers: more would take more registers than there are


class Way(Protocol):
    """A module that multiplies few rows with weights decoded in registers.

    MULTIPLE: of inputs. CAPABILITY: of the oldest card on which it is fast; NEWEST: of the newest that runs it, if any.
    """

    __name__: str
    NAME: str
    MULTIPLE: int
    CAPABILITY: tuple[int, int]
    NEWEST: tuple[int, int] | None

    def order_for(self, rows: int) -> nf4.Order:
        """Return the order in which `product` wants that many rows of x."""

    def product(self, x_MK: Tensor, words: Tensor, scales: Tensor, xa_MR: Tensor | None, b_NR: Tensor | None) -> Tensor:
        """Return the product, MN, or parts of it in fp32, (parts, M, N), to be added in their order."""

    def parts_for(self, rows: int, outputs: int, inputs: int, device: torch.device) -> int:
        """Return how many parts a product is left in."""

    def compare(
        self, x_MK: Tensor, words: Tensor, scales: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Return x's products for each kind of kernel that products of these (outputs, inputs) take."""


def ways() -> list[Way]:
    """Return the ways for few rows, the fastest first."""
    from fast_ft.generate.engine import nf4_hopper, nf4_mma, nf4_triton

    return [nf4_hopper, nf4_mma, nf4_triton]


def first_way(shapes: Sequence[tuple[int, int]], device: torch.device) -> Way:
    """Return the fastest way that takes weights of these (outputs, inputs) on this card. ValueError if none does."""
    for way in ways():
        try:
            check_shapes(way, shapes, device)
        except ValueError as error:
            problem = error
        else:
            return way
    raise problem


class InRegisters:
    """A product, LoRA included: TN, or parts to be added, (parts, T, N).

    Called with `few`, x has at most FEW rows, in the order that the way wants; whatever made x has then computed LoRA's
    first half.
    """

    def __init__(
        self, way: Way, modules: Sequence[nn.Module], bases: Sequence[Any], dtype: torch.dtype, space: Tensor
    ) -> None:
        from fast_ft.generate.engine import nf4_triton

        self.way, self.dequantise = way, nf4_triton.dequantise
        states = [base.weight.quant_state for base in bases]
        outputs, inputs = sum(state.shape[0] for state in states), states[0].shape[1]
        absmax = torch.cat([_scales(state) for state in states])
        self.scales = nf4.pack_scales(absmax, dtype).view(outputs, inputs // nf4.BLOCK).T.contiguous()
        self.words = side_by_side([base.weight for base in bases]).view(-1).view(torch.int32).view(outputs, inputs // 8)
        self.a_ER, b_RN = lora(modules, dtype)
        self.b_NR: Tensor | None = None
        if self.a_ER is not None and b_RN is not None:
            more = padded_ranks(self.a_ER.shape[1]) - self.a_ER.shape[1]
            self.a_ER = pad(self.a_ER, (0, more)).contiguous()
            self.b_NR = pad(b_RN.T, (0, more)).contiguous()
        self.inputs, self.pieces = inputs, _pieces(outputs, inputs, space)

    def first(self, tokens: int) -> FirstHalf | None:
        """Return what the kernel that makes x must compute beside it for few rows: x A, where there is a LoRA."""
        return None if self.a_ER is None else first_half(self.a_ER, tokens)

    def order(self, rows: int) -> nf4.Order:
        """Return the order in which the product wants that many rows of x, called with `few`."""
        return self.way.order_for(rows)

    def __call__(self, x_TE: Tensor, few: bool = False, first: FirstHalf | None = None) -> Tensor:
        """Return the product; for few rows `first` holds x A already."""
        if few:
            xa_TR = None if first is None else first.xa_TR
            return self.way.product(x_TE, self.words, self.scales, xa_TR, self.b_NR)
        if self.a_ER is None or self.b_NR is None:
            y_TN, beta = x_TE.new_empty(len(x_TE), len(self.words)), 0  # what the memory held is ignored
        else:
            y_TN, beta = (x_TE @ self.a_ER) @ self.b_NR.T, 1
        for a, b, weight_NE in self.pieces:
            self.dequantise(self.words[a:b], self.scales[:, a:b], weight_NE)
            y_TN[:, a:b].addmm_(x_TE, weight_NE.T, beta=beta)
        return y_TN


def check_layer(way: Way, base: Any) -> None:
    """Raise where a way cannot take weights like these."""
    state = base.weight.quant_state
    outputs, inputs = state.shape
    if (state.quant_type, state.blocksize) != ("nf4", nf4.BLOCK) or base.bias is not None:
        raise ValueError("the weights are not NF4 in blocks of 64, without bias")
    check_shapes(way, [(outputs, inputs)], base.weight.device)


def check_shapes(way: Way, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
    """Raise ValueError where a way cannot take weights of these (outputs, inputs) on this card."""
    if any(inputs % way.MULTIPLE or outputs % 4 for outputs, inputs in shapes):
        raise ValueError(f"not all weights have a multiple of {way.MULTIPLE} inputs and of 4 outputs")
    capability = torch.cuda.get_device_capability(device)
    if capability < way.CAPABILITY:
        raise ValueError("the card is older than {}.{}, from where on this is fast".format(*way.CAPABILITY))
    if way.NEWEST is not None and capability > way.NEWEST:
        raise ValueError("the card is newer than {}.{}, the last that has these instructions".format(*way.NEWEST))


def compare_few(way: Way, dtype: str, device: str, rows: int, shapes: Sequence[tuple[int, int]]) -> None:
    """Raise where a way's products of `rows` rows do not say what bitsandbytes' weights say.

    `shapes` are (outputs, inputs) of the products that will run: each is tried as it will be cut, on smaller weights,
    so that what decoding runs is compiled here.
    """
    kind = getattr(torch, dtype)
    layer, expected_NE = _small_layer(kind, device)
    product = InRegisters(way, [layer], [layer], kind, torch.empty(256 * 512, dtype=kind, device=device))
    x_TE = _normal(rows, 512, kind, device)
    made = way.compare(nf4.arranged(x_TE, way.order_for(rows)), product.words, product.scales, shapes)
    _refuse(made, x_TE, expected_NE, dtype)


def compare_many(dtype: str, device: str) -> None:
    """Raise where the product of many rows, with dequantised weights, does not say what bitsandbytes' weights say."""
    kind = getattr(torch, dtype)
    layer, expected_NE = _small_layer(kind, device)
    product = InRegisters(ways()[0], [layer], [layer], kind, torch.empty(256 * 512, dtype=kind, device=device))
    x_TE = _normal(FEW + 1, 512, kind, device)
    _refuse({"dequantised": product(x_TE)}, x_TE, expected_NE, dtype)


def _refuse(made: dict[str, Tensor], x_TE: Tensor, weight_NE: Tensor, dtype: str) -> None:
    """Raise where one of these, a product or its parts, is not x times the weights."""
    expected_TN = x_TE.float() @ weight_NE.float().T
    for way, y in made.items():
        y_TN = y.sum(dim=0) if y.dim() == 3 else y
        off = ((y_TN.float() - expected_TN).norm() / expected_TN.norm()).item()
        if not off < (0.002 if dtype == "float16" else 0.02):  # a NaN, too
            raise RuntimeError(f"the product of {len(x_TE)} rows is off by {off:.4f} ({way})")


def compare_pieces(dtype: str, device: str) -> None:
    """Raise where bitsandbytes' own products, fused and dequantised in pieces, do not say what its weights say."""
    kind = getattr(torch, dtype)
    layer, expected_NE = _small_layer(kind, device)
    product = pieces([layer], kind, torch.empty(256 * 512, dtype=kind, device=device))
    few = fused_rows(torch.device(device))
    for rows in (1, few, few + 1):
        x_TE = _normal(rows, 512, kind, device)
        _refuse({"bitsandbytes' own": product(x_TE)}, x_TE, expected_NE, dtype)


def _small_layer(dtype: torch.dtype, device: str) -> tuple[Any, Tensor]:
    """Return a linear layer of random 4-bit weights, 384 outputs by 512 inputs, and the weights in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(_normal(384, 512, dtype, device), quant_type="nf4", compress_statistics=True)
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.quant_state = state
    return SimpleNamespace(weight=weight, bias=None, out_features=384), dequantize_4bit(packed, state)


def _normal(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    draw = torch.Generator(device).manual_seed(rows)
    return torch.randn(rows, columns, generator=draw, device=device, dtype=torch.float32).to(dtype)


def pieces(bases: Sequence[Any], dtype: torch.dtype, space: Tensor) -> BaseProduct:
    """Return bitsandbytes' own ways to multiply; weights that are dequantised pass through `space`."""
    import bitsandbytes as bnb

    states = [base.weight.quant_state for base in bases]
    packed, absmax = (
        side_by_side([base.weight for base in bases]).view(-1).view(torch.uint8),
        torch.cat([_scales(state) for state in states]),
    )
    inputs, outputs = states[0].shape[1], sum(state.shape[0] for state in states)
    block, kind, bias_N = states[0].blocksize, states[0].quant_type, bias_of(bases)

    def state(start: int, stop: int) -> Any:
        part = absmax[start * inputs // block : stop * inputs // block]
        return bnb.functional.QuantState(part, torch.Size((stop - start, inputs)), states[0].code, block, kind, dtype)

    parts = [
        (a, b, packed[a * inputs // 2 : b * inputs // 2], state(a, b), weight_NE)
        for a, b, weight_NE in _pieces(outputs, inputs, space)
    ]
    whole, few = state(0, outputs), fused_rows(packed.device)

    def product(x_TE: Tensor, add_TN: Tensor | None = None) -> Tensor:
        if len(x_TE) <= few:
            y_TN = bnb.matmul_4bit(x_TE, packed, whole)
        else:
            y_TN = x_TE.new_empty(len(x_TE), outputs) if add_TN is None else add_TN
            for a, b, piece, piece_state, weight_NE in parts:
                bnb.functional.dequantize_4bit(piece, piece_state, out=weight_NE)
                y_TN[:, a:b].addmm_(x_TE, weight_NE.T, beta=int(add_TN is not None))
            add_TN = None  # it is in the sum
        for more in (bias_N, add_TN):
            if more is not None:
                y_TN += more
        return y_TN

    return product


def fused_rows(device: torch.device) -> int:
    """Return up to how many rows bitsandbytes' fused 4-bit product beats dequantising (its dispatch table, 0.50)."""
    return {(7, 5): 64, (8, 0): 16, (8, 6): 64, (8, 9): 64, (9, 0): 16}.get(
        torch.cuda.get_device_capability(device), 16
    )


def dequantised(bases: Sequence[Any], dtype: torch.dtype) -> BaseProduct:
    """Return a product with the weights in 16 bits, which are held beside the 4-bit ones."""
    parts = [nf4.dequantised(base.weight.data, base.weight.quant_state, dtype) for base in bases]
    return in_one(torch.cat(parts), bias_of(bases))


def _scales(state: Any) -> Tensor:
    """A quant_state's scales in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    nested = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return nested.float()


def _pieces(outputs: int, inputs: int, space: Tensor) -> list[tuple[int, int, Tensor]]:
    """Even cuts of the outputs, and the part of `space` in which the dequantised weights of each find room."""
    count = -(-outputs // (space.numel() // inputs))
    rows = -(-outputs // count)
    cuts = [(a, min(a + rows, outputs)) for a in range(0, outputs, rows)]
    return [(a, b, space[: (b - a) * inputs].view(b - a, inputs)) for a, b in cuts]
