"""What lies between a block's products, and 4-bit weights turned to 16 bits, in Triton; functions as in plain.py.

Imported only where there is an NVIDIA GPU. One pass over memory each; sums in fp32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _rms_norm(x, weight, out, scale, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < width
    value = tl.load(x + row * width + column, mask=real, other=0.0)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    tl.store(scale + row, factor)
    unit = (wide * factor).to(value.dtype)
    tl.store(out + row * width + column, unit * tl.load(weight + column, mask=real, other=0.0), mask=real)


@triton.jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, scale, residual, out, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < width
    at = row * width + column
    factor = tl.load(scale + row)
    unit = tl.load(x + at, mask=real, other=0.0).to(tl.float32) * factor
    inner = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
    inner *= tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    through = (inner - unit * (tl.sum(inner * unit, axis=0) / width)) * factor
    past = tl.load(residual + at, mask=real, other=0.0)
    tl.store(out + at, past + through.to(past.dtype), mask=real)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, row_step, heads, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    real = head < heads
    at = x + row * row_step + head * (2 * HALF) + d
    c = tl.load(cos + row * (2 * HALF) + d).to(tl.float32)
    s = tl.load(sin + row * (2 * HALF) + d).to(tl.float32)
    if BACK:
        s = -s
    low = tl.load(at, mask=real, other=0.0)
    high = tl.load(at + HALF, mask=real, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    tl.store(at, (a * c - b * s).to(low.dtype), mask=real)
    tl.store(at + HALF, (b * c + a * s).to(low.dtype), mask=real)


@triton.jit
def _swiglu(gate_up, out, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < inner
    at = gate_up + row * 2 * inner + column
    gate = tl.load(at, mask=real, other=0.0)
    up = tl.load(at + inner, mask=real, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out + row * inner + column, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, mask=real)


@triton.jit
def _swiglu_backward(gate_up, grad, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < inner
    at = gate_up + row * 2 * inner + column
    gate16 = tl.load(at, mask=real, other=0.0)
    up16 = tl.load(at + inner, mask=real, other=0.0)
    gate, up = gate16.to(tl.float32), up16.to(tl.float32)
    there = grad + row * inner + column
    given = tl.load(there, mask=real, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(at, (given * up * share * (1 + gate * (1 - share))).to(gate16.dtype), mask=real)
    tl.store(at + inner, (given * gate * share).to(gate16.dtype), mask=real)
    tl.store(there, (gate * share).to(gate16.dtype) * up16, mask=real)


@triton.jit
def _unpack(  # type: ignore[no-untyped-def]
    packed, code, scale, scale_code, group_scale, group_offset, out, NESTED: tl.constexpr, BLOCKS: tl.constexpr
):
    """BLOCKS blocks of 64 weights: 32 bytes each, the first weight of a byte in its upper half."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    if NESTED:
        step = tl.load(scale_code + tl.load(scale + block).to(tl.int32))
        factor = step * tl.load(group_scale + block // 256) + tl.load(group_offset + block // 256)
    else:
        factor = tl.load(scale + block)
    byte = tl.load(packed + block[:, None] * 32 + tl.arange(0, 32)[None, :]).to(tl.int32)
    half = tl.arange(0, 2)[None, None, :]
    nibble = (byte[:, :, None] >> (4 - 4 * half)) & 15
    table = tl.load(code + tl.arange(0, 16))
    value = tl.gather(table, tl.reshape(nibble, (BLOCKS * 64,)), 0)
    weight = tl.reshape(value, (BLOCKS, 64)) * factor[:, None]
    tl.store(out + block[:, None] * 64 + tl.arange(0, 64)[None, :], weight.to(out.dtype.element_ty))


def rms_norm(x_TE: Any, weight_E: Any, eps: float) -> tuple[Any, Any]:
    import torch

    rows, width = x_TE.shape
    out, scale = torch.empty_like(x_TE), x_TE.new_empty(rows, dtype=torch.float32)
    _rms_norm[(rows,)](x_TE, weight_E, out, scale, width, eps, BLOCK=triton.next_power_of_2(width), num_warps=8)
    return out, scale


def rms_norm_backward(grad_TE: Any, x_TE: Any, weight_E: Any, scale_T: Any, residual_TE: Any) -> Any:
    import torch

    rows, width = x_TE.shape
    out = torch.empty_like(x_TE)
    _rms_norm_backward[(rows,)](
        grad_TE, x_TE, weight_E, scale_T, residual_TE, out, width, BLOCK=triton.next_power_of_2(width), num_warps=8
    )
    return out


def rotate_(x_TND: Any, cos_TD: Any, sin_TD: Any, *, back: bool) -> None:
    rows, heads, size = x_TND.shape
    _rotate[(rows, triton.cdiv(heads, 8))](
        x_TND, cos_TD, sin_TD, x_TND.stride(0), heads, BACK=back, HEADS=8, HALF=size // 2, num_warps=4
    )


def swiglu(gate_up_T2M: Any) -> Any:
    rows, inner = gate_up_T2M.shape[0], gate_up_T2M.shape[1] // 2
    out = gate_up_T2M.new_empty(rows, inner)
    _swiglu[(rows, triton.cdiv(inner, 2048))](gate_up_T2M, out, inner, BLOCK=2048, num_warps=8)
    return out


def swiglu_backward_(gate_up_T2M: Any, grad_TM: Any) -> None:
    rows, inner = grad_TM.shape
    _swiglu_backward[(rows, triton.cdiv(inner, 1024))](gate_up_T2M, grad_TM, inner, BLOCK=1024, num_warps=4)


def unpack(packed: Any, code: Any, scale: Any, nested: tuple[Any, Any, Any] | None, out: Any) -> None:
    """Write the weights that `packed` (bytes) holds to `out`, flat, in 16 bits: code * scale, rounded once.

    `scale` is fp32, one for 64 weights; or, with `nested` = (code, scale, offset), bytes that are themselves codes of
    numbers whose scale and offset 256 of them share.
    """
    blocks = packed.numel() // 32
    count = next(n for n in (32, 16, 8, 4, 2, 1) if blocks % n == 0)
    scale_code, group_scale, group_offset = nested if nested is not None else (code, code, code)
    _unpack[(blocks // count,)](
        packed, code, scale, scale_code, group_scale, group_offset, out,
        NESTED=nested is not None, BLOCKS=count, num_warps=4,
    )  # fmt: skip
