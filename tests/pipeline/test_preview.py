"""--stop-after: a taste of a run, from which the run itself goes on to the very same adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fast_ft.cli.main import main
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from tests.helpers.parts import RecipeFactory, write_recipe

CHANGES = {"lora.lora_dropout": 0.1, "train.neftune_noise_alpha": 5}


@pytest.fixture(scope="module")
def whole(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run that nothing stopped."""
    path = write_recipe(tmp_path_factory.mktemp("whole"), tiny, train_file, test_file, CHANGES)
    return run(load_recipe(path), path)


@pytest.mark.parametrize("steps", [2, 4])  # at the first stage's end, within the second
def test_a_tasted_run_goes_on_to_the_same_adapter_and_answers(
    steps: int, whole: RunDir, recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(CHANGES)
    assert main([str(path), "--stop-after", str(steps)]) == 0
    out = capsys.readouterr().out
    assert out.count("  before  ") == out.count("  after   ") == 5 and f"{steps} of 6 steps" in out
    (root,) = (tmp_path / "runs").iterdir()
    folder = RunDir.at(root)
    assert folder.done("train") is None and not folder.adapter.exists() and not folder.taste.exists()
    assert len(folder.log.read_text().splitlines()) == steps
    taste = json.loads((root / "taste.json").read_text())
    assert (taste["steps"], taste["of"], len(taste["answers"])) == (steps, 6, 5)

    assert main([str(path)]) == 0
    assert folder.manifest()["digests"] == whole.manifest()["digests"]
    rates = [[json.loads(line)["learning_rate"] for line in f.log.read_text().splitlines()] for f in (folder, whole)]
    assert rates[0] == rates[1], "the schedule is the whole run's"


def test_a_taste_of_a_run_that_is_further_trains_nothing(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file()
    assert main([str(path), "--stop-after", "3"]) == 0
    assert main([str(path), "--stop-after", "1"]) == 0
    assert "3 of 6 steps" in capsys.readouterr().out
    assert main([str(path), "--stop-after", "99"]) == 0
    assert "6 of 6 steps" in capsys.readouterr().out
    assert main([str(path), "--stop-after", "0"]) == 2
    assert "--stop-after '0': it takes a whole number, at least 1" in capsys.readouterr().err
