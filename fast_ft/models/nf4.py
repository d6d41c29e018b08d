"""NF4 weights as our kernels read them: how a word is decoded, the scales, the order of columns.

A 4-bit code stands for one of 16 numbers, times its block's scale. The kernels look the number up by permuting bytes
and multiply by the scale in two 16-bit parts, so that only the product is rounded, as it is when bitsandbytes
dequantises. For that the 16 numbers must lie close to 16-bit ones. Multiplied by FACTOR they do; the scale is
divided by it.

Shapes: T tokens, K inputs, B blocks of 64 weights.
"""

from __future__ import annotations

import copy
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: Found by trying 1.5 million: the codes times it differ from numbers of 11 (8) bits by 3e-5 (3e-4) of the scale, RMS.
FACTOR = {"float16": 1.6776893333333334, "bfloat16": 1.437006}
BLOCK = 64  #: weights of a row that share a scale


class Order(IntEnum):
    """How the rows of x lie in memory for a kernel of few rows: each kernel reads what its lanes multiply together."""

    ROWS = 0  #: a row after the other
    PLANES = 1  #: a row after the other, their columns as `to_planes` has them
    PIECES = 2  #: as `to_pieces` has them


def code_bits(dtype: str) -> list[int]:
    """Return the 16 codes, times the factor, as the bits of "float16" or "bfloat16"."""
    return [_bits(code * FACTOR[dtype], dtype) for code in CODES]


def rest_bits(dtype: str) -> list[int]:
    """Return what `code_bits` lack of the codes, times the factor, as bits."""
    return [
        _bits(code * FACTOR[dtype] - _value(bits, dtype), dtype)
        for code, bits in zip(CODES, code_bits(dtype), strict=True)
    ]


def _bits(value: float, dtype: str) -> int:
    if dtype == "float16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    return int(word + 0x7FFF + (word >> 16 & 1)) >> 16


def _value(bits: int, dtype: str) -> float:
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def decoder(bits: list[int], kind: str, words: int, rest: list[int] | None = None) -> str:
    """Return PTX that turns words of eight codes into pairs of weights, 16 bits each.

    `kind` is f16 or bf16. With two words the pairs are $0 to $7, the words $8 and $9, their scale $10; with one $0 to
    $3, $4 and $5. A byte's first weight is its high nibble. With `rest`, the codes' second parts, a weight is rounded
    once, as bitsandbytes rounds it; without, more than one in ten becomes its neighbour in 16 bits.

    prmt picks four bytes of eight by the low three bits of four nibbles; with the fourth set it repeats the sign, from
    which the choice between codes 0..7 and 8..15 is made.
    """
    tables = [("l", bits, 0), ("h", bits, 8), *([("u", rest, 0), ("v", rest, 8)] if rest else [])]

    def table(part: list[int], at: int) -> str:
        """Return four of the codes' bytes as one word."""
        return f"0x{int.from_bytes(bytes(part[at : at + 4]), 'little'):08x}"

    scale = f"${5 * words}"
    lines = [
        "{", ".reg .b32 q, s, m, n, a, b, l, h, u, v, c, t, sh, sl, z;", "mov.b32 z, 0x80008000;",
        f"prmt.b32 sh, {scale}, {scale}, 0x1010;", f"prmt.b32 sl, {scale}, {scale}, 0x3232;",
    ]  # fmt: skip
    for word in range(words):
        for half in (0, 1):
            lines += [
                f"{'shr.u32' if half else 'mov.b32'} q, ${4 * words + word}{', 16' if half else ''};",
                "and.b32 s, q, 0x7777;",
                "prmt.b32 m, 0x7f7f7f7f, 0x7f7f7f7f, q;", "shl.b32 n, m, 1;", "or.b32 m, m, n;",
            ]  # fmt: skip
            for name, codes, shift in tables:
                part = [code >> shift & 0xFF for code in codes]
                lines += [
                    f"prmt.b32 a, {table(part, 0)}, {table(part, 4)}, s;",
                    f"prmt.b32 b, {table(part, 8)}, {table(part, 12)}, s;",
                    f"lop3.b32 {name}, m, a, b, 0xCA;",
                ]
            for pair, order in enumerate(("0x4051", "0x6273")):
                before = "z"  # -0: bf16's mul would need a newer card
                if rest:
                    lines += [f"prmt.b32 t, u, v, {order};", f"fma.rn.{kind}x2 t, t, sh, z;"]
                    before = "t"
                lines += [
                    f"prmt.b32 c, l, h, {order};",
                    f"fma.rn.{kind}x2 t, c, sl, {before};",
                    f"fma.rn.{kind}x2 ${4 * word + 2 * half + pair}, c, sh, t;",
                ]
    return "\n".join([*lines, "}"])


def plane_order(columns: int) -> Tensor:
    """Return for each place in plane order the column that stands there, int64 (columns,).

    Within 128 columns: pairs 0, 8, 16, ..., 56 first, then 1, 9, 17, and so on.
    """
    import torch

    return to_planes(torch.arange(columns)[None])[0]


def to_planes(x_TK: Tensor) -> Tensor:
    """Return x with its columns in plane order; K is a multiple of 128."""
    return x_TK.view(len(x_TK), -1, 8, 8, 2).transpose(2, 3).reshape(len(x_TK), -1)


def to_pieces(x_TK: Tensor) -> Tensor:
    """Return x as nf4_hopper reads it, in the same shape; K is a multiple of 128.

    A lane multiplies 32 neighbouring columns of 128 by 16 neighbouring bytes of codes, two columns at a time. So a
    piece, 8 numbers, holds the pairs b, 16 + b, 32 + b and 48 + b of 128 columns, one for each of four lanes. Pieces
    of the same columns lie side by side for all rows: tensor cores read those of eight rows at once.
    """
    x_PT8 = x_TK.view(len(x_TK), -1, 4, 16, 2).transpose(2, 3).reshape(len(x_TK), -1, 8).transpose(0, 1)
    return x_PT8.reshape(x_TK.shape)


def arranged(x_TK: Tensor, order: Order) -> Tensor:
    """Return x in an order, in the same shape."""
    return {Order.ROWS: lambda x: x, Order.PLANES: to_planes, Order.PIECES: to_pieces}[order](x_TK)


def pack_scales(absmax_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 scales over FACTOR as int32: a number of the 16-bit `dtype` and, in the upper half, what it lacks."""
    import torch

    scale = absmax_B / FACTOR[str(dtype).removeprefix("torch.")]
    high = scale.to(dtype)
    low = (scale - high.float()).to(dtype)
    return torch.stack((high, low), dim=-1).view(torch.int32).squeeze(-1)


def dequantised(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Return bitsandbytes' 4-bit weights in `dtype`, in their own shape, each rounded once.

    A `state` (its QuantState) names the dtype that the weights had before, and `dequantize_4bit` rounds to that. Stored
    bases often say bfloat16 there, whose rounding is eight times as coarse as float16's. Our kernels do not round so.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(state)
    state.dtype = dtype
    weight: Tensor = dequantize_4bit(packed, state)
    return weight


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model's 4-bit layers compute in `dtype`: a stored base may ask for bfloat16, which a T4 has not.

    Their weights are turned to it directly, too, and not by way of the dtype that they had once.
    """
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
