"""Projected times: against what was measured on the H200, and in the right order between cards."""

from __future__ import annotations

import pytest
from test_plan import LLAMA

from fast_ft.errors import InputError
from fast_ft.forecast import card, step_seconds
from fast_ft.plan import Plan


def seconds(name: str, plan: Plan, lengths: list[int], end: int) -> float:
    each = card(name)
    return step_seconds(LLAMA, plan, lengths, each.tflops[end], each.gb_per_s, load_in_4bit=True)


@pytest.mark.parametrize(("lengths", "measured"), [([512, 512], 0.0727), ([512, 512, 512, 512], 0.1257)])
def test_a_captured_pass_on_the_h200_lies_in_the_projected_range(lengths: list[int], measured: float) -> None:
    plan = Plan(len(lengths), capture=True)
    step = 0.05  # the optimizer's, which the measurement left out
    assert seconds("h200", plan, lengths, 1) - step < measured < seconds("h200", plan, lengths, 0) - step


def test_a_t4_waits_for_arithmetic_and_an_h200_for_launches() -> None:
    eager = Plan(8, most_tokens=2048)
    lengths = [350] * 8
    assert seconds("t4", eager, lengths, 1) > 5 * seconds("h200", eager, lengths, 1)
    captured = Plan(4, capture=True)
    assert seconds("h200", captured, lengths, 1) < 0.8 * seconds("h200", eager, lengths, 1)
    assert seconds("t4", captured, lengths, 1) == pytest.approx(seconds("t4", eager, lengths, 1), rel=0.15)


def test_recomputation_costs_half_as_much_again() -> None:
    lengths = [350] * 8
    ratio = seconds("t4", Plan(8, checkpointing=True), lengths, 0) / seconds("t4", Plan(8), lengths, 0)
    assert 1.4 < ratio < 1.5


def test_unknown_cards_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'rtx490'.*did you mean 'rtx4090'"):
        card("rtx490")


def test_a_t4_is_given_nothing_that_its_capability_lacks() -> None:
    assert card("t4").capability == (7, 5)
    assert any("bfloat16" in text for text in card("t4").missing())
    assert card("l4").missing() == []
