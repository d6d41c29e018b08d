"""A step's end in one kernel: the next token of each row, and the slots' state after it. NVIDIA GPUs only.

It draws what sampler.Sampler draws, from the same random number, but for the rounding of sums. The likeliest tokens are
found by their bits: the k-th largest logit is the largest number that at least k logits reach.

Shapes: S slots, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_ft.generate.engine.sampler import KEPT, Sampler

_PIECE = 4096  #: logits that are searched at a time
#: Bits of an fp32 logit that are zero where it was computed in fewer.
_EMPTY_BITS = {torch.float16: 13, torch.bfloat16: 16, torch.float32: 0}


@triton.jit
def _ordered(number):  # type: ignore[no-untyped-def]
    """fp32 as int32 of the same order, and back."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """As sampler._mix."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


@triton.jit(do_not_specialize=["state_row", "chunk_row", "end_count", "count"])
def _draw(  # type: ignore[no-untyped-def]
    given, logits, state, chunk, tick, ends, kept_score, kept_token, vocabulary, state_row, chunk_row, end_count, count,
    temperature, top_p, min_p, WHOLE: tl.constexpr, KEPT: tl.constexpr, EMPTY: tl.constexpr, GREEDY: tl.constexpr,
    ENDS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One program a slot."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, WHOLE)
    real = v < vocabulary
    logit_V = tl.load(given + row * vocabulary + v, mask=real, other=float("-inf")).to(tl.float32)
    tl.store(logits + row * vocabulary + v, logit_V, mask=real)
    order_V = _ordered(logit_V)
    least = tl.where(tl.sum((order_V >= 0).to(tl.int32), axis=0) >= count, 0, -2147483648)
    for index in range(31 - EMPTY):
        higher = least + (1 << (30 - index))
        least = tl.where(tl.sum((order_V >= higher).to(tl.int32), axis=0) >= count, higher, least)
    above = tl.sum((order_V > least).to(tl.int32), axis=0)
    equal = tl.sum(((order_V == least) & real).to(tl.int32), axis=0)
    before = 0  # those found so far, above the k-th in the upper bits and its ties in the lower ones
    for start in range(0, WHOLE, PIECE):
        p = start + tl.arange(0, PIECE)
        logit_P = tl.load(given + row * vocabulary + p, mask=p < vocabulary, other=float("-inf")).to(tl.float32)
        order_P = _ordered(logit_P)
        found_P = tl.where(order_P > least, 1 << 20, ((order_P == least) & (p < vocabulary)).to(tl.int32))
        running_P = tl.cumsum(found_P, axis=0) - found_P + before
        place_P = tl.where(order_P > least, running_P >> 20, above + (running_P & 0xFFFFF))  # the ties come last
        taken_P = (found_P > 0) & (place_P < KEPT)
        tl.store(kept_score + row * KEPT + place_P, logit_P, mask=taken_P)
        tl.store(kept_token + row * KEPT + place_P, p, mask=taken_P)
        before += tl.sum(found_P, axis=0)
    tl.debug_barrier()
    c = tl.arange(0, KEPT)
    there = c < above + equal
    score = tl.load(kept_score + row * KEPT + c, mask=there, other=float("-inf"))
    token = tl.load(kept_token + row * KEPT + c, mask=there, other=0).to(tl.int64)
    # the likeliest first; of equal ones the lower token
    packed = tl.sort((_ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - token), descending=True)
    token = 0x7FFFFFFF - (packed & 0xFFFFFFFF)
    bits = (packed >> 32).to(tl.int32)
    score = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)

    slot = state + row * state_row
    made, live, key = tl.load(slot + 2), tl.load(slot + 4), tl.load(slot + 5)
    if GREEDY:
        chosen = 0
    else:
        weight = tl.exp((score - tl.max(score, axis=0)) / temperature)
        weight = weight / tl.sum(weight, axis=0)
        earlier = tl.cumsum(weight, axis=0) - weight
        weight = tl.where((top_p < 1.0) & (earlier >= top_p), 0.0, weight)
        weight = tl.where(weight < min_p * tl.max(weight, axis=0), 0.0, weight)
        sums = tl.cumsum(weight, axis=0)
        mixed = _mix(((key >> 32) + made * 0x1E3779B1) & 0xFFFFFFFF)
        uniform = (_mix(mixed ^ (key & 0xFFFFFFFF)) >> 8).to(tl.float32) * 5.9604644775390625e-08
        passed = tl.sum((sums <= uniform * tl.max(sums, axis=0)).to(tl.int32), axis=0)
        chosen = tl.minimum(passed, tl.sum((weight > 0).to(tl.int32), axis=0) - 1)
    fresh = tl.sum(tl.where(c == chosen, token, 0), axis=0)

    tl.store(chunk + row * chunk_row + tl.load(tick), tl.where(live != 0, fresh, -1))
    newest = tl.where(live != 0, fresh, tl.load(slot))
    e = tl.arange(0, ENDS)
    is_end = tl.sum((tl.load(ends + e, mask=e < end_count, other=-1) == newest).to(tl.int32), axis=0) > 0
    over = (made + live >= tl.load(slot + 3)) | ((tl.load(slot + 6) != 0) & is_end)
    length = tl.load(slot + 1) + live
    tl.debug_barrier()
    tl.store(slot, newest)
    tl.store(slot + 1, length)
    tl.store(slot + 2, made + live)
    tl.store(slot + 4, tl.where(over, 0, live))


class Draw:
    """Draws for up to `slots` slots as `sampler` does; sampler.fits must say that this is possible.

    The state's columns are model_runner.SlotState's.
    """

    def __init__(self, sampler: Sampler, slots: int, end_ids: Tensor) -> None:
        self.sampler, self.ends = sampler, end_ids
        self._score = torch.empty(slots, KEPT, dtype=torch.float32, device=end_ids.device)
        self._token = torch.empty(slots, KEPT, dtype=torch.int32, device=end_ids.device)

    def __call__(self, given_SV: Tensor, logits_SV: Tensor, state: Tensor, chunk: Tensor, tick: Tensor) -> None:
        """Copy the logits to `logits_SV` in fp32, write each slot's token to column `tick` of `chunk`, or -1, and move
        its state on."""
        sampler, (slots, vocabulary) = self.sampler, given_SV.shape
        _draw[(slots,)](
            given_SV, logits_SV, state, chunk, tick, self.ends, self._score, self._token, vocabulary, state.stride(0),
            chunk.stride(0), len(self.ends), sampler.top_k if sampler.do_sample else 1, sampler.temperature,
            sampler.top_p, sampler.min_p, WHOLE=triton.next_power_of_2(vocabulary), KEPT=KEPT,
            EMPTY=_EMPTY_BITS[given_SV.dtype], GREEDY=not sampler.do_sample,
            ENDS=triton.next_power_of_2(max(1, len(self.ends))),
            PIECE=min(_PIECE, triton.next_power_of_2(vocabulary)), num_warps=32,
        )  # fmt: skip
