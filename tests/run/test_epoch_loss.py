"""Every place that quotes a loss quotes the mean of an epoch, and says so."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.report.write import write_comparison
from fast_ft.run import epoch_loss
from tests.helpers.parts import RecipeFactory

STAGES = [{"name": "easy", "ids": ["a", "b", "c"]}, {"name": "all", "ids": ["a", "b", "c", "d", "e"]}]


def lines(easy: list[float], rest: list[float]) -> list[dict[str, Any]]:
    return [*({"stage": "easy", "loss": each} for each in easy), *({"stage": "all", "loss": each} for each in rest)]


def test_an_epochs_mean_is_over_the_steps_of_its_own_stage() -> None:
    """Steps of two rows: an epoch has 2 in the first stage, 3 in the second."""
    found = lines([4.0, 2.0, 9.0, 9.0], [9.0, 9.0, 9.0, 0.5, 0.25, 0.75])
    assert epoch_loss.first_and_last(found, STAGES, 2) == (3.0, 0.5)
    said = "the mean loss per token went from 3.00 in the first epoch to 0.50 in the last"
    assert epoch_loss.sentence(found, STAGES, 2) == said
    assert epoch_loss.first_and_last(found[:-1], STAGES, 2) == (3.0, pytest.approx(9.75 / 3)), "ended within an epoch"
    assert epoch_loss.first_and_last(found[:5], STAGES, 2) == (3.0, 9.0), "a stage that has just begun"


def test_one_epoch_and_losses_that_are_no_numbers() -> None:
    nan = float("nan")
    assert epoch_loss.first_and_last(lines([nan, 2.0], []), STAGES, 2) == (2.0, 2.0)
    assert epoch_loss.sentence(lines([nan, 2.0], []), STAGES, 2) == (
        "the mean loss per token was 2.00 over its one epoch"
    )
    assert epoch_loss.sentence(lines([nan, nan], []), STAGES, 2) is None and epoch_loss.sentence([], STAGES, 2) is None
    assert epoch_loss.first_and_last(lines([3.0, 1.0], []), [], 2) == (2.0, 2.0), "a manifest without stages"


@pytest.mark.parametrize("responses_only", [True, False])
def test_card_manifest_report_and_comparison_quote_the_same_means(
    recipe_file: RecipeFactory, tmp_path: Path, responses_only: bool
) -> None:
    """Stages of 8 and 16 rows in steps of 4: the last epoch is the last 4 of 12 steps."""
    stages = [{"name": "easy", "upto": 0.5}, {"name": "all", "upto": 1.0}]
    path = recipe_file(
        {"curriculum.stages": stages, "train.num_train_epochs": 2, "train.completion_only_loss": responses_only}
    )
    folder = run(load_recipe(path, ["data.test=null"]), path)
    losses = [json.loads(line)["loss"] for line in folder.log.read_text().splitlines()]
    assert len(losses) == 12
    first, last = statistics.fmean(losses[:2]), statistics.fmean(losses[-4:])
    train = folder.done("train") or {}
    assert (train["first_epoch_loss"], train["last_epoch_loss"]) == (pytest.approx(first), pytest.approx(last))
    said = f"the mean loss per token went from {first:.2f} in the first epoch to {last:.2f} in the last"
    card = " ".join((folder.adapter / "README.md").read_text().split())
    assert said in card and said in folder.report.read_text()
    assert ("response tokens only" in card) is responses_only
    assert ("all tokens, prompts among them" in card) is not responses_only
    page = write_comparison([folder, folder], tmp_path / "both.html").read_text()
    assert "loss, mean of the last epoch" in page and page.count(f"{last:.2f}".rstrip("0")) >= 2
    assert "last loss" not in page
