"""What the plan is told of a training: by the recipe, the base and the card."""

from __future__ import annotations

from pathlib import Path

import pytest

from fast_ft.data.prepare import prepare
from fast_ft.hub.families import FamilySpec
from fast_ft.models import base_layers
from fast_ft.plan import cards, memory_model, planner
from fast_ft.recipe import loader
from tests.helpers import bases
from tests.helpers.parts import POCKET

ROWS = f"data.train={POCKET.parent / 'train.json'}"
RECIPE = "bench/recipes/first-100.yaml"


@pytest.mark.parametrize("name", ["gemma2", "phi3", "gelu", "two matrices"])
def test_a_base_of_another_family_is_counted_by_its_own_linear_layers(tmp_path: Path, name: str) -> None:
    bases_there = bases.ALL | {"two matrices": ("starcoder2", {})}
    kind, own = bases_there[name]
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **bases.SIZES | own))
    model.config.save_pretrained(str(tmp_path))
    plain = FamilySpec.of(tmp_path)
    shape = base_layers.counted(tmp_path, plain).shape
    weights = sum(
        module.weight.numel()
        for path, module in model.named_modules()
        if type(module).__name__ == "Linear" and path != "lm_head"
    )
    assert shape.linear_weights == weights
    assert (plain.shape.linear_weights == weights) == (name != "two matrices"), "Llama's three matrices of an MLP"


def test_our_own_families_are_counted_without_torchs_model(tmp_path: Path) -> None:
    spec = FamilySpec.of(POCKET)
    assert base_layers.counted(tmp_path / "nothing here", spec) is spec


def test_recipe_base_and_card_say_what_a_pass_holds() -> None:
    named = [f"model.name_or_path={POCKET}", ROWS, "model.max_length=256", "model.backend=fused"]
    recipe = loader.load_recipe(RECIPE, [*named, "lora.modules_to_save=[lm_head]"])
    prepared, family = prepare(recipe), FamilySpec.of(POCKET)
    shape = family.shape
    made = planner.training(recipe, prepared, family, backend="fused", card=cards.card("h200"))
    assert made.flash and not made.qk_norms
    assert made.whole_weights == shape.vocab_size * shape.hidden_size
    assert not planner.training(recipe, prepared, family, backend="fused", card=cards.card("t4")).flash
    assert not planner.training(recipe, prepared, family, backend="fused", card=None).flash
    plain = loader.load_recipe(RECIPE, named)
    less = planner.training(plain, prepared, family, backend="fused", card=cards.card("h200"))
    assert memory_model.fixed_gib(shape, made) > memory_model.fixed_gib(shape, less)
    other = FamilySpec.from_config({**_config(), "model_type": "gemma2"})
    general = planner.training(plain, prepared, other, backend="peft", card=cards.card("h200"))
    assert (general.loss_positions, general.logit_bytes) == (general.longest, 16), "each row's logits, all at once"
    assert less.loss_positions == 1024
    assert planner.training(plain, prepared, FamilySpec.from_config({**_config(), "model_type": "qwen3"}),
                            backend="fused", card=None).qk_norms  # fmt: skip


def _config() -> dict[str, object]:
    return dict(bases.SIZES)
