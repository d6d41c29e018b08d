"""Every recipe is parsed, complete, and says in its header what to expect."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fast_ft.recipe.lint import lint, stage_steps
from fast_ft.recipe.loader import json_schema, load_recipe, resolved
from fast_ft.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
HOMEWORK = ["simple", "medium", "strong", "strong-2025", "strong-flat"]


def load(name: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml")


def header(name: str) -> str:
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text("utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_all_recipes_are_there() -> None:
    assert {*HOMEWORK, "quickstart", "own-data"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_without_error_or_warning(name: str) -> None:
    assert lint(load(name)) == ([], [])


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_to_expect(name: str) -> None:
    text = header(name)
    assert text.startswith("# yaml-language-server: $schema=../docs/recipe.schema.json\n")
    for label in ("Command", "GPU", "Minutes", "Memory", "Score", "Source"):
        assert f"\n# {label} " in text
    assert f"recipes/{name}.yaml" in text


def test_the_committed_schema_is_current() -> None:
    committed = json.loads((ROOT / "docs" / "recipe.schema.json").read_text("utf-8"))
    assert committed == json_schema(), "write it again: python -m fast_ft schema > docs/recipe.schema.json"


@pytest.mark.parametrize("name", HOMEWORK)
def test_homework_recipes_keep_the_rules_and_find_the_cloned_files(name: str) -> None:
    recipe = load(name)
    assert recipe.rules == "ntu-ml-2025-hw5" and recipe.select.take == 100
    assert recipe.model.name_or_path == "unsloth/llama-2-7b-bnb-4bit"
    assert (recipe.data.train, recipe.data.test) == (
        "data/fastchat_alpaca_52k",
        "data/test_set_evol_instruct_150.json",
    )
    assert recipe.model.template == ("llama-3.1" if name == "simple" else "llama-2")
    assert recipe.lora.lora_dropout == 0.0
    assert (recipe.budget.train_minutes, recipe.budget.generate_minutes) == (None, None), "no clock cuts them"


@pytest.mark.parametrize(
    ("name", "r", "alpha", "rate", "warmup", "steps", "temperature", "new_tokens", "neftune"),
    [
        ("simple", 16, 16, 2e-4, 10, [26], 1.5, 100, None),
        ("medium", 16, 32, 2e-4, 5, [65], 0.7, 1024, None),
        ("strong", 16, 32, 1.5e-4, 10, [10, 169], 0.7, 1024, 5),
        ("strong-2025", 16, 32, 1.5e-4, 10, [10, 169], 0.7, 1024, 5),
        ("strong-flat", 16, 32, 1.5e-4, 10, [179], 0.7, 1024, 5),
    ],
)
def test_homework_values(
    name: str, r: int, alpha: float, rate: float, warmup: int, steps: list[int], temperature: float, new_tokens: int,
    neftune: float | None,
) -> None:  # fmt: skip
    recipe = load(name)
    assert (recipe.lora.r, recipe.lora.lora_alpha) == (r, alpha)
    assert (recipe.train.learning_rate, recipe.train.warmup_steps) == (rate, warmup)
    assert recipe.train.lr_scheduler_type == "linear" and recipe.train.neftune_noise_alpha == neftune
    assert stage_steps(recipe) == steps
    assert (recipe.generate.temperature, recipe.generate.max_new_tokens) == (temperature, new_tokens)
    assert (recipe.generate.top_p, recipe.generate.top_k) == (0.9, 30)


def test_the_control_differs_from_strong_in_stages_only() -> None:
    strong, flat = resolved(load("strong")), resolved(load("strong-flat"))
    for content in (strong, flat):
        del content["curriculum"], content["train"]["num_train_epochs"], content["train"]["max_steps"]
    assert strong == flat


def test_strong_2025_differs_from_strong_in_its_selection_only() -> None:
    strong, before = resolved(load("strong")), resolved(load("strong-2025"))
    now, then = strong.pop("select"), before.pop("select")
    assert strong == before
    assert (then["where"]["response_words"], now["where"]["response_words"]) == ("150..450", "60..450")
    assert not any(then["diversify"][kind] for kind in ("verb", "opening", "topic")) and now["diversify"]["topic"] == 1


@pytest.mark.parametrize("name", HOMEWORK)
def test_a_header_says_that_the_test_prompts_are_no_reason(name: str) -> None:
    text = " ".join(header(name).replace("#", " ").split())
    assert re.search(r"No count, keyword, topic or kind of the test prompts is a reason\b", text)


def test_medium_and_strong_keep_out_the_same_texts() -> None:
    assert load("medium").select.reject == load("strong").select.reject != load("strong-2025").select.reject
    assert load("medium").select.rank_by.keys() == {"score", "response_words"}


def test_the_quickstart_needs_no_gpu_and_no_network() -> None:
    recipe = load("quickstart")
    assert recipe.model.backend == "peft" and recipe.train.optim == "adamw_torch" and recipe.model.load_in_4bit
    assert len(recipe.curriculum.stages) == 2 and recipe.judge.kind == "reference"
    for path in (recipe.data.train, recipe.data.test, recipe.judge.references):
        assert path and (ROOT / path).is_file()
