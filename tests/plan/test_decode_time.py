"""How long answers take: what a step reads and multiplies, and the range that a plan projects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fast_ft.hub.families import ModelShape
from fast_ft.plan import cards
from fast_ft.plan.cost_model import Rates
from fast_ft.plan.decode_pool import Answers
from fast_ft.plan.decode_time import FUSED_BYTES, UNPACKED_BYTES, answer_minutes, step_seconds

LLAMA = ModelShape(4096, 11008, 32, 32, 32, 128, 32000, False)
FREE = 1e12  #: of a rate that takes no time
T4 = cards.card("t4")
ANSWERS = Answers([133] * 150, 1024)


def test_a_step_reads_weights_and_each_rows_cache() -> None:
    rates = Rates(FREE, 260.0)
    weights = LLAMA.linear_weights * FUSED_BYTES + 2 * 32000 * 4096
    assert step_seconds(LLAMA, rates, 1, 0, FUSED_BYTES) == pytest.approx(weights / 260e9)
    more = step_seconds(LLAMA, rates, 64, 600, FUSED_BYTES) - step_seconds(LLAMA, rates, 64, 0, FUSED_BYTES)
    assert more == pytest.approx(64 * 600 * LLAMA.kv_bytes / 260e9), "half a MiB a token in a 7B"
    assert step_seconds(LLAMA, Rates(15.0, FREE), 64, 0, FUSED_BYTES) == pytest.approx(
        2 * 64 * (LLAMA.linear_weights + 32000 * 4096) / 15e12
    )


def test_the_slow_end_is_of_full_answers_from_weights_that_are_unpacked_in_each_step() -> None:
    low, high = answer_minutes(LLAMA, T4.rates, ANSWERS, 59, load_in_4bit=True)
    assert 4 * low < high
    short_low, short_high = answer_minutes(LLAMA, T4.rates, replace(ANSWERS, max_new_tokens=100), 59, load_in_4bit=True)
    assert short_low < low and short_high < high / 8
    one, _ = answer_minutes(LLAMA, T4.rates, ANSWERS, 1, load_in_4bit=True)
    assert one > 8 * low, "answers one by one read the weights for each"
    twice = answer_minutes(LLAMA, T4.rates, replace(ANSWERS, candidates=2), 59, load_in_4bit=True)
    assert twice[1] == pytest.approx(2 * high, abs=0.6)
    assert UNPACKED_BYTES > 9 * FUSED_BYTES


def test_no_more_slots_than_answers_are_counted() -> None:
    few = Answers([10, 10], 50)
    assert answer_minutes(LLAMA, T4.rates, few, 64, load_in_4bit=True) == answer_minutes(
        LLAMA, T4.rates, few, 2, load_in_4bit=True
    )


def test_what_all_prompts_share_is_passed_over_once() -> None:
    """150 prompts of 2,000 tokens, of which 1,800 are a system prompt, take about as long as prompts of 200."""
    apart, together, short = (
        answer_minutes(LLAMA, T4.rates, given, 8, load_in_4bit=True)[0]
        for given in (
            Answers([2000] * 150, 1), Answers([2000] * 150, 1, shared_tokens=1800), Answers([200] * 150, 1),
        )
    )  # fmt: skip
    assert short <= together < apart / 4
