"""Bad numbers: skipped, counted, gone back from; and finished runs with a useless result."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_ft.cli.main import main
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.generate.answers import Answer
from fast_ft.models.adapter_effect import AdapterEffect
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.models.loaders.peft import PeftLoader
from fast_ft.pipeline import sanity_checks
from fast_ft.pipeline.preview import preview
from fast_ft.pipeline.run import run
from fast_ft.recipe import schema
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from fast_ft.run.listing import list_runs
from tests.helpers.parts import POCKET, RecipeFactory, write_recipe

Spoil = Callable[[int], bool]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Spoil], None]:
    """Make the hidden states ("loss") or their gradients ("gradient") NaN in the chosen training passes, from 1."""

    def arrange(what: str, when: Spoil) -> None:
        load = PeftLoader.for_training

        def for_training(self: Any, adapter: Path | None = None) -> LoadedModel:
            loaded, passes = load(self, adapter), [0]

            def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                if not torch.is_grad_enabled() or not loaded.model.training:
                    return output
                passes[0] += 1
                if when(passes[0]):
                    if what == "loss":
                        return output * float("nan")
                    output = output.requires_grad_() if not output.requires_grad else output
                    weight = next(p for p in loaded.model.parameters() if p.requires_grad)
                    return output + Spoilt.apply(weight.sum() * 0)
                return output

            loaded.model.get_input_embeddings().register_forward_hook(hook)
            return loaded

        monkeypatch.setattr(PeftLoader, "for_training", for_training)

    return arrange


class Spoilt(torch.autograd.Function):
    """Zero forward, NaN backward: a finite loss with gradients that are none."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(value)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.sum() * float("nan")


def go(path: Path, *overrides: str) -> RunDir:
    return run(load_recipe(path, overrides), path, until="adapter")


