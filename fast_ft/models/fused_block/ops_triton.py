"""What lies between a block's products, in Triton; functions as in ops_torch.py. 4-bit weights: unpack_triton.py.

Imported only where there is an NVIDIA GPU. Each kernel passes over memory once; sums are in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fast_ft.models.fused_block.unpack_triton import pairs, unpack

if TYPE_CHECKING:
    from torch import Tensor

__all__ = (
    "cross_entropy_", "pairs", "rms_norm", "rms_norm_backward", "rotate_", "rotate_back", "swiglu", "swiglu_backward_",
    "unpack",
)  # fmt: skip


@triton.jit
def _clear(start, ROOM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros in the ROOM columns from here on, a multiple of 64."""
    for part in tl.static_range(ROOM // 64):
        tl.store(start + part * 64 + tl.arange(0, 64), tl.zeros((64,), start.dtype.element_ty))


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x, weight, out, scale, width, eps, BLOCK: tl.constexpr, ROOM: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    out += row * (width + ROOM)
    column = tl.arange(0, BLOCK)
    real = column < width
    value = tl.load(x + row * width + column, mask=real, other=0.0)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    tl.store(scale + row, factor)
    unit = (wide * factor).to(value.dtype)
    tl.store(out + column, unit * tl.load(weight + column, mask=real, other=0.0), mask=real)
    _clear(out + width, ROOM)


@triton.jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, scale, residual, out, norm, width, residual_step, BLOCK: tl.constexpr, ROOM: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    out += row * (width + ROOM)
    column = tl.arange(0, BLOCK)
    real = column < width
    at = row * width + column
    factor = tl.load(scale + row)
    value = tl.load(x + at, mask=real, other=0.0)
    unit = value.to(tl.float32) * factor
    times = tl.load(weight + column, mask=real, other=0.0)
    tl.store(norm + at, unit.to(value.dtype) * times, mask=real)
    inner = tl.load(grad + at, mask=real, other=0.0).to(tl.float32) * times.to(tl.float32)
    through = (inner - unit * (tl.sum(inner * unit, axis=0) / width)) * factor
    past = tl.load(residual + row * residual_step + column, mask=real, other=0.0)
    tl.store(out + column, past + through.to(past.dtype), mask=real)
    _clear(out + width, ROOM)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, row_step, heads, HEADS: tl.constexpr, HALF: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    real = head < heads
    at = x + row * row_step + head * (2 * HALF) + d
    c = tl.load(cos + row * (2 * HALF) + d).to(tl.float32)
    s = tl.load(sin + row * (2 * HALF) + d).to(tl.float32)
    low = tl.load(at, mask=real, other=0.0)
    high = tl.load(at + HALF, mask=real, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    tl.store(at, (a * c - b * s).to(low.dtype), mask=real)
    tl.store(at + HALF, (b * c + a * s).to(low.dtype), mask=real)


@triton.jit
def _rotate_back(  # type: ignore[no-untyped-def]
    dq, dk, dv, cos, sin, out, q_step, k_step, v_step, heads, kv_heads,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One program a token and HEADS of its heads, all of q, k or v; v's are not rotated."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    both = heads + kv_heads
    every = both + kv_heads
    out += row * (every * 2 * HALF + ROOM)
    at = tl.arange(0, HEADS)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    angle = row * (2 * HALF) + tl.arange(0, HALF)[None, :]
    if first < both:
        c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
        if first < heads:
            given = dq + row * q_step + first * (2 * HALF)
        else:
            given = dk + row * k_step + (first - heads) * (2 * HALF)
        low, high = tl.load(given + at), tl.load(given + HALF + at)
        a, b = low.to(tl.float32), high.to(tl.float32)
        tl.store(out + first * (2 * HALF) + at, (a * c + b * s).to(low.dtype))
        tl.store(out + first * (2 * HALF) + HALF + at, (b * c - a * s).to(low.dtype))
    else:
        given = dv + row * v_step + (first - both) * (2 * HALF)
        tl.store(out + first * (2 * HALF) + at, tl.load(given + at))
        tl.store(out + first * (2 * HALF) + HALF + at, tl.load(given + HALF + at))
    if tl.program_id(1) == 0:
        _clear(out + every * 2 * HALF, ROOM)


@triton.jit
def _swiglu(gate_up, out, inner, BLOCK: tl.constexpr, ROOM: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < inner
    at = gate_up + row * 2 * inner + column
    gate = tl.load(at, mask=real, other=0.0)
    up = tl.load(at + inner, mask=real, other=0.0)
    wide = gate.to(tl.float32)
    out += row * (inner + ROOM)
    tl.store(out + column, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, mask=real)
    if tl.program_id(1) == 0:
        _clear(out + inner, ROOM)


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
def _cross_entropy(logits, target, loss, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a position: its logits once for their sum of exponents, and once more for the gradient."""
    position = tl.program_id(0).to(tl.int64)
    logits += position * vocabulary
    wanted = tl.load(target + position)
    column = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        value = tl.load(logits + start + column, mask=start + column < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, value)
        gone = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - gone) + tl.exp(value - gone)
        most = higher
    top = tl.max(most, axis=0)
    norm = top + tl.log(tl.sum(total * tl.exp(most - top), axis=0))
    kept = wanted >= 0
    own = tl.load(logits + tl.where(kept, wanted, 0)).to(tl.float32)
    tl.store(loss + position, tl.where(kept, norm - own, 0.0))
    tl.debug_barrier()  # the gradient is written over the logits
    for start in range(0, vocabulary, BLOCK):
        real = start + column < vocabulary
        value = tl.load(logits + start + column, mask=real, other=0.0)
        share = tl.exp(value.to(tl.float32) - norm) - (start + column == wanted).to(tl.float32)
        tl.store(logits + start + column, tl.where(kept, share, 0.0).to(value.dtype), mask=real)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, room: int = 0) -> tuple[Tensor, Tensor]:
    """Return (the norm, TE, and `room` columns of zeros; 1 / the root mean square of each row, fp32 T)."""
    rows, width = x_TE.shape
    out, scale = x_TE.new_empty(rows, width + room), x_TE.new_empty(rows, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](x_TE, weight_E, out, scale, width, eps, BLOCK=block, ROOM=room, num_warps=8)
    return out, scale


def rms_norm_backward(
    grad_TE: Tensor, x_TE: Tensor, weight_E: Tensor, scale_T: Tensor, residual_TE: Tensor, room: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (the gradient of x, TE, and `room` columns of zeros; the norm, TE).

    The gradient is what comes through the norm, and `residual_TE`, which went past it.
    """
    rows, width = x_TE.shape
    out, norm = x_TE.new_empty(rows, width + room), torch.empty_like(x_TE)
    _rms_norm_backward[(rows,)](
        grad_TE, x_TE, weight_E, scale_T, residual_TE, out, norm, width, residual_TE.stride(0),
        BLOCK=triton.next_power_of_2(width), ROOM=room, num_warps=8,
    )  # fmt: skip
    return out, norm


def rotate_(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotate each head by its token's angles, in place."""
    rows, heads, size = x_TND.shape
    _rotate[(rows, triton.cdiv(heads, 8))](
        x_TND, cos_TD, sin_TD, x_TND.stride(0), heads, HEADS=8, HALF=size // 2, num_warps=4
    )


def rotate_back(
    dq_THD: Tensor, dk_TGD: Tensor, dv_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor, room: int = 0
) -> Tensor:
    """Return gradients of q and k before `rotate_`, and that of v, side by side, TN, and `room` columns of zeros."""
    (rows, heads, size), kv_heads = dq_THD.shape, dk_TGD.shape[1]
    every, each = heads + 2 * kv_heads, next(n for n in (8, 4, 2, 1) if heads % n == 0 and kv_heads % n == 0)
    out = dq_THD.new_empty(rows, every * size + room)
    _rotate_back[(rows, every // each)](
        dq_THD, dk_TGD, dv_TGD, cos_TD, sin_TD, out, dq_THD.stride(0), dk_TGD.stride(0), dv_TGD.stride(0), heads,
        kv_heads, HEADS=each, HALF=size // 2, ROOM=room, num_warps=4,
    )  # fmt: skip
    return out


def swiglu(gate_up_T2M: Tensor, room: int = 0) -> Tensor:
    """Return silu(gate) * up, TM, and `room` columns of zeros."""
    rows, inner = gate_up_T2M.shape[0], gate_up_T2M.shape[1] // 2
    out = gate_up_T2M.new_empty(rows, inner + room)
    _swiglu[(rows, triton.cdiv(inner, 2048))](gate_up_T2M, out, inner, BLOCK=2048, ROOM=room, num_warps=8)
    return out


def swiglu_backward_(gate_up_T2M: Tensor, grad_TM: Tensor) -> None:
    """Put the gradients of gate and up in their places, and swiglu's own result in the gradient's."""
    rows, inner = grad_TM.shape
    _swiglu_backward[(rows, triton.cdiv(inner, 1024))](gate_up_T2M, grad_TM, inner, BLOCK=1024, num_warps=4)


def cross_entropy_(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Return each position's cross-entropy in nats, fp32 C; put the gradients of the logits in their places.

    Both are 0 where the target is negative.
    """
    positions, vocabulary = logits_CV.shape
    loss = logits_CV.new_empty(positions, dtype=torch.float32)
    _cross_entropy[(positions,)](logits_CV, target_C, loss, vocabulary, BLOCK=4096, num_warps=8)
    return loss
