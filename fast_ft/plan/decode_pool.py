"""A decoding pool's size: how many rows side by side, over how much KV cache. Part of the plan; no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from fast_ft.hub.families import GIB, ModelShape
from fast_ft.plan.constants import MEMORY
from fast_ft.recipe import schema

#: New tokens that a row holds in the mean: half of a long answer, for rows of all ages share the cache.
_USUAL = 128
PREFILL_TOKENS = 2048  #: in a pass over prompts, at most
PAGE = 16  #: tokens of a page of the cache, of which a row leaves half a one empty
_MOST_SLOTS = 160
#: Where products take rows 64 at a time, a step of 65 takes as long as one of 110 (measured).
_TILE, _WORTH_TWO = 64, 112
_TAKES_EIGHTS = (8, 0)  #: compute capability from which kernels of our own take rows 8 at a time
_MOST_WITHOUT_CARD = 64
#: How much of the memory may be planned for: nothing measures a plan for answers, whose lengths decide what they hold.
_PLANNED_FOR = 0.96
_PLANNED_FOR_ON_HOST = 0.9  #: of a machine's memory: other programs take more of it meanwhile
_LIBRARIES_GIB = 0.5  #: of torch, transformers and what they import, on a host
_PACKED_GIB = 1.0  #: weights up to this are there twice on a CPU (generate/engine/packed_linear.py)


@dataclass(frozen=True)
class DecodePlan:
    """How a set of prompts is decoded: `slots` side by side, over a KV cache of `cache_tokens` (None: enough for all).

    `dequantise`: from weights turned to 16 bits, since there is memory for them. `gib` is the predicted peak, CUDA
    context included; on a CPU the process's own; 0 where nothing was predicted. `kv_cache`: "16bit", or "8bit" with a
    scale for each token and head. `products`: how 4-bit weights are multiplied in steps of each number of rows, chosen
    by a timing where the answers are made first; see generate/engine/product_choice.py. They are the run's (RunPlan),
    whatever is answered. `settled_for`: the prompts and settings that slots and cache are for, as `what_is_answered`
    tells them; "" in a plan that no run keeps, and in one of an earlier version.
    """

    slots: int = 1
    cache_tokens: int | None = None
    dequantise: bool = False
    gib: float = 0.0
    kv_cache: str = "16bit"
    products: str = ""
    settled_for: str = ""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"it has {self.slots} slots")
        if self.kv_cache not in get_args(schema.KvCache):
            raise ValueError(f"its kv_cache is {self.kv_cache!r}")
        read_products(self.products)

    @property
    def kv_bits(self) -> int:
        """Bits of each number in the cache: 8, or 16 for the model's own dtype."""
        return 8 if self.kv_cache == "8bit" else 16

    def given(self, section: schema.Generate) -> DecodePlan:
        """Return what an earlier version made of its plan for a section with another batch or kind of cache.

        A cache of another kind takes the memory that was planned, or less: tokens of 16 bits are not doubled.
        """
        tokens = self.cache_tokens
        if tokens is not None and section.kv_cache != self.kv_cache and section.kv_cache == "16bit":
            tokens //= 2
        slots = self.slots if section.batch_size == "auto" else section.batch_size
        return replace(self, slots=slots, cache_tokens=tokens, kv_cache=section.kv_cache)


@dataclass(frozen=True)
class Answers:
    """The prompts' token counts, and what each is answered with at most. All begin with `shared_tokens`."""

    prompt_tokens: Sequence[int]
    max_new_tokens: int
    candidates: int = 1
    shared_tokens: int = 0  #: see data/shared_start.py
    pooled: bool = True  #: by our engine; else transformers answers in batches, each row with a cache of full length
    kv_cache: str = "16bit"  #: as DecodePlan's; transformers' own cache has 16 bits


def what_is_answered(answers: Answers, wanted_slots: int | None) -> str:
    """Return all that a pool's size follows from but the card: two sets of prompts that are told alike get one pool."""
    prompts = answers.prompt_tokens
    return (
        f"{len(prompts)} prompts of {sum(prompts)} tokens, {max(prompts, default=0)} at most, {answers.shared_tokens} "
        f"shared; {answers.candidates} x {answers.max_new_tokens} new tokens; "
        f"{answers.kv_cache if answers.pooled else 'general'}; batch_size {wanted_slots or 'auto'}"
    )


def read_products(text: str) -> dict[int, str]:
    """Return {rows: how 4-bit weights are multiplied} of a plan's `products`. Raises ValueError."""
    if not re.fullmatch(r"(\d+:\w+( \d+:\w+)*)?", text):
        raise ValueError(f"its products are {text!r}")
    return {int(rows): name for rows, name in (part.split(":") for part in text.split())}


def write_products(products: Mapping[int, str]) -> str:
    """Return a plan's `products`, most rows first."""
    return " ".join(f"{rows}:{products[rows]}" for rows in sorted(products, reverse=True))


@dataclass(frozen=True)
class PoolMemory:
    """What a pool may take: `budget_gib`, of which the base's weights and the CUDA context hold `fixed_gib`.

    `tiles`: 4-bit products take rows 64 at a time.
    """

    fixed_gib: float
    budget_gib: float
    load_in_4bit: bool
    tiles: bool = True


def has_tiles(capability: tuple[int, int]) -> bool:
    """Return whether 4-bit products on a card take rows 64 at a time."""
    return capability < _TAKES_EIGHTS


def slots_without_card(prompt_tokens: Sequence[int], candidates: int) -> int:
    """Return the slots of a pool on a CPU, as far as memory allows."""
    return min(_MOST_WITHOUT_CARD, max(1, len(prompt_tokens) * candidates))


