"""Cards: the table of known ones, the one that is here, and those that the installed libraries cannot use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import pytest

from fast_ft.common import gpu, gpu_rates
from fast_ft.common.errors import InputError
from fast_ft.common.gpu_rates import MeasuredRates
from fast_ft.plan import cards, planner
from fast_ft.plan.cards import at_hand, card, known, refuse_old, short_name
from fast_ft.plan.constants import MEMORY
from fast_ft.recipe.loader import load_recipe
from tests.helpers.parts import ROOT


def test_unknown_cards_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'rtx490'.*did you mean 'rtx4090'.*or a memory size such as 8GiB"):
        card("rtx490")


@pytest.mark.parametrize("name", sorted(known()))
def test_every_card_is_one_that_the_requirements_can_use(name: str) -> None:
    made = card(name)
    low, high = made.rates
    assert made.capability >= (7, 5)
    assert 0 < low.tflops < made.expected.tflops < high.tflops <= made.product
    assert low.gb_per_s == high.gb_per_s > 0 and low.attention == made.attention < made.product
    assert len(made.source) > 20 and made.memory_gib > 4


@pytest.mark.parametrize("name", ["p100", "v100", "V100", "gtx 1080 ti", "titan v", "P40"])
def test_cards_that_cuda_13_dropped_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match=r"generation: the torch and bitsandbytes .* CUDA 13, .* below 7\.5"):
        card(name)


@pytest.mark.parametrize(
    ("driver", "short"),
    [
        ("Tesla T4", "t4"), ("NVIDIA T4", "t4"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX A6000", "a6000"), ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx2080ti"), ("NVIDIA GeForce RTX 2060", "rtx2060"),
        ("NVIDIA GeForce RTX 3080", "rtx3080"), ("NVIDIA GeForce RTX 4070 SUPER", "rtx4070"),
        ("NVIDIA GeForce RTX 5060 Ti", "rtx5060ti"), ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None), ("NVIDIA L40", None),
    ],
)  # fmt: skip
def test_a_card_is_known_by_its_drivers_name(driver: str, short: str | None) -> None:
    assert short_name(driver) == short


def test_a_t4_that_measures_fast_for_a_second_is_still_a_t4() -> None:
    """24 TFLOP/s were an RTX 3060's once, bandwidth and all; and 42 in a short run are not kept up."""
    t4 = card("t4")
    for measured in (24.0, 42.3):
        here = at_hand("Tesla T4", (7, 5), 14.5, MeasuredRates(measured, 255.0, 19.2e-6))
        assert here.tflops == t4.tflops and here.attention == t4.attention
        assert (here.name, here.memory_gib, here.gb_per_s, here.launch) == ("Tesla T4", 14.5, 255.0, 2.0)
    slow = at_hand("Tesla T4", (7, 5), 14.5, MeasuredRates(12.0, 255.0, 9e-6))
    assert slow.tflops == (7.1, 8.8) and slow.attention == 10.5, "half of what a T4 keeps up"


def test_a_card_that_is_not_in_the_table_goes_by_its_measured_rate() -> None:
    here = at_hand("NVIDIA GeForce RTX 3080 Laptop GPU", (8, 6), 15.6, MeasuredRates(50.0, 380.0, 4.5e-6))
    assert here.tflops == (30.0, 50.0) and here.attention == 20.0 and here.gb_per_s == 380.0
    hopper = at_hand("NVIDIA GH200", (9, 0), 90.0, MeasuredRates(700.0, 3000.0, 4.5e-6))
    assert hopper.attention == pytest.approx(84.0), "torch's attention does not use its instructions for products"
    h200 = at_hand("NVIDIA H200", (9, 0), 139.0, MeasuredRates(55.0, 654.0, 4.5e-6))
    assert h200.tflops[1] == 55.0 and h200.gb_per_s == 654.0, "a part of one, as in the bench's emulation"


def test_a_bare_memory_size_has_the_slowest_cards_rates() -> None:
    made = card("8GiB")
    assert made.memory_gib == 8 and "no card is named" in made.source
    assert all(made.expected.tflops <= card(name).expected.tflops for name in known())
    assert card("16 gb").memory_gib == pytest.approx(14.9, abs=0.01)
    for wrong in ("0.5GiB", "5000GiB"):
        with pytest.raises(InputError, match=r"from 1GiB to 1024GiB"):
            card(wrong)


def test_a_t4_is_given_nothing_that_its_capability_lacks() -> None:
    assert card("t4").capability == (7, 5)
    assert any("bfloat16" in text for text in card("t4").missing())
    assert card("l4").missing() == []


def windows(*seconds: float) -> Iterator[float]:
    return chain(seconds, repeat(seconds[-1]))


def test_a_rate_is_measured_until_it_stops_falling() -> None:
    assert gpu_rates.settled(windows(1.0, 1.3, 1.5, 1.51, 9.0)) == 1.51
    assert gpu_rates.settled(windows(2.0, 1.0, 1.0)) == 1.0, "the first window was of a card that woke up"
    rising = (1.0 + n / 10 for n in range(1000))
    assert gpu_rates.settled(rising) == pytest.approx(1.7), "eight windows, then the slowest"


def test_a_gpu_that_is_too_old_is_refused_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    built = ["sm_75", "sm_80", "sm_90"]
    refuse_old("Tesla T4", (7, 5), built)
    refuse_old("Tesla V100", (7, 0), ["sm_60", "sm_70", "sm_75"])  # a torch of one's own, built for it
    measured: list[Any] = []
    monkeypatch.setattr(gpu, "gpu", lambda: {"name": "Tesla V100-SXM2-16GB"})
    monkeypatch.setattr(gpu, "free_gpu_gib", lambda: 15.0)
    monkeypatch.setattr(gpu, "capabilities", lambda: ((6, 0), built))
    monkeypatch.setattr(gpu_rates, "measure", lambda: measured.append(1))
    with pytest.raises(InputError, match=r"Tesla V100.*compute capability 6\.0.*CUDA 13"):
        planner.card_here()
    assert not measured
    monkeypatch.setattr(gpu, "capabilities", lambda: ((7, 5), built))
    monkeypatch.setattr(gpu, "gpu", lambda: {"name": "Tesla T4"})
    monkeypatch.setattr(gpu_rates, "measure", lambda: MeasuredRates(30.0, 250.0, 9e-6))
    here = planner.card_here()
    assert here is not None and here.tflops == cards.card("t4").tflops
    assert here.memory_gib == pytest.approx(15.0 + MEMORY["context_gib"])


def test_a_recipe_names_the_card_to_plan_for_where_none_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu", lambda: None)
    named = {name: load_recipe(ROOT / "recipes" / "simple.yaml", [f"budget.gpu={name}"]) for name in ("l4", "v100")}
    for_it = planner.card_for(named["l4"], None)
    assert for_it == cards.card("l4") and planner.card_for(named["l4"], "t4") == cards.card("t4")
    with pytest.raises(InputError, match=r"budget\.gpu: 'v100' is a card of the Volta generation"):
        planner.card_for(named["v100"], None)
    unnamed = load_recipe(ROOT / "recipes" / "simple.yaml", ["budget.gpu=null"])
    assert planner.card_for(unnamed, None) is None
