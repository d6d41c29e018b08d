"""Trackers: none by default, refused under the homework's rules, and given the whole run's steps where asked for."""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from fast_ft.common.errors import InputError
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from tests.helpers.parts import ROOT, RecipeFactory


def test_trackers_and_hubs_are_refused_under_the_rules() -> None:
    path = ROOT / "recipes" / "strong.yaml"
    assert load_recipe(path).train.report_to == "none"
    with pytest.raises(InputError, match=r"train\.report_to: wandb is not allowed under rules: ntu-ml-2025-hw5"):
        load_recipe(path, ["train.report_to=wandb"])
    for key in ("train.push_to_hub=true", "train.hub_model_id=a/b"):
        with pytest.raises(InputError, match=r"unknown key; nothing is ever pushed to a hub"):
            load_recipe(path, [key])


def test_a_tracker_gets_every_step_of_the_run_once(recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback, trainer

    seen: list[tuple[int, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            assert args.report_to == ["wandb"] and args.trackio_space_id is None and not args.push_to_hub
            if "loss" in logs:
                seen.append((state.global_step, logs["loss"]))

    path = recipe_file({"train.report_to": "wandb"})
    with pytest.raises(InputError, match=r"wandb is not installed"):
        run(load_recipe(path), path, until="adapter")
    assert not (path.parent / "runs").exists()
    stub = types.ModuleType("wandb")
    stub.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(trainer, "get_reporting_integration_callbacks", lambda names: [Tracker] if names else [])
    folder = run(load_recipe(path), path, until="adapter")
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [step for step, _ in seen] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
