"""Stored bases of 4 and 16 bits: which layers have which, and what the plan and the ways make of that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fast_ft.common.errors import InputError
from fast_ft.hub import download
from fast_ft.hub.families import GIB, LINEARS, FamilySpec
from fast_ft.hub.quantisation import Quantisation
from fast_ft.models import base_layers
from fast_ft.plan import planner
from fast_ft.plan.decode_pool import Answers, PoolMemory, settle_pool
from fast_ft.plan.decode_time import step_seconds
from fast_ft.plan.memory_model import fixed_gib
from fast_ft.plan.training_work import Rates
from fast_ft.recipe import schema
from fast_ft.recipe.loader import load_recipe
from tests.helpers import bases
from tests.helpers.parts import POCKET, RecipeFactory

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
STORED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MLP = 3 * 4096 * 11008  #: weights


def stored(skipped: list[str] | None) -> dict[str, Any]:
    return {"quantization_config": STORED | {"llm_int8_skip_modules": skipped}}


@pytest.mark.parametrize(
    "skipped",
    [
        ["lm_head", "model.layers.1.mlp"], ["lm_head", "model.layers.1"], ["lm_head", "down_proj"],
        ["lm_head", "k_proj", ""], ["lm_head", "model.layers.*.self_attn.v_proj"],
        ["lm_head", "model.*.1.*proj"], ["multi_modal_projector"], [],
        ["model.layers.0.self_attn.q_proj", "lm_head.weight"],
    ],
    ids=str,
)  # fmt: skip
def test_the_layers_are_those_that_transformers_leaves(skipped: list[str]) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    found = Quantisation.from_config(stored(skipped))
    assert found is not None
    for name in ["lm_head", *(f"model.layers.{index}.{part}" for index in (0, 1, 2, 10) for part in LINEARS)]:
        assert found.leaves(name) == (not should_convert_module(name, skipped)), name


def test_without_a_list_the_head_alone_is_left() -> None:
    assert Quantisation.from_config(LLAMA) is None
    for given in (stored(None), {"quantization_config": STORED}, {"quantization_config": "nf4"}):
        found = FamilySpec.from_config(LLAMA | given)
        assert found.quantisation == Quantisation() and found.shape.unquantised_weights == 0
        assert found.quantisation.leaves("lm_head") and not found.quantisation.leaves("model.layers.0.mlp.up_proj")


def test_weights_of_a_real_base_are_counted_as_they_are_loaded(tiny: Path, tmp_path: Path) -> None:
    import transformers

    skipped = ["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.v_proj"]
    base = bases.save_in_4_bits(tmp_path, tiny, skipped)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(base))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "proj" in name}
    whole = {name for name, kind in kinds.items() if kind == "Linear"}
    assert len(whole) == 4 and set(kinds.values()) == {"Linear", "Linear4bit"}
    shape = FamilySpec.of(base).shape
    assert shape.unquantised_weights == sum(model.get_submodule(name).weight.numel() for name in whole)


def test_layers_of_other_families_are_counted_by_their_own_names(tmp_path: Path) -> None:
    config = bases.random_base("phi3").config.to_dict() | stored(["lm_head", "layers.1.mlp.gate_up_proj"])
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    family = base_layers.counted(tmp_path, FamilySpec.of(tmp_path))
    assert family.general is not None and family.shape.unquantised_weights == 64 * 2 * 96


def test_a_plan_counts_16_bit_layers_as_16_bit_ones(recipe_file: RecipeFactory) -> None:
    """A stored base has 4 bits whatever the recipe asks for; what it leaves in 16 bits takes four times as much."""
    recipe = load_recipe(recipe_file({"model.load_in_4bit": False}))
    prepared: Any = SimpleNamespace(rows={})

    def held(config: dict[str, Any]) -> float:
        family = FamilySpec.from_config(LLAMA | config)
        return fixed_gib(
            family.shape, planner.training(recipe, prepared, family, backend="fused", card=None)
        )  # fmt: skip

    whole, four, some = held({}), held(stored(None)), held(stored(["lm_head", "model.layers.1.mlp"]))
    assert whole - four == pytest.approx(32 * (MLP + 4 * 4096**2) * 1.484 / GIB, rel=0.1)
    assert some - four == pytest.approx(MLP * 1.484 / GIB)


def test_a_decoding_plan_counts_them_too() -> None:
    plain, some = (FamilySpec.from_config(LLAMA | stored(skipped)).shape for skipped in (None, ["lm_head", "mlp"]))
    assert some.unquantised_weights == 0, "no name ends or begins so"
    some = FamilySpec.from_config(LLAMA | stored(["lm_head", "up_proj", "down_proj", "gate_proj"])).shape
    assert some.unquantised_weights == 32 * MLP
    answers = Answers([100] * 8, 100)
    plans = [
        settle_pool(
            shape, answers, None, PoolMemory(shape.weights_gib(load_in_4bit=True), memory, load_in_4bit=True)
        )
        for shape in (plain, some)
        for memory in (14.0, 40.0)
    ]  # fmt: skip
    assert [plan.dequantise for plan in plans] == [False, True, False, True]
    assert plans[2].gib - plans[0].gib == pytest.approx(32 * MLP * (1.484 - 1 / 16) / GIB, abs=0.02)
    # once all have 16 bits, what differs is the 4-bit weights that are held beside those, and their scales
    assert plans[1].gib - plans[3].gib == pytest.approx(32 * MLP * (0.516 + 1 / 16) / GIB, abs=0.02)
    times = [step_seconds(shape, Rates(50.0, 300.0), 1, 0.0, 0.5625) for shape in (plain, some)]
    assert times[1] - times[0] == pytest.approx(32 * MLP * (2 - 0.5625) / 300e9)


@pytest.mark.parametrize("skipped", [["model.layers.1.mlp"], []], ids=str)
def test_a_quantised_head_goes_the_general_way(skipped: list[str]) -> None:
    family = FamilySpec.from_config(LLAMA | stored(skipped))
    assert "its head is quantised" in (family.general or "")


def test_what_is_read_of_bitsandbytes_is_said_before_weights_are(tmp_path: Path) -> None:
    config = json.loads((POCKET / "config.json").read_text())
    for change, said in (
        (STORED | {"load_in_8bit": True, "load_in_4bit": False}, "quantised to 8 bits.*model.load_in_4bit=true"),
        (STORED | {"load_in_4bit": False}, "quantised to 8 bits"),
        (STORED | {"llm_int8_skip_modules": ["up_proj"]}, "write 'lm_head' into that list"),
    ):
        content = config | {"quantization_config": change, "tie_word_embeddings": True}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=said):
            download.model_folder(str(tmp_path), weights=False)


def test_a_head_of_4_bits_is_not_trained_whole(tmp_path: Path) -> None:
    config = json.loads((POCKET / "config.json").read_text()) | stored(["up_proj"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = FamilySpec.of(tmp_path)
    lora = schema.Lora(modules_to_save=("embed_tokens", "lm_head"))
    with pytest.raises(InputError, match=r"lora.modules_to_save: this base's head has 4 bits.*\['embed_tokens'\]"):
        base_layers.check(tmp_path, family, lora)
    base_layers.check(tmp_path, family, lora.model_copy(update={"modules_to_save": ("embed_tokens",)}))
    base_layers.check(tmp_path, replace(family, quantisation=None), lora)
