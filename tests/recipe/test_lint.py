"""Consequences seen before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fast_ft.hub.families import context_length
from fast_ft.recipe.lint import lint, stage_steps
from fast_ft.recipe.loader import load_recipe
from fast_ft.recipe.schema import Recipe

STAGES = [{"name": "easy", "upto": 0.34, "num_train_epochs": 2}, {"name": "all", "upto": 1.0, "num_train_epochs": 13}]


def make(**changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "model": {"name_or_path": "unsloth/llama-2-7b-bnb-4bit"},
        "data": {"train": "rows", "test": "prompts"},
        "select": {"take": 100},
    }
    for key, values in changes.items():
        base[key] = base.get(key, {}) | values if isinstance(values, dict) else values
    return Recipe.model_validate(base)


def errors(**changes: Any) -> list[str]:
    return [str(problem) for problem in lint(make(**changes))[0]]


def test_a_sound_recipe_has_neither_errors_nor_warnings() -> None:
    assert lint(make()) == ([], [])
    assert lint(make(curriculum={"stages": STAGES})) == ([], [])


def test_steps_are_those_of_the_issues_table() -> None:
    assert stage_steps(make()) == [13]
    assert stage_steps(make(train={"num_train_epochs": 5})) == [65]
    assert stage_steps(make(train={"num_train_epochs": 1.5})) == [20]
    assert stage_steps(make(train={"num_train_epochs": 0.1})) == [2]
    half = [STAGES[0] | {"num_train_epochs": 0.5}, STAGES[1] | {"num_train_epochs": 12.5}]
    assert stage_steps(make(curriculum={"stages": half})) == [3, 163]
    assert stage_steps(make(curriculum={"stages": STAGES})) == [10, 169]
    assert stage_steps(make(curriculum={"stages": STAGES, "cumulative": False})) == [10, 13 * 9]
    assert stage_steps(make(select={"take": None})) is None
    assert stage_steps(make(select={"take": None}, data={"max_train_rows": 16})) == [2]


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"train": {"warmup_steps": 13}}, "train.warmup_steps: 13 steps of warm-up, but the run has at most 13"),
        (
            {"train": {"warmup_steps": 10}, "curriculum": {"stages": STAGES, "carry": {"schedule": False}}},
            "train.warmup_steps: 10 steps of warm-up, but a stage has at most 10",
        ),
        ({"train": {"warmup_ratio": 1.0}}, "train.warmup_ratio: 13 steps of warm-up, but the run has at most 13"),
        ({"train": {"warmup_ratio": 0.1, "warmup_steps": 5}}, "train.warmup_ratio: 0.1 of all steps, but train.warmup"),
        ({"train": {"warmup_steps": None}}, "train.warmup_steps: null, and no train.warmup_ratio"),
        ({"model": {"backend": "unsloth"}, "lora": {"use_dora": True}}, "model.backend: unsloth does not know DoRA"),
        ({"model": {"backend": "fused"}, "lora": {"lora_dropout": 0.1}}, "model.backend: fused does not know dropout"),
        (
            {"model": {"backend": "unsloth"}, "lora": {"modules_to_save": ("lm_head",)}},
            "model.backend: unsloth does not know modules that are trained whole",
        ),
        ({"lora": {"modules_to_save": ("lm_head", "lm_head")}}, "lora.modules_to_save: a module is named twice"),
        ({"generate": {"max_new_tokens": 4096}}, "generate.max_new_tokens: 4096 new tokens leave no room"),
        ({"model": {"max_length": 4097}}, "model.max_length: 4097 tokens"),
        ({"data": {"max_train_rows": 96}}, "select.take: 100 rows, where data.max_train_rows allows 96"),
        ({"lora": {"r": 0}}, "lora.r: rank 0"),
        ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha: 0"),
        ({"lora": {"target_modules": ()}}, "lora.target_modules"),
        (
            {"lora": {"target_modules": ("q_proj", "v_porj")}},
            "lora.target_modules: 'v_porj' is not a layer that a "
            "LoRA can be put on (did you mean 'v_proj'?); there are q_proj, k_proj, v_proj, o_proj, gate_proj, "
            "up_proj, down_proj",
        ),
        *(
            ({"lora": {"target_modules": (name,)}}, f"lora.target_modules: {name!r} is not")
            for name in ("nope", "norm", "mlp", "lm_head", "all-linear", "self_attn", "Q_PROJ", "")
        ),
        ({"train": {"per_device_train_batch_size": 3}}, "train.per_device_train_batch_size: 3 does not divide"),
        ({"train": {"per_device_train_batch_size": 16}}, "train.per_device_train_batch_size: 16 does not divide"),
        ({"select": {"where": {"scor": 4}}}, "select.where.scor: unknown metric 'scor' (did you mean 'score'?)"),
        ({"select": {"rank_by": {"response_wrods": 1}}}, "select.rank_by.response_wrods: unknown metric"),
        ({"select": {"where": {"score": "about 4"}}}, "select.where.score: "),
        ({"select": {"where": {"ends_cleanly": "yes"}}}, "select.where.ends_cleanly: "),
        ({"select": {"where": {"score": True}}}, "select.where.score: true is not allowed"),
        ({"curriculum": {"by": "lenght"}}, "curriculum.by: unknown metric"),
        ({"curriculum": {"stages": [{"name": "a"}]}}, "curriculum.stages.0: stage 'a' has neither"),
        ({"curriculum": {"stages": [{"name": "a", "upto": 1, "where": {"score": 4}}]}}, "curriculum.stages.0: stage"),
        (
            {"curriculum": {"stages": [{"name": "a", "upto": 1}, {"name": "b", "upto": 0.5}]}},
            "curriculum.stages.1.upto",
        ),
        (
            {"curriculum": {"stages": [{"name": "a", "upto": 0.5}, {"name": "a", "upto": 1}]}},
            "curriculum.stages.1.name",
        ),
        ({"curriculum": {"stages": [{"name": "a", "where": {"len": 4}}]}}, "curriculum.stages.0.where.len: unknown"),
        ({"judge": {"kind": "reference"}}, "judge.references: missing"),
        (
            {"judge": {"kind": "reference", "references": "r", "pattern": "Yes("}},
            "judge.pattern: 'Yes(' is no regular expression (missing )",
        ),
        ({"judge": {"kind": "reference", "references": "r"}, "data": {"test": None}}, "judge.kind: reference has"),
        ({"judge": {"kind": "openai"}, "data": {"test": None}}, "judge.kind: openai has"),
        ({"judge": {"kind": "openai", "swap": True}}, "judge.swap: without judge.references"),
        ({"judge": {"kind": "openai", "model": " "}}, "judge.model: the text is empty"),
        ({"data": {"test": "./rows"}}, "data.test: ./rows is the training data too"),
        ({"data": {"train": " "}}, "data.train: the text is empty"),
        ({"output_dir": "runs/{digest}"}, "output_dir: {digest} is unknown"),
    ],
)
def test_each_error_stands_alone_and_names_its_key_first(changes: dict, start: str) -> None:
    found = errors(**changes)
    assert len(found) == 1 and found[0].startswith(start), found


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"lora": {"lora_dropout": 0.05}}, "lora.lora_dropout"),
        ({"select": {"rank_by": {"score": 1}, "method": "random"}}, "select.rank_by"),
        ({"select": {"method": "middle"}}, "select.method"),
        ({"curriculum": {"stages": [{"name": "a", "upto": 0.9}]}}, "curriculum.stages: the last stage ends at 0.9"),
        ({"train": {"learning_rate": 2.0}}, "train.learning_rate"),
        ({"train": {"save_steps": 14}}, "train.save_steps: step 14 never comes"),
        ({"train": {"save_steps": 170}, "curriculum": {"stages": STAGES}}, "train.save_steps: step 170 never comes"),
        ({"train": {"max_steps": 14}}, "train.max_steps: step 14 never comes, since the epochs end after at most 13"),
        ({"generate": {"do_sample": False, "num_return_sequences": 3}}, "generate.num_return_sequences: 3 equal"),
        ({"judge": {"references": "r"}}, "judge.references: not used"),
        ({"judge": {"swap": True}}, "judge.swap: not used"),
        ({"select": {"rank_by": {"score": 0}}}, "select.rank_by.score: weight 0"),
    ],
)
def test_a_warning_is_no_error(changes: dict, start: str) -> None:
    found, warnings = lint(make(**changes))
    assert found == [] and len(warnings) == 1 and str(warnings[0]).startswith(start)


def test_layers_are_named_as_peft_names_them() -> None:
    names = ("q_proj", "self_attn.v_proj", "layers.1.mlp.up_proj", "model.layers.11.mlp.down_proj")
    assert lint(make(lora={"target_modules": names})) == ([], [])


def test_the_context_is_read_from_a_folder_or_a_name(tmp_path: Path) -> None:
    assert context_length("meta-llama/Llama-2-7b-hf") == 4096
    assert context_length("meta-llama/Llama-3.2-1B") is None
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    assert context_length(str(tmp_path)) == 512
    (tmp_path / "config.json").write_text("{")
    assert context_length(str(tmp_path)) is None


def test_load_recipe_gives_the_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: a}\ndata: {train: b}\nlora:\n  r: 0\n")
    with pytest.raises(ValueError, match=r"r\.yaml:4: lora\.r: rank 0"):
        load_recipe(path)
