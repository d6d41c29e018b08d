"""The homework's rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from fast_ft.common.errors import InputError
from fast_ft.recipe.loader import load_recipe
from fast_ft.recipe.policy_ntu_hw5 import (
    ADAPTERS,
    LLAMA_2_7B,
    check_model_config,
    check_recipe,
    check_rows,
    max_train_rows,
    minutes,
)
from fast_ft.recipe.schema import Lora, Recipe
from fast_ft.run.folder import RunDir
from tests.helpers.parts import ROOT, RecipeFactory


def make(**values: object) -> Recipe:
    base = {
        "rules": "ntu-ml-2025-hw5",
        "model": {"name_or_path": "unsloth/llama-2-7b-bnb-4bit"},
        "data": {"train": "rows"},
    }
    return Recipe.model_validate(base | values)


def test_the_homeworks_own_settings_pass() -> None:
    assert check_recipe(make()) == [] and check_rows(100) == []
    assert check_model_config(dict(LLAMA_2_7B)) == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"seed": 42}, "seed"),
        ({"model": {"name_or_path": "unsloth/llama-2-7b", "load_in_4bit": False}}, "model.load_in_4bit"),
        ({"generate": {"kv_cache": "8bit"}}, "generate.kv_cache"),
        ({"model": {"name_or_path": "meta-llama/Llama-2-13b-hf"}}, "model.name_or_path"),
        ({"model": {"name_or_path": "meta-llama/Llama-2-7b-chat-hf"}}, "model.name_or_path"),
        ({"data": {"train": "rows", "max_train_rows": 101}}, "data.max_train_rows"),
        ({"select": {"take": 101}}, "select.take"),
        ({"budget": {"train_minutes": 240.0}}, "budget.train_minutes"),
        ({"budget": {"generate_minutes": 15.0}}, "budget.generate_minutes"),
        ({"lora": {"modules_to_save": ("lm_head",)}}, "lora.modules_to_save"),
        ({"model": {"name_or_path": "unsloth/llama-2-7b", "adapter": "runs/other/adapter"}}, "model.adapter"),
    ],
)
def test_each_rule_is_kept_and_only_where_it_is_asked_for(values: dict, key: str) -> None:
    problems = check_recipe(make(**values))
    assert len(problems) == 1 and problems[0].startswith(f"{key}: ")
    assert check_recipe(make(**values, rules=None)) == []


@pytest.mark.parametrize(
    "lora", [{"target_modules": ("q_proj",)}, {"lora_dropout": 0.05}, {"use_rslora": True}, {"use_dora": True}]
)
def test_any_kind_of_lora_is_allowed(lora: dict) -> None:
    assert check_recipe(make(lora=lora)) == []


def test_each_kind_of_adapter_has_its_line() -> None:
    """A kind that the schema adds has to be decided about here."""
    kinds = {f"lora.{name}" for name in Lora.model_fields} - {"lora.r", "lora.lora_alpha"}
    assert kinds | {"model.adapter"} == set(ADAPTERS)


def test_no_clock_cuts_a_homeworks_run(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    """Neither by an override, nor by what an earlier version wrote into the run's folder."""
    name = str(ROOT / "recipes" / "strong.yaml")
    with pytest.raises(InputError, match=r"budget\.generate_minutes: 5 is not allowed under rules: .* write null"):
        load_recipe(name, ["budget.generate_minutes=5"])
    path = recipe_file({"budget.train_minutes": 90, "budget.generate_minutes": 15, "output_dir": str(tmp_path / "run")})
    folder = RunDir.open(load_recipe(path), path)
    assert folder.recipe().budget.train_minutes == 90
    folder.update(recipe=folder.manifest()["recipe"] | {"rules": "ntu-ml-2025-hw5"})
    assert (folder.recipe().budget.train_minutes, folder.recipe().budget.generate_minutes) == (None, None)


def test_the_homeworks_minutes_are_what_a_recipe_with_rules_is_compared_with() -> None:
    assert (minutes(make(), "train_minutes"), minutes(make(), "generate_minutes")) == (240, 15)
    free = make(rules=None, budget={"train_minutes": 7.0})
    assert (minutes(free, "train_minutes"), minutes(free, "generate_minutes")) == (7, None)


def test_a_local_folder_is_left_to_its_config(tmp_path: Path) -> None:
    assert check_recipe(make(model={"name_or_path": str(tmp_path)})) == []


def test_a_model_of_another_shape_or_quantisation() -> None:
    assert len(check_model_config(LLAMA_2_7B | {"hidden_size": 5120, "num_hidden_layers": 40})) == 2
    assert "num_key_value_heads 8" in check_model_config(LLAMA_2_7B | {"num_key_value_heads": 8})[0]
    assert "gptq" in check_model_config(LLAMA_2_7B | {"quantization_config": {"quant_method": "gptq"}})[0]
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert check_model_config(LLAMA_2_7B | {"quantization_config": four}) == []


def test_the_limit_on_rows() -> None:
    assert max_train_rows(make()) == 100
    assert max_train_rows(make(data={"train": "rows", "max_train_rows": 50})) == 50
    assert max_train_rows(make(rules=None)) is None
    assert "101" in check_rows(101)[0]
