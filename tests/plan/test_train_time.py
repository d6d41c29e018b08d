"""How long training takes: steps, and the validation loss that is measured between them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.data.prepare import prepare
from fast_ft.plan.cost_model import forward_seconds
from fast_ft.plan.micro_batches import cut, width
from fast_ft.plan.plans import step_seconds
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.plan.train_time import TrainMinutes, train_minutes, validation_seconds
from fast_ft.recipe.loader import load_recipe
from fast_ft.recipe.policy_ntu_hw5 import MODELS
from fast_ft.train.task import TrainTask
from tests.helpers.parts import POCKET, RecipeFactory
from tests.plan.test_cost_model import FLASH, LLAMA, T4

STEP = [200, 350, 420, 310]
STAGES = [[STEP] * 7, [STEP] * 5]
HELD_OUT = [150, 640, 330, 280, 220, 410, 390, 301]
PLAN = TrainPlan(4, most_tokens=1400, capture=True, backend="fused")


def minutes(rows: list[int], every: int | None) -> TrainMinutes:
    return train_minutes(LLAMA, FLASH, PLAN, STAGES, rows, every, T4)


def test_a_measurement_is_a_forward_pass_over_each_of_the_plans_pieces() -> None:
    pieces = cut(HELD_OUT, most_rows=4, most_tokens=1400)
    widths = [width(sum(HELD_OUT[i] for i in piece), capture=False) for piece in pieces]
    row = sum(n * n for n in HELD_OUT) / sum(HELD_OUT)
    assert len(pieces) >= 2 and all(each % 128 for each in widths), "without graphs"
    passes = [forward_seconds(LLAMA, FLASH, T4, each, row=row) for each in widths]
    found = validation_seconds(LLAMA, FLASH, PLAN, HELD_OUT, T4)
    assert found == pytest.approx(sum(max(each.card, each.host) for each in passes))
    trained = step_seconds(LLAMA, FLASH, PLAN, HELD_OUT, T4)
    assert 0.4 * trained < found < 0.5 * trained, "as many tokens, without their backward passes"


@pytest.mark.parametrize(
    ("every", "times"), [(None, [1, 1]), (3, [3, 2]), (7, [1, 1]), (1, [7, 5]), (5, [2, 2]), (100, [1, 1])]
)
def test_each_stage_has_its_measurements(every: int | None, times: list[int]) -> None:
    plain, found = minutes([], every), minutes(HELD_OUT, every)
    once = validation_seconds(LLAMA, FLASH, PLAN, HELD_OUT, T4) / 60
    assert [a - b for a, b in zip(found.stages, plain.stages, strict=True)] == pytest.approx([n * once for n in times])
    assert found.measurements == sum(times) and found.validation == pytest.approx(sum(times) * once)
    assert (plain.measurements, plain.validation) == (0, 0)


def test_the_plan_counts_them_as_often_as_training_measures_and_says_so(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a base of the size of Llama-2-7B, so that a measurement takes tenths of minutes on a T4."""

    def planned(*words: str) -> tuple[dict[str, Any], str]:
        assert main(["plan", path, *words, "--gpu", "t4", "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert main(["plan", path, *words, "--gpu", "t4"]) == 0
        return content, " ".join(capsys.readouterr().out.split())

    long = {"curriculum.stages": [], "train.num_train_epochs": 80, "train.eval_steps": None}
    path = str(recipe_file({**long, "model.name_or_path": MODELS[0], "model.tokenizer": str(POCKET)}))
    held_out = "data.validation={take: 8}"
    (rare, said), (often, more) = planned(held_out), planned(held_out, "train.eval_steps=1")
    recipe = load_recipe(path, [held_out, "train.eval_steps=1"])
    prepared = prepare(recipe)
    task = TrainTask(prepared.jobs, recipe.train, recipe.curriculum.carry, 1, 0, validation=prepared.validation)
    counts = [len(prepared.jobs), len(task.measurements.after)]
    assert [each["validation"]["times"] for each in (rare, often)] == counts and counts[0] < counts[1]
    for content, shown, count in ((rare, said, counts[0]), (often, more, counts[1])):
        assert f"validation 8 rows, measured {count} time" in shown and " of these minutes" in shown
        assert content["validation"]["rows"] == 8
    for key in (0, 1):
        longer = often["projected_minutes"][key] - rare["projected_minutes"][key]
        share = often["validation"]["projected_minutes"][key] - rare["validation"]["projected_minutes"][key]
        assert longer == pytest.approx(share, abs=0.11) and share > 1
    without, plain = planned()
    assert "validation" not in without and "measured" not in plain.replace("not measured", "")
