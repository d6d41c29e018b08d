"""A product of few rows with 4-bit weights that are decoded in registers, in Triton. Imported only on an NVIDIA GPU.

One 32-bit word holds eight weights of a row. Two words give eight planes of two weights, and 16 words eight planes of
16. Each plane is an operand of a product with the matching columns of x, which `nf4.plane_order` puts side by side:

    word 2u, weights 0 1 | 2 3 | 4 5 | 6 7      word 2u + 1, weights 0 1 | 2 3 | 4 5 | 6 7
    plane          0     1     2     3                 plane    4     5     6     7

A weight is code * (high + low): NF4's 16 codes as two bytes each, looked up by byte permutation; the block's scale as
two 16-bit numbers, so that only the product is rounded, as it is where weights are dequantised.

Shapes: M rows of x, K inputs, N outputs, R ranks of the LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_ft.models.fused_block.ops_triton import pairs
from fast_ft.models.nf4 import Order, code_bits, decoder

NAME = "Triton's kernel"
MULTIPLE, CAPABILITY = 128, (8, 0)  #: as nf4_linear.Way's
NEWEST: tuple[int, int] | None = None

_TWO_F16 = tl.constexpr(decoder(code_bits("float16"), "f16", 2))
_TWO_BF16 = tl.constexpr(decoder(code_bits("bfloat16"), "bf16", 2))
_TWO_REGISTERS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r")


@triton.jit
def _decode(words, scales, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight planes of words (N, J), int32, and their scales. Counts on a register pair being columns j and j + 1."""
    if BF16:
        planes = tl.inline_asm_elementwise(
            _TWO_BF16, _TWO_REGISTERS, [words, scales], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
        )
    else:
        planes = tl.inline_asm_elementwise(
            _TWO_F16, _TWO_REGISTERS, [words, scales], dtype=(tl.float16,) * 8, is_pure=True, pack=2
        )
    return planes


