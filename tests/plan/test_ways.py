"""Which way trains a recipe on which card: the one it names, or the one with evidence."""

from __future__ import annotations

import pytest

from fast_ft.models.loaders.base import ALONE_ONLY
from fast_ft.plan import cards
from fast_ft.plan.ways import ways
from fast_ft.recipe.schema import Recipe

T4, HOPPER, AMPERE = (7, 5), (9, 0), (8, 0)


def make(backend: str = "auto", **lora: object) -> Recipe:
    content = {"model": {"name_or_path": "base", "backend": backend}, "data": {"train": "rows.json"}, "lora": lora}
    return Recipe.model_validate(content)


def test_the_evidence_is_by_compute_capability() -> None:
    assert cards.by_evidence(HOPPER)[0] == ("fused", "unsloth", "peft")
    for others in (T4, AMPERE, (12, 0)):
        assert cards.by_evidence(others)[0] == ("unsloth", "fused", "peft")
    assert "never ran" in cards.by_evidence(T4)[1]
    assert "ways" not in cards.known()
    assert {cards.card(name).capability for name in cards.known()} >= {T4, HOPPER, AMPERE}


@pytest.mark.parametrize("capability", [T4, HOPPER, None])
@pytest.mark.parametrize("backend", ["fused", "unsloth", "peft"])
def test_a_way_that_is_named_has_no_other_beside_it(backend: str, capability: tuple[int, int] | None) -> None:
    assert ways(make(backend), capability) == ((backend,), "")


@pytest.mark.parametrize(
    ("lora", "capability", "names"),
    [
        ({}, HOPPER, ("fused", "unsloth", "peft")),
        ({"target_modules": ("q_proj",), "use_rslora": True}, HOPPER, ("fused", "unsloth", "peft")),
        ({"modules_to_save": ("lm_head",)}, HOPPER, ("fused", "peft")),
        ({"modules_to_save": ("embed_tokens",)}, HOPPER, ("peft",)),
        ({"lora_dropout": 0.1}, HOPPER, ("unsloth", "peft")),
        ({"lora_dropout": 0.1}, T4, ("unsloth", "peft")),
        ({"use_dora": True}, T4, ("peft",)),
        ({"use_dora": True}, None, ("peft",)),
    ],
)
def test_auto_leaves_out_what_does_not_know_the_lora(
    lora: dict, capability: tuple[int, int] | None, names: tuple[str, ...]
) -> None:
    assert ways(make(**lora), capability).names == names


def test_the_reason_is_the_evidence_or_what_is_not_known() -> None:
    assert ways(make(), T4).why == cards.by_evidence(T4)[1]
    assert ways(make(use_dora=True), HOPPER).why == "our own blocks cannot train DoRA"
    assert ways(make(use_dora=True), T4).why == "Unsloth cannot train DoRA"


def test_several_processes_train_through_our_own_blocks() -> None:
    assert ways(make("unsloth"), T4, world_size=2) == (("fused", "peft"), ALONE_ONLY)
    assert ways(make(), T4, world_size=2) == (("fused", "peft"), ALONE_ONLY)
    assert ways(make(), HOPPER, world_size=2).names == ("fused", "peft")
    assert "our own blocks" in ALONE_ONLY
