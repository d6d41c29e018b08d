"""A key without effect is never passed over in silence: an override, a recipe's key, an axis of a sweep."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fast_ft.cli.main import main
from fast_ft.common.errors import InputError
from fast_ft.recipe import effects
from fast_ft.recipe.lint import lint
from fast_ft.recipe.loader import load_recipe, resolved
from fast_ft.sweep import search_space
from tests.helpers.parts import RecipeFactory

STAGES = [{"name": "easy", "upto": 0.34, "num_train_epochs": 2}, {"name": "all", "upto": 1.0, "num_train_epochs": 13}]
OWN_RATES = [stage | {"learning_rate": 1e-4} for stage in STAGES]
GREEDY = {"generate": {"do_sample": False}}
SEARCH = {"space": {"lora.r": [8, 16]}}

#: An override without effect, and the recipe that it has none in.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("generate.temperature=0.3", GREEDY),
    ("generate.top_p=0.5", GREEDY),
    ("generate.top_k=5", GREEDY),
    ("generate.min_p=0.1", GREEDY),
    ("generate.temperature=0.3", {"generate": {"top_k": 1}}),
    ("generate.temperature=0.3", {"generate": {"top_k": 1, "do_sample": False}}),
    ("generate.top_p=0.5", {"generate": {"top_k": 1}}),
    ("generate={do_sample: false, min_p: 0.5}", {}),
    ("select.rank_by.score=1", {"select": {"take": 100, "method": "random"}}),
    ("select.method=middle", {"select": {"take": None, "deduplicate": "none", "rank_by": {"score": 1}}}),
    ("select.near_duplicate_similarity=0.9", {}),
    ("select.strata={score: 2}", {}),
    ("select.strata={score: 2}", {"select": {"take": None, "deduplicate": "none", "method": "stratified"}}),
    ("select.diversify.topic_similarity=0.3", {}),
    ("curriculum.by=score", {}),
    ("curriculum.cumulative=true", {}),
    ("curriculum.carry.optimizer=true", {"curriculum": {"stages": STAGES[1:]}}),
    ("curriculum.carry.schedule=true", {"curriculum": {"stages": STAGES}, "train": {"lr_scheduler_type": "constant"}}),
    ("train.warmup_steps=3", {"train": {"lr_scheduler_type": "constant"}}),
    ("train.warmup_ratio=0.1", {"train": {"lr_scheduler_type": "constant"}}),
    ("train.num_train_epochs=2", {"curriculum": {"stages": STAGES}}),
    ("train.learning_rate=1e-3", {"curriculum": {"stages": OWN_RATES}}),
    ("train.eval_steps=5", {}),
    ("train.load_best=true", {}),
    ("judge.references=answers.json", {}),
    ("judge.pattern=Yes.*", {"judge": {"references": "r"}}),
    ("judge.pattern=Yes.*", {"judge": {"references": "r", "kind": "openai"}}),
    *((f"{key}=1", {"judge": {"references": "r", "kind": "reference"}}) for key in (
        "judge.concurrency", "judge.max_retries", "judge.timeout_seconds", "judge.max_requests", "judge.max_dollars",
        "judge.max_minutes")),
    ("judge.protocol=ntu-ml-2025-hw5", {"judge": {"references": "r", "kind": "reference"}}),
    ("judge.references_from_course=true", {"rules": "ntu-ml-2025-hw5", "judge": {"kind": "openai"}, "model":
        {"name_or_path": "unsloth/llama-2-7b-bnb-4bit"}}),
    ("judge.model=gpt-4o", {"judge": {"references": "r", "kind": "reference"}}),
    ("judge.swap=true", {"judge": {"references": "r", "kind": "reference"}}),
    ("judge.dollars_per_million_tokens=[1, 2]", {"judge": {"references": "r", "kind": "reference"}}),
    ("judge.base_prompts=10", {"data": {"train": "rows"}}),
    ("model.revision=main", {"model": {"name_or_path": "."}}),
    ("search.stage_prompts=20", {"curriculum": {"stages": STAGES}, "search": SEARCH | {"pruner": "none"}}),
    ("search.pruner=hyperband", {"search": SEARCH}),
]  # fmt: skip


def write(tmp_path: Path, changes: dict[str, Any]) -> Path:
    content = {"model": {"name_or_path": "base"}, "data": {"train": "rows", "test": "prompts"}, "select": {"take": 100}}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def refusal(path: Path, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, words)
    return str(caught.value)


@pytest.mark.parametrize(("override", "changes"), CASES, ids=[override for override, _ in CASES])
def test_an_override_without_effect_is_refused_with_the_one_that_works(
    override: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, changes)
    said = refusal(path, override)
    assert f"override {override}: " in said and ": not used, since " in said
    works = shlex.split(said.partition("What works: ")[2])
    recipe = load_recipe(path, works)
    assert resolved(recipe) != resolved(load_recipe(path)) or recipe.search != load_recipe(path).search


def test_every_key_of_the_table_has_a_case(tmp_path: Path) -> None:
    tried = {override.partition("=")[0] for override, _ in CASES} | {"generate.min_p"}
    table = {key for rule in effects._RULES for key in rule.keys} | {"train.num_train_epochs", "train.learning_rate"}
    assert {key for key in table if not any(one == key or one.startswith(f"{key}.") for one in tried)} == set()


def test_the_words_of_the_commonest_cases(tmp_path: Path) -> None:
    path = write(tmp_path, {"curriculum": {"stages": STAGES}, "generate": {"do_sample": False}})
    assert refusal(path, "train.num_train_epochs=2") == (
        "override train.num_train_epochs=2: train.num_train_epochs: not used, since each stage has a num_train_epochs "
        "of its own. What works: curriculum.stages.0.num_train_epochs=2 curriculum.stages.1.num_train_epochs=2"
    )
    assert refusal(path, "generate.temperature=0.3").endswith(
        "since generate.do_sample is false. What works: generate.do_sample=true generate.temperature=0.3"
    )
    assert load_recipe(path, ["generate.do_sample=true", "generate.temperature=0.3"]).generate.temperature == 0.3
    assert load_recipe(path, ["generate.temperature=0.3", "generate.do_sample=true"]).generate.temperature == 0.3
    assert load_recipe(path, ["judge.kind=none", "judge.references=null", "judge.swap=false"]).judge.kind == "none"


def test_a_recipes_key_without_effect_is_a_warning(tmp_path: Path) -> None:
    changes = {
        "curriculum": {"stages": STAGES, "by": "score"},
        "train": {"num_train_epochs": 2},
        "generate": {"do_sample": False, "temperature": 0.7, "top_p": 0.5},
    }
    assert [str(warning) for warning in lint(load_recipe(write(tmp_path, changes)))[1]] == [
        "generate.temperature, generate.top_p: not used, since generate.do_sample is false",
        "train.num_train_epochs: not used, since each stage has a num_train_epochs of its own",
    ]


def test_a_recipe_that_a_program_wrote_out_warns_of_what_somebody_chose(tmp_path: Path) -> None:
    path = write(tmp_path, {"curriculum": {"stages": STAGES[1:]}, "generate": {"do_sample": False, "top_p": 0.5}})
    path.write_text(yaml.safe_dump(resolved(load_recipe(path))))
    assert [str(warning) for warning in lint(load_recipe(path))[1]] == [
        "generate.top_p: not used, since generate.do_sample is false"
    ]


@pytest.mark.parametrize(
    ("axes", "wrong"),
    [
        ({"generate.temperature": [0.3, 0.7]}, "generate.temperature"),
        ({"generate.temperature": {"low": 0.3, "high": 0.7}, "generate.top_p": [0.5]}, "generate.temperature"),
        ({"generate": [{"temperature": 0.3}, {"temperature": 0.7}]}, "generate"),
        ({"train.num_train_epochs": {"low": 1, "high": 5}}, "train.num_train_epochs"),
        ({"generate.temperature": [0.3, 0.7], "generate.do_sample": [True, False]}, None),
        ({"generate": [{"do_sample": True, "temperature": 0.3}, {"do_sample": False}]}, None),
        ({"train.num_train_epochs": [1, 2], "curriculum.stages": [[], STAGES]}, None),
        ({"curriculum.stages.1.num_train_epochs": [5, 13]}, None),
    ],
)
def test_an_axis_without_effect_is_refused(axes: dict[str, Any], wrong: str | None, tmp_path: Path) -> None:
    changes = {"curriculum": {"stages": STAGES}, "generate": {"do_sample": False}, "search": {"space": axes}}
    recipe = load_recipe(write(tmp_path, changes))
    if wrong is None:
        assert len(search_space.read(recipe).axes) == len(axes)
        return
    with pytest.raises(InputError, match=rf"^search\.space\.{re.escape(wrong)}: all values come to the same, since "):
        search_space.read(recipe)


def test_search_keys_are_for_sweep_alone(recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_file({"search.space": {"lora.r": [4, 8]}}))
    assert main(["data", path, "search.trials=3"]) == 2
    said = capsys.readouterr().err
    assert "override search.trials=3: only `sweep` reads search" in said
