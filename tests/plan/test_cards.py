"""Cards: the table of known ones, and what they lack."""

from __future__ import annotations

import pytest

from fast_ft.common.errors import InputError
from fast_ft.plan.cards import card


def test_unknown_cards_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'rtx490'.*did you mean 'rtx4090'"):
        card("rtx490")


def test_a_card_has_a_range_and_its_middle() -> None:
    h200 = card("h200")
    low, high = h200.rates
    assert low.tflops < h200.expected.tflops < high.tflops and low.gb_per_s == high.gb_per_s


def test_a_t4_is_given_nothing_that_its_capability_lacks() -> None:
    assert card("t4").capability == (7, 5)
    assert any("bfloat16" in text for text in card("t4").missing())
    assert card("l4").missing() == []
