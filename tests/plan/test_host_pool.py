"""How many answers a machine without a card decodes side by side: what its memory has room for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fast_ft.hub.families import GIB, ModelShape
from fast_ft.plan.decode_pool import Answers, DecodePlan, kv_bytes, settle_decoding

#: As SmolLM2-1.7B: one token's keys and values take 384 KiB in 32 bits.
SHAPE = ModelShape(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
    head_dim=64, vocab_size=49152, tied=True, number_bytes=4,
)  # fmt: skip
ANSWERS = Answers([200] * 100, 1024)


def settled(gib: float, wanted: int | None = None, *, number_bytes: int = 4, load_in_4bit: bool = False) -> DecodePlan:
    shape = replace(SHAPE, number_bytes=number_bytes)
    return settle_decoding(shape, ANSWERS, wanted, memory_gib=None, load_in_4bit=load_in_4bit, host_gib=gib)


def taken_gib(plan: DecodePlan) -> float:
    """What weights and cache take in 32 bits, counted by hand."""
    cells = plan.cache_tokens or plan.slots * (200 + 1024)
    return SHAPE.weights_gib(load_in_4bit=False) + cells * kv_bytes(SHAPE, "16bit") / GIB


@pytest.mark.parametrize("wanted", [None, 64])
def test_a_laptops_pool_stays_within_its_memory(wanted: int | None) -> None:
    """64 slots for whole answers would ask for 29 GiB of cache at once."""
    plan = settled(16.0, wanted)
    assert plan.slots == wanted or 16 < plan.slots < 64
    assert plan.cache_tokens is not None and 12 < taken_gib(plan) < plan.gib <= 0.9 * 16.0


def test_more_memory_never_means_fewer_slots_and_no_more_than_a_cpu_gains_by() -> None:
    plans = [settled(gib) for gib in (4, 10, 12, 14, 16, 24, 32, 64, 256)]
    slots = [plan.slots for plan in plans]
    assert slots == sorted(slots) and slots[0] == 1 and slots[-1] == 64
    assert plans[-1].cache_tokens is None, "enough for all"
    assert plans[-1] == settled(512), "where all fits, the plan does not hang on what is free"


def test_narrower_numbers_and_weights_leave_room_for_more() -> None:
    wide = settled(12.0).slots
    assert settled(12.0, number_bytes=2).slots > 2 * wide and settled(12.0, load_in_4bit=True).slots > 2 * wide


def test_a_machine_of_which_nothing_is_known_limits_nothing() -> None:
    for wanted, slots in ((None, 64), (7, 7)):
        made = settle_decoding(SHAPE, ANSWERS, wanted, memory_gib=None, load_in_4bit=False)
        assert made == DecodePlan(slots)
