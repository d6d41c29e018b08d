"""4-bit weights turned to 16 bits, in Triton. Imported only where there is an NVIDIA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fast_ft.models import nf4

if TYPE_CHECKING:
    from torch import Tensor

_DECODE_F16 = tl.constexpr(nf4.decoder(nf4.code_bits("float16"), "f16", 1))
_DECODE_BF16 = tl.constexpr(nf4.decoder(nf4.code_bits("bfloat16"), "bf16", 1))
_EXACT_BF16 = tl.constexpr(nf4.decoder(nf4.code_bits("bfloat16"), "bf16", 1, nf4.rest_bits("bfloat16")))
_EACH = 2048  #: LoRA weights that a program copies
_REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r")


@triton.jit
def pairs(words, scales, BF16: tl.constexpr, EXACT: tl.constexpr = False):  # type: ignore[no-untyped-def]
    """Four int32 of two 16-bit weights each for every word of eight NF4 codes; scales as nf4.pack_scales makes them.

    EXACT: bf16 weights are rounded as bitsandbytes rounds them; with so few bits a neighbour is far.
    """
    return tl.inline_asm_elementwise(
        (_EXACT_BF16 if EXACT else _DECODE_BF16) if BF16 else _DECODE_F16,
        _REGISTERS, [words, scales], dtype=(tl.int32,) * 4, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _unpack(  # type: ignore[no-untyped-def]
    words, scale, scale_code, group_scale, group_offset, out, over, lora, place, place_step, lora_weights,
    ROOM: tl.constexpr, ROW_BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr,
    NESTED: tl.constexpr, BF16: tl.constexpr, BLOCKS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """ROUNDS times BLOCKS blocks of 64 weights, which are 8 words each and become 32 pairs.

    Four threads share a block. Each takes the words t and t + 4: one scale serves both, and the 16 bytes that a word
    becomes lie beside those of the thread before. A program's blocks are in one group, since 256 is a multiple of them.
    ROOM pairs are left out behind each row of ROW_BLOCKS blocks. Programs beyond PROGRAMS copy EACH weights of `lora`,
    which has rows of COLUMNS, to their place beside the others.
    """
    if COLUMNS:  # noqa: SIM102 - decided when it is compiled; what stands below is not
        if tl.program_id(0) >= PROGRAMS:
            at = (tl.program_id(0) - PROGRAMS) * EACH + tl.arange(0, EACH)
            value = tl.load(lora + at, mask=at < lora_weights)
            tl.store(place + at // COLUMNS * place_step + at % COLUMNS, value, mask=at < lora_weights)
            return
    kind = tl.bfloat16 if BF16 else tl.float16
    first = tl.program_id(0).to(tl.int64) * (ROUNDS * BLOCKS)
    words += first * 8
    scale += first
    out += first * 32
    if NESTED:
        step_of_group = tl.load(group_scale + first // 256) * over
        offset = tl.load(group_offset + first // 256) * over
    for number in tl.static_range(ROUNDS):
        block = number * BLOCKS + tl.arange(0, BLOCKS)
        place = block * 32
        if ROOM:
            place += (first + block) // ROW_BLOCKS * ROOM
        if NESTED:
            factor = tl.load(scale_code + tl.load(scale + block).to(tl.int32)) * step_of_group + offset
        else:
            factor = tl.load(scale + block) * over
        high = factor.to(kind)
        low = (factor - high.to(tl.float32)).to(kind)
        both = high.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF | low.to(tl.int16, bitcast=True).to(tl.int32) << 16
        both = tl.broadcast_to(both[:, None], (BLOCKS, 4))
        for half in tl.static_range(2):
            word = tl.load(words + block[:, None] * 8 + half * 4 + tl.arange(0, 4)[None, :])
            p0, p1, p2, p3 = pairs(word, both, BF16, True)
            made = tl.join(tl.join(p0, p2), tl.join(p1, p3)).reshape(BLOCKS, 16)
            tl.store(out + place[:, None] + half * 16 + tl.arange(0, 16)[None, :], made)


def unpack(
    packed: Tensor, scale: Tensor, nested: tuple[Tensor, Tensor, Tensor] | None, out: Tensor,
    lora: Tensor | None = None, place: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the weights that `packed` (bytes of NF4 codes) holds to `out`, row by row, fp16 or bf16: code * scale.

    Rows of `out` (N, E) may lie apart, by a multiple of 16 bytes. With `lora`, copy that matrix to `place`, too.

    `scale` is fp32, one for 64 weights; or, with `nested` = (code, scale, offset), bytes that are themselves codes of
    numbers whose scale and offset 256 of them share.
    """
    blocks, kind = packed.numel() // 32, str(out.dtype).removeprefix("torch.")
    each = next(n for n in (32, 16, 8, 4, 2, 1) if blocks % n == 0)
    rounds = next(n for n in (4, 2, 1) if blocks % (n * each) == 0)
    scale_code, group_scale, group_offset = nested if nested is not None else (scale, scale, scale)
    row, room, programs = out.shape[1], out.stride(0) - out.shape[1], blocks // (each * rounds)
    lora, place = (out, out) if lora is None or place is None else (lora, place)
    columns, weights = (lora.shape[1], lora.numel()) if lora is not out else (0, 0)
    _unpack[(programs + triton.cdiv(weights, _EACH),)](
        packed.view(torch.int32), scale, scale_code, group_scale, group_offset, out.view(torch.int32),
        1 / nf4.FACTOR[kind], lora, place, place.stride(0), weights, ROOM=room // 2,
        ROW_BLOCKS=row // 64 if room else 0, PROGRAMS=programs, COLUMNS=columns, EACH=_EACH,
        NESTED=nested is not None, BF16=kind == "bfloat16", BLOCKS=each, ROUNDS=rounds, num_warps=4,
    )  # fmt: skip
