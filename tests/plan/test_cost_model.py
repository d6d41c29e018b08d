"""Memory and time of a pass: held to passes that were measured on a card, and to what each part should do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from bench.figures import RESULTS
from fast_ft.hub.families import ModelShape
from fast_ft.plan import cards, plans
from fast_ft.plan.cost_model import CONTEXT_GIB, Rates, Training, fixed_gib, kept_bytes, pass_gib, pass_seconds
from fast_ft.plan.plans import TrainPlan, step_seconds

LLAMA = ModelShape(4096, 11008, 32, 32, 32, 128, 32000, False)
TRAINING = Training(16, "adamw_8bit", load_in_4bit=True, backend="fused", rows=8, longest=700)
RATES = Rates(700.0, 4000.0, 90.0)
PASSES = json.loads((RESULTS / "h200-passes.json").read_text(encoding="utf-8"))["passes"]


def gib(tokens: int = 2048, recompute: int = 0, *, shape: ModelShape = LLAMA, capture: bool = False, **values: Any
) -> float:  # fmt: skip
    return pass_gib(shape, replace(TRAINING, **values), tokens, recompute, capture=capture)


def seconds(rates: Rates = RATES, *, tokens: int = 2048, recompute: int = 0, row: float = 300, capture: bool = True,
            shape: ModelShape = LLAMA, **values: Any) -> float:  # fmt: skip
    training = replace(TRAINING, **values)
    return pass_seconds(shape, training, rates, tokens, recompute, row=row, capture=capture)


@pytest.mark.parametrize("each", PASSES, ids=[each["what"] for each in PASSES])
def test_memory_is_what_the_allocator_reserved_on_a_card(each: dict[str, Any]) -> None:
    """The constants were fitted on these passes; they hold together within half a percent."""
    training = replace(TRAINING, r=each["r"], longest=each["longest_row"])
    predicted = fixed_gib(LLAMA, training) + pass_gib(
        LLAMA, training, each["tokens"], each["recompute_layers"], capture=each["capture"]
    )
    taken = CONTEXT_GIB + (0.08 if each["capture"] else 0.0)
    assert predicted == pytest.approx(each["reserved_gib"] + taken, rel=0.005)


def test_attentions_backward_pass_takes_memory_where_nothing_is_computed_again_too() -> None:
    """Rows of 2,048 tokens took 0.14 GiB more on a card than rows of a few hundred did."""
    assert gib(longest=2048) - gib(longest=300) > 0.1
    assert gib(longest=2048, recompute=32) - gib(longest=300, recompute=32) > 0.1


def test_grouped_heads_keep_narrower_keys_and_values() -> None:
    grouped = replace(LLAMA, num_key_value_heads=8)
    fewer = kept_bytes(LLAMA, TRAINING) - kept_bytes(grouped, TRAINING)
    assert fewer == 2 * 2 * 24 * 128, "keys and values of 24 heads in 16 bits"
    assert gib() - gib(shape=grouped) == pytest.approx(2048 * 32 * fewer / 2**30)


def test_a_larger_rank_keeps_its_inner_side_of_each_token() -> None:
    assert kept_bytes(LLAMA, replace(TRAINING, r=64)) - kept_bytes(LLAMA, TRAINING) == 2 * 7 * 48


def test_logits_of_all_positions_and_inputs_in_the_hosts_memory() -> None:
    every = pass_gib(LLAMA, TRAINING, 4096, 32, loss_positions=4096)
    assert every - pass_gib(LLAMA, TRAINING, 4096, 32) > 0.1
    offloaded = pass_gib(LLAMA, TRAINING, 4096, 32, offloaded=True)
    assert pass_gib(LLAMA, TRAINING, 4096, 32) - offloaded == pytest.approx(4096 * 32 * 8192 / 2**30, rel=0.01)


def test_attention_has_a_rate_of_its_own() -> None:
    slow = Rates(700.0, 4000.0, 45.0)
    more = seconds(slow, row=2000) - seconds(row=2000)
    assert more == pytest.approx(2 * 2048 * 2160 * 4096 * 32 * 3.5 * (1 / 45e12 - 1 / 90e12))
    assert seconds(replace(RATES, attention=None), row=2000) == seconds(replace(RATES, attention=700.0), row=2000)


def test_lora_is_counted_as_bytes() -> None:
    fast, slow = Rates(1e9, 4000.0, 1e9), Rates(1e9, 1000.0, 1e9)
    wide = replace(LLAMA, num_hidden_layers=1)
    moved = (seconds(slow, shape=wide, load_in_4bit=False) - seconds(fast, shape=wide, load_in_4bit=False)) * 4e12 / 3
    inside, outside = (sum(sizes) for sizes in zip(*wide.linear_shapes, strict=True))
    lora = 2048 * (8 * inside + 8 * outside)
    assert moved == pytest.approx(lora + 2048 * 95 * 2 * 4096, rel=1e-6)
    assert seconds(r=64) > seconds(r=16), "and its arithmetic"


def test_unpacking_costs_what_a_version_of_bitsandbytes_takes() -> None:
    t4 = cards.card("t4").expected
    older = seconds(t4, unpack_bytes=5.0) - seconds(t4, unpack_bytes=3.1)
    assert older == pytest.approx(2 * LLAMA.linear_weights * 1.9 / 260e9)


def test_a_slow_host_launches_slowly_and_a_graph_does_not_care() -> None:
    slow = replace(RATES, launch=3.0)
    assert seconds(slow, capture=False) == pytest.approx(3 * 0.17)
    assert seconds(RATES, capture=False) == pytest.approx(0.17)
    assert seconds(slow, capture=True) == seconds(RATES, capture=True)


def test_a_step_is_timed_by_its_own_rows() -> None:
    """One long row costs more than the same tokens in short rows: its attention does."""
    plan = TrainPlan(8, most_tokens=4096, capture=True)
    long, short = ([2048], [256] * 8)
    assert plans.widths_of(plan, long) == plans.widths_of(plan, short)
    assert step_seconds(LLAMA, TRAINING, plan, long, RATES) > 1.2 * step_seconds(LLAMA, TRAINING, plan, short, RATES)
