"""sweep/row_cache.py: rows that are kept between trials give what `prepare` gives, whatever else a recipe changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common.errors import InputError
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.recipe.loader import load_recipe
from fast_ft.recipe.schema import Curriculum, Train
from fast_ft.sweep.row_cache import RowCache
from tests.helpers.parts import RecipeFactory

_STAGES = [{"name": "one", "upto": 0.5, "num_train_epochs": 2}, {"name": "two", "upto": 1.0, "learning_rate": 0.1}]

#: For each key of these two sections, changes under which the key has another value than in `recipe_file`'s recipe.
OTHERS: dict[str, dict[str, Any]] = {
    "train.effective_batch_size": {"train.effective_batch_size": 8},
    "train.per_device_train_batch_size": {"train.per_device_train_batch_size": 2},
    "train.num_train_epochs": {"train.num_train_epochs": 3, "curriculum.stages": []},
    "train.max_steps": {"train.max_steps": 3},
    "train.learning_rate": {"train.learning_rate": 0.5},
    "train.lr_scheduler_type": {"train.lr_scheduler_type": "cosine"},
    "train.warmup_steps": {"train.warmup_steps": 2},
    "train.warmup_ratio": {"train.warmup_steps": None, "train.warmup_ratio": 0.5},
    "train.weight_decay": {"train.weight_decay": 0.1},
    "train.max_grad_norm": {"train.max_grad_norm": 0.1},
    "train.optim": {"train.optim": "adamw_8bit"},
    "train.neftune_noise_alpha": {"train.neftune_noise_alpha": 5.0},
    "train.completion_only_loss": {"train.completion_only_loss": False},
    "train.gradient_checkpointing": {"train.gradient_checkpointing": True},
    "train.capture": {"train.capture": False},
    "train.max_bad_steps": {"train.max_bad_steps": 2},
    "train.deterministic": {"train.deterministic": True},
    "train.save_steps": {"train.save_steps": 2},
    "train.eval_steps": {"train.eval_steps": 2},
    "train.load_best": {"train.load_best": True},
    "train.report_to": {"train.report_to": "trackio"},
    "curriculum.by": {"curriculum.by": "prompt_words"},
    "curriculum.cumulative": {"curriculum.cumulative": False},
    "curriculum.carry": {"curriculum.carry": {"optimizer": False, "schedule": False}},
    "curriculum.stages": {"curriculum.stages": _STAGES},
}


def _seen(found: PreparedData) -> dict[str, Any]:
    """Return what training, answers and the manifest read of the prepared data."""
    chosen = found.selection
    return {
        "jobs": found.jobs, "stages": found.stages, "staged": found.staged(), "leakage": found.leakage,
        "notes": found.notes, "examples": found.examples, "rows": found.rows, "selected": (chosen.indices, chosen.rows),
        "prompts": found.prompts, "prompt_ids": found.prompt_ids, "digests": found.digests,
        "validation": found.validation, "held_out": found.held_out,
    }  # fmt: skip


def test_each_key_of_training_and_curriculum_is_tried() -> None:
    names = {f"train.{name}" for name in Train.model_fields} | {
        f"curriculum.{name}" for name in Curriculum.model_fields
    }
    assert set(OTHERS) == names


def test_a_trial_is_prepared_as_its_recipe_alone_would_be(recipe_file: RecipeFactory, train_file: Path) -> None:
    rows = json.loads(train_file.read_text(encoding="utf-8"))
    for row in rows[:2]:  # one of many turns, one answer of which is not trained on
        row["conversations"] += [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "Then it is over."}]
        row["conversations"][1]["weight"] = 0
    train_file.write_text(json.dumps(rows), encoding="utf-8")
    validated = {"data.validation": {"take": 4}}
    first, cache = load_recipe(recipe_file(validated)), RowCache()
    for key, changes in OTHERS.items():
        recipe = load_recipe(recipe_file(validated | changes))
        section, name = key.split(".")
        assert getattr(getattr(recipe, section), name) != getattr(getattr(first, section), name), key
        cache.prepared(first)
        assert _seen(cache.prepared(recipe)) == _seen(prepare(recipe)), key


def test_what_is_said_of_stages_is_that_of_the_trials_own_stages(recipe_file: RecipeFactory, train_file: Path) -> None:
    rows = json.loads(train_file.read_text(encoding="utf-8"))
    for row in rows:
        row["conversations"][1]["value"] += " and so on" * 10  # all rows are about equally long
    train_file.write_text(json.dumps(rows), encoding="utf-8")
    alike, one = load_recipe(recipe_file()), load_recipe(recipe_file({"curriculum.stages": []}))
    cache = RowCache()
    assert any("hardly differ" in text for text in cache.prepared(alike).notes), "else this test shows nothing"
    assert not any("hardly differ" in text for text in cache.prepared(one).notes)


def test_a_trial_whose_answers_do_not_fit_is_refused_over_kept_rows_too(recipe_file: RecipeFactory) -> None:
    cache = RowCache()
    cache.prepared(load_recipe(recipe_file()))
    with pytest.raises(InputError, match=r"generate\.max_new_tokens 250 that is over the model's context of 256"):
        cache.prepared(load_recipe(recipe_file({"generate.max_new_tokens": 250})))
