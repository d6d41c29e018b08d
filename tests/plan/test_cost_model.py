"""Time of a pass and of a step: what each part should do, and whether host or card is waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fast_ft.hub.families import ModelShape
from fast_ft.plan import cards, plans
from fast_ft.plan.constants import SECONDS
from fast_ft.plan.cost_model import card_parts, forward_seconds, pass_seconds, step_overhead
from fast_ft.plan.plans import step_seconds
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.plan.training_work import Rates, Training

LLAMA = ModelShape(4096, 11008, 32, 32, 32, 128, 32000, False)
TRAINING = Training(16, "adamw_8bit", load_in_4bit=True, backend="fused", rows=8, longest=700)
RATES = Rates(700.0, 4000.0, 90.0)
T4 = cards.card("t4").expected


FLASH, OTHERS = replace(TRAINING, flash=True), replace(TRAINING, backend="unsloth")


def parts(rates: Rates = RATES, *, tokens: int = 2048, recompute: int = 0, row: float = 300, shape: ModelShape = LLAMA,
          training: Training = FLASH) -> dict[str, float]:  # fmt: skip
    return card_parts(shape, training, rates, tokens, recompute, row=row)


def test_a_part_is_by_the_cards_rates_alone_and_its_constant_says_by_how_much_it_is_slower() -> None:
    found = parts(Rates(1.0, 1e9))
    assert found["products"] == pytest.approx(4 * 2048 * (LLAMA.linear_weights + 32000 * 4096) / 1e12)
    assert found["flash"] == pytest.approx(2 * 2048 * 300 * 4096 * 32 * 3.5 / 1e12)
    whole = pass_seconds(LLAMA, FLASH, RATES, 2048, 0, row=300, capture=True).card
    assert whole == pytest.approx(sum(SECONDS[name] * value for name, value in parts().items()))


def test_layers_that_are_computed_again_go_forward_twice() -> None:
    once, twice = parts(), parts(recompute=32)
    assert twice["products"] - once["products"] == pytest.approx(2 * 2048 * LLAMA.linear_weights / 700e12)
    assert twice["unpacking"] == pytest.approx(1.5 * once["unpacking"])
    assert once["elementwise"] < twice["elementwise"] < 1.6 * once["elementwise"]
    assert twice["flash"] / once["flash"] == pytest.approx(4.5 / 3.5)


@pytest.mark.parametrize("training", [FLASH, TRAINING, OTHERS, replace(OTHERS, backend="peft")])
def test_a_forward_pass_takes_less_than_half_of_both(training: Training) -> None:
    for tokens in (512, 4096):
        forward = forward_seconds(LLAMA, training, T4, tokens, row=300)
        both = pass_seconds(LLAMA, training, T4, tokens, 0, row=300, capture=False)
        assert 0.4 * both.card < forward.card < 0.5 * both.card and 0 < forward.host < both.host
    least = 2 * 4096 * (LLAMA.linear_weights + 32000 * 4096) / 65e12
    assert forward.card > least, "not quicker than its arithmetic at the card's rate on paper"


def test_attention_has_a_rate_of_its_own_where_the_card_has_no_flash_attention() -> None:
    slow = Rates(700.0, 4000.0, 45.0)
    own = [parts(rates, training=TRAINING, row=2000)["efficient_attention"] for rates in (slow, RATES)]
    assert own[0] - own[1] == pytest.approx(2 * 2048 * 2160 * 4096 * 32 * 3.5 * (1 / 45e12 - 1 / 90e12))
    assert parts(slow, row=2000)["flash"] == parts(row=2000)["flash"]


def test_lora_is_counted_as_bytes() -> None:
    one = replace(LLAMA, num_hidden_layers=1)
    inside, outside = (sum(sizes) for sizes in zip(*one.linear_shapes, strict=True))
    assert parts(shape=one)["lora"] == pytest.approx(2048 * (8 * inside + 8 * outside) / 4e12)


def test_bases_in_16_bits_are_not_unpacked() -> None:
    assert parts(training=replace(FLASH, load_in_4bit=False))["unpacking"] == 0


def test_unpacking_costs_what_a_version_of_bitsandbytes_takes() -> None:
    t4 = cards.card("t4").expected
    made = [
        pass_seconds(LLAMA, replace(OTHERS, unpack_bytes=each), t4, 2048, 0, row=300, capture=False).card
        for each in (5.0, 3.1)
    ]
    assert made[0] - made[1] == pytest.approx(2 * LLAMA.linear_weights * 1.9 / 260e9)


def test_a_slow_host_launches_slowly_and_a_graph_hardly_cares() -> None:
    slow = replace(RATES, launch=3.0)
    eager, graph = (
        [pass_seconds(LLAMA, FLASH, rates, 2048, 0, row=300, capture=flag) for rates in (RATES, slow)]
        for flag in (False, True)
    )
    assert eager[1].host == pytest.approx(3 * eager[0].host) and eager[1].card == eager[0].card == graph[0].card
    assert graph[0].host < 0.2 * eager[0].host


def test_our_own_steps_are_as_long_as_the_card_or_the_host_works() -> None:
    """A step is launched while the one before is computed; several processes wait for one another."""
    plan, rows = TrainPlan(8, most_tokens=4096, capture=True, backend="fused"), [256] * 8
    one, over = pass_seconds(LLAMA, FLASH, RATES, 2048, 0, row=256, capture=True), step_overhead(LLAMA, FLASH, RATES)
    assert step_seconds(LLAMA, FLASH, plan, rows, RATES) == pytest.approx(one.card + over.card)
    slow = replace(RATES, launch=1000.0)
    hosts = pass_seconds(LLAMA, FLASH, slow, 2048, 0, row=256, capture=True), step_overhead(LLAMA, FLASH, slow)
    assert step_seconds(LLAMA, FLASH, plan, rows, slow) == pytest.approx(sum(each.host for each in hosts))
    two = [step_seconds(LLAMA, FLASH, replace(plan, world_size=2), rows, RATES), one.card / 2]
    assert two[0] > two[1] + 0.02


def test_a_step_is_timed_by_its_own_rows() -> None:
    """One long row costs more than the same tokens in short rows: its attention does."""
    plan = TrainPlan(8, most_tokens=4096, capture=True)
    long, short = ([2048], [256] * 8)
    assert plans.widths_of(plan, long) == plans.widths_of(plan, short)
    assert step_seconds(LLAMA, TRAINING, plan, long, RATES) > 1.2 * step_seconds(LLAMA, TRAINING, plan, short, RATES)


def test_a_base_with_other_layers_is_counted_by_its_own() -> None:
    two_matrices = tuple([(4096, 4096)] * 4 + [(4096, 11008), (11008, 4096)]) * 32
    own = replace(LLAMA, own_linears=two_matrices)
    assert LLAMA.linear_weights - own.linear_weights == 32 * 4096 * 11008
    assert own.lora_weights(16) == LLAMA.lora_weights(16) - 32 * 16 * (4096 + 11008)
    assert own.linear_sides == (5 * 4096 + 11008, 5 * 4096 + 11008)
    assert replace(LLAMA, own_linears=tuple(LLAMA.linear_shapes * 32)).linear_sides == LLAMA.linear_sides