@triton.jit(do_not_specialize=["rows"])  # each number of rows would be compiled again
def _product(  # type: ignore[no-untyped-def]
    x, words, scales, xa, b, out, rows, N, J, x_row, xa_row, R,
    M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One program a block of outputs and a part of the inputs, 128 at a time. J words make a row of weights."""
    part, parts = tl.program_id(1), tl.num_programs(1)
    n = tl.program_id(0) * N_BLOCK + tl.arange(0, N_BLOCK)
    m = tl.minimum(tl.arange(0, M_BLOCK), rows - 1)
    column = tl.arange(0, 16)
    row = tl.minimum(n, N - 1)
    word_at = words + row[:, None] * J + column[None, :]
    scale_at = scales + row
    x_at = x + m[None, :] * x_row + column[:, None]
    sum_NM = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
    blocks = J // 16
    for block in range(blocks * part // parts, blocks * (part + 1) // parts):
        w = tl.load(word_at + block * 16)
        s0 = tl.load(scale_at + 2 * block * N)
        s1 = tl.load(scale_at + (2 * block + 1) * N)
        s = tl.where(column[None, :] < 8, s0[:, None], s1[:, None])
        w0, w1, w2, w3, w4, w5, w6, w7 = _decode(w, s, BF16)
        at = x_at + block * 128
        sum_NM = tl.dot(w0, tl.load(at), sum_NM)
        sum_NM = tl.dot(w1, tl.load(at + 16), sum_NM)
        sum_NM = tl.dot(w2, tl.load(at + 32), sum_NM)
        sum_NM = tl.dot(w3, tl.load(at + 48), sum_NM)
        sum_NM = tl.dot(w4, tl.load(at + 64), sum_NM)
        sum_NM = tl.dot(w5, tl.load(at + 80), sum_NM)
        sum_NM = tl.dot(w6, tl.load(at + 96), sum_NM)
        sum_NM = tl.dot(w7, tl.load(at + 112), sum_NM)
    if part == 0:
        r = tl.arange(0, 16)
        for start in range(0, R, 16):
            b_NR = tl.load(b + row[:, None] * R + (start + r)[None, :])
            xa_RM = tl.load(xa + m[None, :] * xa_row + (start + r)[:, None])
            sum_NM = tl.dot(b_NR, xa_RM, sum_NM)
    m = tl.arange(0, M_BLOCK)
    at = (part * rows + m[None, :]) * N + n[:, None]
    tl.store(out + at, sum_NM.to(out.dtype.element_ty), mask=(m[None, :] < rows) & (n[:, None] < N))


@triton.jit
def _dequantise(  # type: ignore[no-untyped-def]
    words, scales, out, N, J, scale_row, N_BLOCK: tl.constexpr, J_BLOCK: tl.constexpr, BF16: tl.constexpr
):
    n = tl.program_id(0) * N_BLOCK + tl.arange(0, N_BLOCK)[:, None]
    j = tl.program_id(1) * J_BLOCK + tl.arange(0, J_BLOCK)[None, :]
    real = (n < N) & (j < J)
    w = tl.load(words + n * J + j, mask=real, other=0)
    s = tl.load(scales + j // 8 * scale_row + n, mask=real, other=0)
    p0, p1, p2, p3 = pairs(w, s, BF16)
    made = tl.join(tl.join(p0, p2), tl.join(p1, p3)).reshape(N_BLOCK, 4 * J_BLOCK)
    i = tl.program_id(1) * 4 * J_BLOCK + tl.arange(0, 4 * J_BLOCK)[None, :]
    tl.store(out + n.to(tl.int64) * 4 * J + i, made, mask=(n < N) & (i < 4 * J))


def dequantise(words: Tensor, scales: Tensor, out_NK: Tensor) -> None:
    """Write the weights to `out_NK`; words and scales as for `product`."""
    outputs, inside = words.shape
    _dequantise[(triton.cdiv(outputs, 16), triton.cdiv(inside, 128))](
        words, scales, out_NK.view(torch.int32), outputs, inside, scales.stride(0), N_BLOCK=16, J_BLOCK=128,
        BF16=_is_bf16(out_NK.dtype), num_warps=4,
    )  # fmt: skip


def order_for(rows: int) -> Order:
    """Return the order in which `product` wants that many rows of x."""
    return Order.PLANES


def product(
    x_MK: Tensor, words: Tensor, scales: Tensor, xa_MR: Tensor | None, b_NR: Tensor | None, **settings: int
) -> Tensor:
    """Return x times the weights, and xa times b, as MN; or that many fp32 parts of it as `settings` split it in.

    `x_MK` is in plane order. `words` is (N, K / 8) int32 as bitsandbytes packs, `scales` (K / 64, N) as nf4.pack_scales
    returns them. K is a multiple of 128, R of 16; `xa_MR` None is no LoRA; `b_NR` lies without gaps.
    """
    rows, outputs = len(x_MK), len(words)
    n_block, split, warps, stages = (settings or settings_for(rows, outputs, words.shape[1])).values()
    out = x_MK.new_empty(rows, outputs) if split == 1 else x_MK.new_empty(split, rows, outputs, dtype=torch.float32)
    xa, b, ranks = (x_MK, x_MK, 0) if xa_MR is None or b_NR is None else (xa_MR, b_NR, xa_MR.shape[1])
    _product[(triton.cdiv(outputs, n_block), split)](
        x_MK, words, scales, xa, b, out, rows, outputs, words.shape[1], x_MK.stride(0), xa.stride(0), ranks,
        M_BLOCK=max(16, triton.next_power_of_2(rows)), N_BLOCK=n_block, BF16=_is_bf16(x_MK.dtype), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out


def parts_for(rows: int, outputs: int, inputs: int, device: torch.device) -> int:
    """Return in how many parts `product` leaves a product."""
    return settings_for(rows, outputs, inputs // 8)["split"]


def compare(x_MK: Tensor, words: Tensor, scales: Tensor, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Return x's products as products of these (outputs, inputs) are cut, each by its settings."""
    cuts = {tuple(settings_for(len(x_MK), outputs, inputs // 8).items()) for outputs, inputs in shapes}
    return {str(cut): product(x_MK, words, scales, None, None, **dict(cut)) for cut in sorted(cuts)}


def settings_for(rows: int, outputs: int, inside: int) -> dict[str, int]:
    """Return how a product is cut, by its rows, outputs and words in a row of weights.

    Tried on an H200 with a 7B's four shapes and 16 to 128 rows: 128 outputs in a program are best throughout, and as
    many parts as make two or three programs for each of its 132 processors.
    """
    many = rows > 64
    most = min(4 if many else 8, max(1, inside // 64))  # parts of at least four steps
    wanted = 450 if many else 512
    split = min((parts for parts in (1, 2, 3, 4, 8) if parts <= most), key=lambda n: abs(outputs // 128 * n - wanted))
    return {"n_block": 128, "split": split, "warps": 8 if many else 4, "stages": 3}


def _is_bf16(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16
