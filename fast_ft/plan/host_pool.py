"""A decoding pool's size on a machine without a card, by the machine's memory. Pure arithmetic; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fast_ft.hub.families import GIB, ModelShape
from fast_ft.plan.decode_pool import Answers, DecodePlan, PoolMemory, settle_pool, slots_without_card

_PLANNED_FOR = 0.9  #: of the memory: other programs take more of it meanwhile
_LIBRARIES_GIB = 0.5  #: of torch, transformers and what they import
_PACKED_GIB = 1.0  #: weights up to this are there twice (generate/engine/packed_linear.py)


@dataclass(frozen=True)
class Host:
    """A machine without a card: the GiB that this process may hold in all, and the bytes of a number as it computes."""

    gib: float
    number_bytes: int = 4


def settle_on_host(
    shape: ModelShape, answers: Answers, wanted_slots: int | None, host: Host | None, *, load_in_4bit: bool
) -> DecodePlan:
    """Return a decoding pool that stays within the host's memory; without a host, none is predicted.

    Slots are as many as settle_pool finds room for, and no more than a CPU gains by. A cache that does for all of them
    at full length is not limited.
    """
    most = slots_without_card(answers.prompt_tokens, answers.candidates)
    if host is None:
        return DecodePlan(wanted_slots or most, kv_cache=answers.kv_cache if answers.pooled else "16bit")
    wider = host.number_bytes / 2  # settle_pool counts numbers of 16 bits
    embeddings = shape.weights_gib(load_in_4bit=False) - shape.linear_weights * 2 / GIB
    linear = shape.weights_gib(load_in_4bit=load_in_4bit) - embeddings
    weights = embeddings * wider + linear * (1 if load_in_4bit else wider)
    fixed = _LIBRARIES_GIB + weights * (2 if weights <= _PACKED_GIB else 1)
    memory = PoolMemory(fixed / wider, host.gib * _PLANNED_FOR / wider, load_in_4bit=False, tiles=False)
    slots = wanted_slots or min(most, settle_pool(shape, answers, None, memory).slots)
    made = settle_pool(shape, answers, slots, memory)
    longest = max(answers.prompt_tokens, default=1) + answers.max_new_tokens
    is_enough = made.cache_tokens is not None and made.cache_tokens >= made.slots * longest
    return replace(made, cache_tokens=None if is_enough else made.cache_tokens, gib=round(made.gib * wider, 2))
