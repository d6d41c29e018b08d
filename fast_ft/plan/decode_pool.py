"""A decoding pool's size: how many rows side by side, over how much KV cache. Part of the plan; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fast_ft.hub.families import GIB, ModelShape

#: New tokens that a row holds in the mean: half of a long answer, for rows of all ages share the cache.
_USUAL = 128
PAGE = 16  #: tokens of a page of the cache, of which a row leaves half a one empty
_MOST_SLOTS = 160
_TILE, _WORTH_TWO = 64, 112  #: products take rows 64 at a time: a step of 65 takes as long as one of 110 (measured)
_MOST_WITHOUT_CARD = 64


def slots_without_card(prompt_tokens: Sequence[int], candidates: int) -> int:
    """Return the slots of a pool on a CPU, where no memory is predicted."""
    return min(_MOST_WITHOUT_CARD, max(1, len(prompt_tokens) * candidates))


def pool_gib(shape: ModelShape, slots: int, cache_tokens: int) -> float:
    """Memory of decoding beside the base: KV cache, logits of all slots, the passes over prompts (2,048 tokens each).

    Passes of up to 1,024 tokens hold memory of their own, for graphs. NF4's scales are undone to 32 bits (1/16 byte a
    weight). LoRA's matrices, as trained and as multiplied, and a buffer for dequantised weights are 0.07 bytes a
    weight; 0.08 are for what is lost between blocks, in expandable segments. 14.7 GiB then hold 17,500 tokens of a
    7B's cache.
    """
    h, m = shape.hidden_size, shape.intermediate_size
    logits = slots * shape.vocab_size * 2 * 14
    prefill = (2048 + 1024) * 2 * (10 * h + 4 * m)
    step = slots * 2 * (10 * h + 4 * m)
    beside = shape.linear_weights * (1 / 16 + 0.15)
    return (cache_tokens * shape.kv_bytes + logits + prefill + step + beside) / GIB + 0.1


def settle_pool(
    shape: ModelShape,
    prompt_tokens: Sequence[int],
    *,
    candidates: int,
    max_new_tokens: int,
    wanted_slots: int | None,
    load_in_4bit: bool,
    fixed_gib: float,
    budget_gib: float,
) -> tuple[int, int, bool, float]:
    """Return (slots, cache tokens, whether to dequantise, GiB) of a decoding pool that stays within the budget.

    `fixed_gib` is what the base's weights and the CUDA context hold. As many slots as rows of a mean prompt and an
    answer of 128 tokens fit the cache, 64 where a few more would; no more cache than the slots could ever fill.
    Weights are dequantised where that cache fits beside them.
    """
    rows = max(1, len(prompt_tokens)) * candidates
    whole = max(prompt_tokens, default=1) + max_new_tokens + 16
    usual = sum(prompt_tokens) / max(1, len(prompt_tokens)) + min(max_new_tokens, _USUAL) + PAGE / 2

    def cache(slots: int, held: float) -> int:
        return int((budget_gib - held - pool_gib(shape, slots, 0)) * GIB / shape.kv_bytes)

    def most_slots(held: float) -> int:
        counts = range(min(rows, _MOST_SLOTS), 0, -1)
        most = next((n for n in counts if max(n * usual, whole) <= cache(n, held)), 1)
        return _TILE if _TILE < most < _WORTH_TWO else most

    both = fixed_gib + shape.linear_weights * 2 / GIB
    slots = wanted_slots or most_slots(fixed_gib)
    dequantise = load_in_4bit and slots * whole <= cache(slots, both)
    held = both if dequantise else fixed_gib
    tokens = min(slots * whole, max(cache(slots, held), whole))
    return slots, tokens, dequantise, held + pool_gib(shape, slots, tokens)