def log(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def path(recipe_file: RecipeFactory, tmp_path: Path) -> Path:
    """12 steps, a row each pass being a whole step's."""
    return recipe_file(
        {
            "curriculum.stages": [], "train.num_train_epochs": 3, "train.save_steps": 2, "train.max_bad_steps": 3,
            "output_dir": str(tmp_path / "run"), "train.per_device_train_batch_size": 4,
        }
    )  # fmt: skip


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_without_finite_numbers_is_skipped_counted_and_logged(
    path: Path, tmp_path: Path, spoil: Callable[[str, Spoil], None], what: str
) -> None:
    spoil(what, lambda number: number in (5, 8, 9))
    folder = go(path)
    lines = log(folder.root)
    assert [line["step"] for line in lines if line["skipped"]] == [5, 8, 9] and len(lines) == 12
    assert math.isfinite(lines[4]["loss"]) == (what == "gradient") and not math.isfinite(lines[4]["grad_norm"])
    assert "loss_scale" in lines[4]
    assert all(math.isfinite(lines[number]["loss"]) for number in (5, 6, 9, 10, 11)), "the weights are untouched"
    assert (folder.done("train") or {})["skipped_steps"] == 3


def test_after_max_bad_steps_the_run_goes_back_and_halves_the_learning_rate(
    path: Path, tmp_path: Path, spoil: Callable[[str, Spoil], None], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = log(go(path, f"output_dir={tmp_path}/whole").root)
    spoil("loss", lambda number: 6 <= number <= 8)  # steps 6 to 8, the first time
    folder = go(path)
    lines = log(folder.root)
    assert [line["step"] for line in lines] == [*range(1, 13)]
    assert [line["step"] for line in log(folder.root, "log-diverged.jsonl")] == [5, 6, 7, 8]
    rates, plain = ([line["learning_rate"] for line in each] for each in (lines, wanted))
    assert rates[:4] == plain[:4] and rates[4:] == pytest.approx([rate / 2 for rate in plain[4:]])
    assert all(math.isfinite(line["loss"]) for line in lines)
    said = "from step 6 on: back to the state after step 4; the learning rate is halved from there"
    assert said in capsys.readouterr().err
    assert any(said in text for text in folder.manifest()["notes"])


def test_failing_again_it_stops_with_the_last_good_adapter_and_says_so(
    path: Path, tmp_path: Path, spoil: Callable[[str, Spoil], None], capsys: pytest.CaptureFixture[str]
) -> None:
    four = go(path, f"output_dir={tmp_path}/four", "train.max_steps=4", "train.lr_scheduler_type=constant")
    spoil("loss", lambda number: number >= 6)
    overrides = ["train.lr_scheduler_type=constant"]
    with pytest.raises(InputError, match=r"run/adapter is the adapter after step 4, the last good one"):
        go(path, *overrides)
    folder = RunDir.at(tmp_path / "run")
    train = folder.done("train") or {}
    assert (train["stopped_at_step"], train["of_steps"], train["why"]) == (4, 12, "numbers")
    assert folder.manifest()["digests"]["adapter"] == four.manifest()["digests"]["adapter"]
    assert len(log(folder.root)) == 4 and "that is the end" in capsys.readouterr().err
    assert main([str(path), *overrides]) == 0, "the same command goes on with it"
    assert folder.pred.is_file()


def test_without_any_good_state_there_is_no_adapter(
    path: Path, tmp_path: Path, spoil: Callable[[str, Spoil], None]
) -> None:
    spoil("loss", lambda number: True)
    with pytest.raises(InputError, match=r"came to nothing.*learning_rate \(0\.01\).*log-diverged\.jsonl"):
        go(path)
    assert not (tmp_path / "run" / "adapter").exists() and RunDir.at(tmp_path / "run").done("train") is None


def test_no_checkpoint_of_skipped_steps_takes_the_place_of_a_good_one(
    path: Path, spoil: Callable[[str, Spoil], None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil("gradient", lambda number: 6 <= number <= 8)
    assert len(log(go(path, "train.save_steps=1").root)) == 12
    assert "from step 6 on: back to the state after step 4; the learning rate is halved" in capsys.readouterr().err


def test_without_a_state_from_before_the_bad_steps_no_half_learning_rate_is_claimed(
    path: Path, tmp_path: Path, spoil: Callable[[str, Spoil], None]
) -> None:
    overrides = ["train.save_steps=null"]
    preview(load_recipe(path, overrides), path, 5)
    spoil("loss", lambda number: number <= 3)
    with pytest.raises(InputError, match=r"came to nothing: .* are not finite, and no earlier state .* begins again"):
        go(path, *overrides)
    assert len(log(go(path, *overrides, "train.max_bad_steps=4").root)) == 12, "the same command begins again"


# Finished runs with a useless result


def effect(without: float, tuned: float) -> AdapterEffect:
    return AdapterEffect(8, without, tuned)


def test_a_loss_that_stands_still_is_a_warning() -> None:
    section = schema.Train(learning_rate=1e-9, warmup_steps=0)
    text = sanity_checks.stands_still(effect(2.0, 1.9981), section, 12)
    assert text is not None and "stood still: 2.0000 before training, 1.9981 after it" in text
    assert "over 8 rows that it saw" in text and "train.learning_rate 1e-09 is too low or too high" in text
    text = sanity_checks.stands_still(effect(2.0, 2.0), schema.Train(warmup_steps=10), 12)
    assert text is not None and "the warm-up of 10 steps takes most of the 12 steps" in text
    assert sanity_checks.stands_still(effect(2.0, 1.99), section, 12) is None
    assert sanity_checks.stands_still(effect(2.0, 2.9), section, 12) is not None, "it rose, but not by half"


SHORT = [
    "model.load_in_4bit=false", "curriculum.stages=[]", "train.warmup_steps=1",
    "train.effective_batch_size=1", "train.per_device_train_batch_size=1", "budget.train_minutes=null",
]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "rate", "said"),
    [(4, "2e-4", None), (3, "1e-4", None), (3, "1e-9", "the loss stood still: "), (3, "2", "the loss rose: ")],
)
def test_a_short_training_is_judged_by_the_rows_that_it_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, rate: str, said: str | None
) -> None:
    """Each step sees one row. With this seed the first of the four is easy: the later losses are higher than its."""
    values = [*SHORT, "seed=2", f"output_dir={tmp_path}/run", f"train.max_steps={steps}", f"train.learning_rate={rate}"]
    status = main(["train", "recipes/quickstart.yaml", *values])
    found = capsys.readouterr().err
    assert status == (3 if rate == "2" else 0)
    assert [each for each in ("the loss stood still: ", "the loss rose: ") if each in found] == [said] * bool(said)
    if steps == 4:
        losses = [line["loss"] for line in log(tmp_path / "run")]
        assert losses[-1] > 1.5 * losses[0], "else this test shows nothing: choose another seed"
    assert [run.state for run in list_runs(tmp_path)] == ["failed" if rate == "2" else "trained"]


def test_a_training_from_an_adapter_is_compared_with_that_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter is useless, and stays as it is: the loss has not risen by this training."""
    quickstart, short = "recipes/quickstart.yaml", [*SHORT, "train.max_steps=3"]
    assert main(["train", quickstart, *short, "train.learning_rate=2", f"output_dir={tmp_path}/first"]) == 3
    capsys.readouterr()
    going_on = [f"model.adapter={tmp_path}/first/adapter", "train.learning_rate=1e-9", f"output_dir={tmp_path}/second"]
    assert main(["train", quickstart, *short, *going_on]) == 0
    said = capsys.readouterr().err
    assert "the loss stood still: " in said and "the loss rose" not in said


def test_only_losses_that_are_no_numbers_before_a_budget_ends_are_an_error(
    recipe_file: RecipeFactory, spoil: Callable[[str, Spoil], None]
) -> None:
    path = recipe_file({"curriculum.stages": [], "train.num_train_epochs": 10, "budget.train_minutes": 1})
    spoil("loss", lambda number: True)
    for _ in range(2):
        ticks = itertools.count()
        with pytest.raises(InputError, match=r"training came to nothing: no finite loss in \d steps?\. Lower"):
            run(load_recipe(path), path, until="adapter", clock=lambda ticks=ticks: 8.0 * next(ticks))
        (root,) = (path.parent / "runs").iterdir()
        assert not (root / "adapter").exists() and RunDir.at(root).done("train") is None


def test_a_preview_says_nothing_of_a_loss_that_has_not_had_its_steps(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learning rate is still going up; after one step it was 0, so the adapter equals its start, too."""
    path = recipe_file(
        {"curriculum.stages": [], "train.num_train_epochs": 10, "train.warmup_steps": 30, "train.learning_rate": 1e-6}
    )
    for steps in (1, 14):
        preview(load_recipe(path, ["data.test=null"]), path, steps)
    assert "Likely cause" not in capsys.readouterr().err
    go(path, "data.test=null")
    assert "the loss stood still" in capsys.readouterr().err, "the whole run says so"


def test_a_loss_that_rose_is_an_error_at_the_runs_end(
    test_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"curriculum.stages": [], "train.num_train_epochs": 3, "train.learning_rate": 1e-3, "data.test": None}
    path = write_recipe(tmp_path, POCKET, POCKET.parent / "train.json", test_file, changes)
    for _ in range(2):  # the same command again says so again
        assert main(["train", str(path), "train.learning_rate=2"]) == 3
        said = capsys.readouterr().err
        assert "error: " in said.splitlines()[-1] and "the loss rose: " in said.splitlines()[-1]
        assert "Likely cause: train.learning_rate 2 is too high" in said.splitlines()[-1]
    assert main(["train", str(path)]) == 0
    section = schema.Train(learning_rate=2.0)
    assert sanity_checks.rose(effect(2.0, 3.1), section) is not None
    assert sanity_checks.rose(effect(2.0, 2.9), section) is None, "not by half"
    assert sanity_checks.rose(effect(2.0, math.nan), section) is not None, "weights that give no numbers"
    assert sanity_checks.rose(effect(0.01, 0.05), section) is None, "rows that are known by heart before and after"


def test_a_budget_that_ended_training_is_named_before_the_learning_rate(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(
        {"curriculum.stages": [], "train.num_train_epochs": 10, "budget.train_minutes": 1, "train.learning_rate": 1e-6}
    )
    ticks = itertools.count()
    with pytest.raises(BudgetMissed):
        run(load_recipe(path), path, until="adapter", clock=lambda: 1.0 * next(ticks))
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    at, still = (next(i for i, each in enumerate(warned) if text in each) for text in ("training ended", "stood still"))
    assert at < still and "train.learning_rate" not in warned[still]
    assert "Likely cause: training ended after step" in warned[still] and "budget.train_minutes is 1" in warned[still]


def test_an_adapter_that_equals_its_start_is_a_warning(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = go(recipe_file({"train.learning_rate": 1e-45, "data.test": None}))  # nothing, once it is a float32
    (text,) = [text for text in folder.manifest()["notes"] if "equals its start" in text]
    assert f"warning: {text}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([("", True)] * 3 + [("yes", True)], "3 of 4 answers are empty. Likely cause"),
        ([("yes", True)] * 4, "all 4 answers are the same. Likely cause"),
        ([("a b", False), ("c d", False)], "all 2 answers were cut off at generate.max_new_tokens 6. Likely cause"),
    ],
)
def test_answers_that_are_empty_all_the_same_or_all_cut_off_are_warnings(
    answers: list[tuple[str, bool]], said: str
) -> None:
    made = [Answer(str(i), text, 2, ended) for i, (text, ended) in enumerate(answers)]
    (text,) = sanity_checks.answer_warnings(made, 6)
    assert said in text
    assert sanity_checks.answer_warnings([Answer("a", "x", 2, True), Answer("b", "y", 6, False)], 6) == []


def test_answers_that_the_minutes_cut_are_not_suspicious() -> None:
    cut = [Answer(str(i), "", 1, False, within=1.0) for i in range(4)]
    assert sanity_checks.answer_warnings(cut, 6) == []
    (said,) = sanity_checks.answer_warnings([*cut, Answer("a", "x", 6, False), Answer("b", "y", 6, False)], 6)
    assert said.startswith("all 2 answers that budget.generate_minutes did not cut were cut off at generate.max_new")


def test_suspicious_answers_are_in_the_manifest_and_on_stderr(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file({"generate.max_new_tokens": 1})
    folder = run(load_recipe(path), path)
    (text,) = [text for text in folder.manifest()["notes"] if "were cut off" in text]
    assert f"warning: {text}" in capsys.readouterr().err and text in folder.report.read_text()