def kv_bytes(shape: ModelShape, kv_cache: str) -> int:
    """Return the bytes of one token's keys and values: 8 bits come with two numbers of the model's for each head."""
    if kv_cache == "16bit":
        return shape.kv_bytes
    return shape.kv_bytes // shape.number_bytes + 2 * shape.kv_bytes // shape.head_dim


def pool_gib(shape: ModelShape, slots: int, cache_tokens: int, kv_cache: str = "16bit") -> float:
    """Memory of decoding beside the base: KV cache, logits of all slots, the passes over prompts (2,048 tokens each).

    Captured passes hold memory of their own beside the first ones'. NF4's scales are undone to 32 bits (1/16 byte a
    weight). LoRA's matrices, as trained and as multiplied, and a buffer for dequantised weights are 0.07 bytes a
    weight, more in 32 bits; 0.05 are for what is lost between blocks, in expandable segments. 14.7 GiB then hold 17,500
    tokens of a 7B's cache.
    """
    h, m, wide = shape.hidden_size, shape.intermediate_size, shape.number_bytes
    logits = slots * shape.vocab_size * 14 * wide
    prefill = 2 * PREFILL_TOKENS * wide * (10 * h + 4 * m)
    step = slots * wide * (10 * h + 4 * m)
    beside = shape.linear_weights * (1 / 16 + 0.12 + 0.035 * (wide - 2)) - shape.unquantised_weights / 16
    return (cache_tokens * kv_bytes(shape, kv_cache) + logits + prefill + step + beside) / GIB + 0.1


def settle_decoding(
    shape: ModelShape,
    answers: Answers,
    wanted_slots: int | None,
    *,
    memory_gib: float | None,
    load_in_4bit: bool,
    tiles: bool = True,
    host_gib: float | None = None,
) -> DecodePlan:
    """Return how prompts are decoded where a process may take `memory_gib` of a card; None: on a CPU.

    There it may hold `host_gib` in all, libraries included; None: nothing is known of that. `tiles`: as PoolMemory's.
    """
    if memory_gib is None:
        return _settle_on_host(shape, answers, wanted_slots, host_gib, load_in_4bit=load_in_4bit)
    fixed_gib = shape.weights_gib(load_in_4bit=load_in_4bit) + MEMORY["context_gib"]
    memory = PoolMemory(fixed_gib, memory_gib * _PLANNED_FOR, load_in_4bit, tiles)
    return settle_pool(shape, answers, wanted_slots, memory)


def _settle_on_host(
    shape: ModelShape, answers: Answers, wanted_slots: int | None, host_gib: float | None, *, load_in_4bit: bool
) -> DecodePlan:
    """Return a pool with no more slots than a CPU gains by; a cache that does for all of them is not limited."""
    most = slots_without_card(answers.prompt_tokens, answers.candidates)
    if host_gib is None:
        return DecodePlan(wanted_slots or most, kv_cache=answers.kv_cache if answers.pooled else "16bit")
    weights = shape.weights_gib(load_in_4bit=load_in_4bit)
    fixed_gib = _LIBRARIES_GIB + weights * (2 if weights <= _PACKED_GIB else 1)
    memory = PoolMemory(fixed_gib, host_gib * _PLANNED_FOR_ON_HOST, load_in_4bit=False, tiles=False)
    slots = wanted_slots or min(most, settle_pool(shape, answers, None, memory).slots)
    made = settle_pool(shape, answers, slots, memory)
    enough = made.slots * (max(answers.prompt_tokens, default=1) + answers.max_new_tokens)
    return replace(made, cache_tokens=None) if (made.cache_tokens or 0) >= enough else made


def settle_pool(shape: ModelShape, answers: Answers, wanted_slots: int | None, memory: PoolMemory) -> DecodePlan:
    """Return a decoding pool that stays within the memory.

    It has as many slots as rows of a mean prompt and an answer of 128 tokens fit the cache, beside the tokens that all
    prompts share, and no more cache than the slots could ever fill. Where products take rows 64 at a time, it has 64
    slots if a few more would fit. Weights are dequantised where that cache fits beside them.
    """
    prompts, limit = answers.prompt_tokens, answers.max_new_tokens
    rows = max(1, len(prompts)) * answers.candidates
    whole = max(prompts, default=1) + limit + 16
    kind = answers.kv_cache if answers.pooled else "16bit"
    shared = -(-answers.shared_tokens // PAGE) * PAGE  # of which no row holds the whole pages
    own = sum(prompts) / max(1, len(prompts)) - answers.shared_tokens // PAGE * PAGE
    usual = own + min(limit, _USUAL) + PAGE / 2

    def cache(slots: int, held: float) -> int:
        return int((memory.budget_gib - held - pool_gib(shape, slots, 0)) * GIB / kv_bytes(shape, kind))

    def most_slots(held: float) -> int:
        counts = range(min(rows, _MOST_SLOTS), 0, -1)
        most = next((n for n in counts if max(shared + n * usual, whole) <= cache(n, held)), 1)
        return _TILE if memory.tiles and _TILE < most < _WORTH_TWO else most

    both = memory.fixed_gib + shape.quantised_weights * shape.number_bytes / GIB
    slots = wanted_slots or most_slots(memory.fixed_gib)
    if not answers.pooled:
        slots = wanted_slots or min(slots, max(1, cache(slots, memory.fixed_gib) // whole))
        tokens = slots * whole
        return DecodePlan(slots, tokens, False, round(memory.fixed_gib + pool_gib(shape, slots, tokens), 2))
    dequantise = memory.load_in_4bit and slots * whole <= cache(slots, both)
    held = both if dequantise else memory.fixed_gib
    tokens = min(slots * whole, max(cache(slots, held), whole))
    gib = held + pool_gib(shape, slots, tokens, kind)
    return DecodePlan(slots, tokens, dequantise, round(gib, 2), kind)
