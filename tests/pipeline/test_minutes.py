"""Budgets of minutes, with a clock of the test's own: told early, kept, and a complete run all the same."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_ft.cli.main import main
from fast_ft.common.atomic_files import sha256_file
from fast_ft.common.errors import BudgetMissed
from fast_ft.common.minutes import RESERVE, Measurements, TrainPace
from fast_ft.homework import checks
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from tests.helpers.parts import RecipeFactory, write_recipe


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def steps(pace: TrainPace, clock: Clock, first: int, last: int, seconds: float = 6.0) -> None:
    for number in range(first, last + 1):
        clock.now += seconds
        pace.step(number)


def test_a_run_that_fits_is_left_alone() -> None:
    clock = Clock()
    pace = TrainPace(11, [100] * 100, clock)  # 100 steps of 6 s are 10 minutes
    assert pace.fitting(0) is None, "no speed is known yet"
    for done in range(1, 100):
        steps(pace, clock, done, done)
        assert pace.anneal(done) is None and pace.forecast(done) is None


def test_a_run_that_does_not_fit_is_told_early_and_anneals_over_the_last_steps_that_fit() -> None:
    clock = Clock()
    pace = TrainPace(5, [100] * 100, clock)  # 49 steps fit into 5 minutes less 2 %
    steps(pace, clock, 1, 3)
    said = pace.forecast(3)
    assert said is not None and "about 10.2 minutes" in said and "step 49 of 100" in said
    assert "train.max_steps=49, or budget.train_minutes=10.7" in said
    done = 3
    while (over := pace.anneal(done)) is None:
        done += 1
        steps(pace, clock, done, done)
    assert (done, over) == (40, 9)


def test_steps_are_weighed_by_their_tokens() -> None:
    clock = Clock()
    pace = TrainPace(60, [100] * 10 + [300] * 10, clock)
    steps(pace, clock, 1, 5, seconds=10.0)
    assert pace.seconds(5, 20) == pytest.approx(5 * 10 + 10 * 30)


def test_earlier_sessions_and_loading_count() -> None:
    clock = Clock()
    began = clock()
    clock.now += 30  # the model is loaded
    pace = TrainPace(5, [100] * 100, clock, spent=120, since=began)
    assert pace.elapsed() == 150 and pace.left() == 300 * (1 - RESERVE) - 150
    steps(pace, clock, 51, 53)
    assert pace.fitting(53) == ((294 - 168) // 6)


def test_measurements_of_the_validation_loss_have_their_share_of_the_minutes() -> None:
    """Due behind steps 10, 20 and so on; before the first one it counts as training over its tokens, 3 steps' worth."""
    clock, due = Clock(), Measurements(300, frozenset(range(10, 101, 10)))
    pace = TrainPace(5, [100] * 100, clock, measurements=due)  # 294 s
    steps(pace, clock, 1, 2)
    assert pace.left() == 294 - 12, "no speed is known yet"
    steps(pace, clock, 3, 9)
    assert pace.left() == 294 - 54 - 18
    assert pace.fitting(9) == 28, "168 s; 3 measurements of 18 s on the way, and that of the end: all 240 s"
    steps(pace, clock, 10, 10)
    assert pace.fitting(10) == 27, "the measurement behind this step is still to come"
    clock.now += 9
    pace.measure()
    assert pace.left() == 294 - 69 - 9, "from now on it is known how long one takes"
    steps(pace, clock, 11, 11)
    assert pace.seconds(11, 12) == 6, "a step takes no longer for a measurement before it"
    assert pace.fitting(11) == 30, "180 s, and 4 measurements of 9 s behind steps 20, 30, 40 and the last: 216 of 219 s"
    said = pace.forecast(11)
    assert said is not None and "1.35 of them to measure the validation loss" in said and "after about step 41" in said
    pace.measure_no_more()
    assert pace.left() == 294 - 75 and pace.fitting(11) == 219 // 6, "steps have all of the time"
    said = pace.forecast(11)
    assert said is not None and "to measure" not in said


# In a run


class Ticking(Clock):
    """A clock that moves by these seconds with each training step, and with each measurement of a validation loss."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float, measurement: float = 0.0) -> None:
        super().__init__()
        from fast_ft.train.step_runner import StepRunner
        from fast_ft.train.validation_loss import ValidationLoss

        for owner, name, seconds in ((StepRunner, "train_step", step), (ValidationLoss, "measure", measurement)):
            monkeypatch.setattr(owner, name, self._moved_by(seconds, getattr(owner, name)))

    def _moved_by(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*given: Any) -> Any:
            self.now += seconds
            return function(*given)

        return moved


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_training_ends_early_with_its_decay_finished_and_still_generates(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file({"curriculum.stages": [], "train.num_train_epochs": 10, "budget.train_minutes": 5})
    clock = Ticking(monkeypatch, 12.0)  # 40 steps of 12 s are 8 minutes
    with pytest.raises(BudgetMissed, match=r"training ended after step 2\d of 40"):
        run(load_recipe(path), path, clock=clock)
    assert "training will take about" in capsys.readouterr().err
    (root,) = (path.parent / "runs").iterdir()
    folder = RunDir.at(root)
    train = folder.done("train") or {}
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert train["stopped_at_step"] == len(lines) == train["steps"] and 20 <= len(lines) < 26
    assert clock.now - 1000 <= 300, "kept"
    rates = [line["learning_rate"] for line in lines]
    assert rates[-1] < 0.35 * rates[len(rates) // 2] and rates[-1] == min(rates[1:])
    assert len(read(folder.pred)) == 5 and folder.adapter.is_dir() and folder.report.is_file()
    assert any("train_minutes" in text for text in folder.manifest()["notes"])
    assert [each.rule for each in checks.broken(checks.check(folder))] == ["no-clock"], "another clock, another adapter"
    capsys.readouterr()
    assert main([str(path)]) == 3, "the same command again: nothing to do, and the budget is still missed"
    said = capsys.readouterr().err
    assert f"done: {root}" in said and said.endswith(f"The run is complete all the same: {root}\n")


MEASURING = {
    "curriculum.stages": [], "train.num_train_epochs": 10, "data.validation": {"take": 8}, "train.load_best": True,
    "data.test": None,
}  # fmt: skip


@pytest.mark.parametrize(("eval_steps", "minutes", "least"), [(None, 4.1, 36), (5, 4.9, 35), (None, 60, 40)])
def test_the_last_measurement_is_within_the_minutes(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, eval_steps: int | None, minutes: float, least: int
) -> None:
    """40 steps of 6 s would fit into 4.1 minutes, and not with the 10 s of a measurement behind them."""
    path = recipe_file({**MEASURING, "train.eval_steps": eval_steps, "budget.train_minutes": minutes})
    clock = Ticking(monkeypatch, 6.0, 10.0)
    with pytest.raises(BudgetMissed) if least < 40 else contextlib.nullcontext():
        run(load_recipe(path), path, until="adapter", clock=clock)
    lines = [json.loads(line) for line in only_run(path).log.read_text().splitlines()]
    assert clock.now - 1000 <= minutes * 60 and least <= len(lines) <= 40
    assert "validation_loss" in lines[-1] and (len(lines) == 40) == (minutes == 60)
    rates = [line["learning_rate"] for line in lines]
    assert rates[-1] == min(rates[1:])


def test_where_no_other_step_fits_the_last_weights_are_measured_and_nobody_says_that_the_rate_went_down(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, minutes in ((19.0, 1.0), (70.0, 1.0)):  # after three steps no other fits; the first is too long
        path = recipe_file({**MEASURING, "budget.train_minutes": minutes, "seed": int(seconds)})
        with pytest.raises(BudgetMissed):
            run(load_recipe(path), path, until="adapter", clock=Ticking(monkeypatch, seconds))
        said = capsys.readouterr().err
        folder = max((path.parent / "runs").iterdir(), key=lambda each: each.stat().st_mtime_ns)
        lines = [json.loads(line) for line in RunDir.at(folder).log.read_text().splitlines()]
        assert "validation_loss" in lines[-1] and len(lines) == (3 if seconds == 19 else 1)
        assert (RunDir.at(folder).done("train") or {})["best_step"] <= len(lines)
        assert "its learning rate not yet brought down" in said and "brought down early" not in said
        assert ("time is up: no other step fits" in said) == (seconds == 19)


def test_minutes_without_a_budget_count_once_there_is_one(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file({**TRAINED_LONG, "data.test": None, "budget.train_minutes": None, "train.save_steps": 1})
    clock = Ticking(monkeypatch, 6.0)
    stopping(monkeypatch, 20)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(path), path, clock=clock)
    stopping(monkeypatch, None)
    with pytest.raises(BudgetMissed, match=r"training ended after step 2[5-9] of 40"):
        run(load_recipe(path, ["budget.train_minutes=3"]), path, clock=clock)
    assert clock.now - 1000 <= 3 * 60


def test_a_stopped_run_remembers_its_minutes_and_its_annealing(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fast_ft.common import console
    from fast_ft.pipeline import train_phase

    values = {"curriculum.stages": [], "train.num_train_epochs": 10, "budget.train_minutes": 5, "train.save_steps": 1}
    path = recipe_file(values | {"data.test": None})
    clock = Ticking(monkeypatch, 12.0)

    class Stopping(console.Bar):
        at = 0

        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.done == self.at:
                raise KeyboardInterrupt

    monkeypatch.setattr(train_phase, "Bar", Stopping)
    for at in (10, 18):  # the second while the rate goes down
        Stopping.at = at
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(path), path, clock=clock)
    Stopping.at = 0
    with pytest.raises(BudgetMissed, match="training ended after step"):
        run(load_recipe(path), path, clock=clock)
    # a stop loses the step in hand; the log has its seconds by the wall's clock, not by this one
    assert 240 <= clock.now - 1000 <= 300 + 2 * 12
    (log,) = path.parent.glob("runs/*/log.jsonl")
    rates = [json.loads(line)["learning_rate"] for line in log.read_text().splitlines()]
    assert rates[-1] == min(rates[1:])


def test_answers_keep_their_minutes_and_pred_json_is_complete(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fast_ft.generate.engine.llm_engine import LLMEngine

    path = recipe_file(
        {
            "generate.max_new_tokens": 100,
            "generate.batch_size": 2,
            "budget.generate_minutes": 1,
            "judge.base_prompts": 2,
        }
    )
    clock = Clock()
    decode = LLMEngine.decode

    def slow(self: Any, burst: Any) -> None:
        decode(self, burst)
        clock.now += burst.steps * 0.5  # 100 tokens: 50 s; five answers two by two: 150 s

    monkeypatch.setattr(LLMEngine, "decode", slow)
    with pytest.raises(BudgetMissed, match=r"answers? cut at \d+ new tokens"):
        run(load_recipe(path), path, clock=clock)
    assert "will not end within budget.generate_minutes=1" in capsys.readouterr().err
    (root,) = (path.parent / "runs").iterdir()
    folder = RunDir.at(root)
    pred, generated = read(folder.pred), folder.done("generate") or {}
    assert len(pred) == 5 and all(entry["output"][0] for entry in pred.values())
    assert generated["cut_by_budget"] > 0 and clock.now - 1000 < 70
    assert generated["base_answers"] == 0, "no time was left for them"
    cut = [each["tokens"] for each in read(folder.answers)["tuned"].values() if not each["ended"]]
    assert generated["cut_at"] == max(cut) < 100 and generated["cut_by_budget"] == len(cut)
    notes = "\n".join(folder.manifest()["notes"])
    assert f"{len(cut)} of 5 answers were cut, at {min(cut)}" in notes
    assert f"the base model answers nothing: budget.generate_minutes cut {len(cut)} answers" in notes
    assert "cut off at generate.max_new_tokens" not in notes
    (verdict,) = checks.broken(checks.check(folder))
    assert verdict.rule == "no-clock" and f"{generated['cut_by_budget']} answers cut" in verdict.text


def slow_steps(monkeypatch: pytest.MonkeyPatch, clock: Clock, before: Callable[[], None] = lambda: None) -> None:
    """Let each step of decoding take half a second by this clock: an answer of 100 tokens takes 50 seconds.

    `before` is called before each burst of steps.
    """
    from fast_ft.generate.engine.llm_engine import LLMEngine

    decode = LLMEngine.decode

    def slow(self: Any, burst: Any) -> None:
        replayed = all(each.known is not None for each in burst.sequences)
        if burst.sequences[0].limit > 8 and not replayed:  # nor is it the check of batched against single
            before()
            clock.now += burst.steps * 0.5
        decode(self, burst)

    monkeypatch.setattr(LLMEngine, "decode", slow)


def whole(folder: RunDir) -> dict[str, int]:
    """How many answers there are, by whose they are; each has ended by itself, or has 100 tokens."""
    ends = read(folder.answers)
    assert all(each["ended"] or each["tokens"] == 100 for found in ends.values() for each in found.values())
    return {who: len(found) for who, found in ends.items()}


def test_the_base_models_answers_have_the_minutes_that_are_left(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter's answers take 113 seconds, the base model's 50: of 240."""
    path, clock = recipe_file(ANSWERED_LONG | {"budget.generate_minutes": 4}), Clock()
    slow_steps(monkeypatch, clock)
    folder = run(load_recipe(path), path, clock=clock)
    assert whole(folder) == {"tuned": 5, "base": 2}
    assert 150 < clock.now - 1000 < 180 and "budget" not in capsys.readouterr().err


def test_base_answers_that_the_minutes_cut_are_left_out_and_said(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 138 seconds 113 are used: the base model's answers would be stubs, which cannot be compared."""
    path, clock = recipe_file(ANSWERED_LONG | {"budget.generate_minutes": 2.3}), Clock()
    slow_steps(monkeypatch, clock)
    folder = run(load_recipe(path), path, clock=clock)
    generated = folder.done("generate") or {}
    assert whole(folder) == {"tuned": 5} and not folder.base_pred.exists()
    assert generated["base_answers"] == 0 and generated["minutes"] == 2.3 and clock.now - 1000 <= 138
    said = "0 of 2 prompts have an answer of the base model: the others were cut by budget.generate_minutes"
    assert said in folder.manifest()["notes"]
    folder = run(load_recipe(path, ["budget.generate_minutes=9"]), path, clock=clock)
    assert whole(folder) == {"tuned": 5, "base": 2} and said not in folder.manifest()["notes"]


def test_minutes_count_once_where_a_run_is_stopped_while_the_base_model_answers(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 171 seconds two of the base model's three answers are there; the last one ends at 221, of 240."""
    values = {"judge.base_prompts": 3, "budget.generate_minutes": 4}
    path, clock = recipe_file(ANSWERED_LONG | values), Clock()
    stop = True

    def stops() -> None:
        if stop and clock.now > 1180:
            raise KeyboardInterrupt

    slow_steps(monkeypatch, clock, stops)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(path), path, clock=clock)
    base = only_run(path).base_partial.read_text().splitlines()
    assert len(base) == 2 and max(json.loads(line)["at"] for line in base) == pytest.approx(171, abs=2)
    stop = False
    folder = run(load_recipe(path), path, clock=clock)
    assert whole(folder) == {"tuned": 5, "base": 3}


def test_out_of_memory_cuts_no_answer_that_has_the_time_to_be_made_again(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five answers at once run out of memory after 20 seconds, of 99; then four are made at once."""
    values = {"generate.batch_size": 5, "judge.base_prompts": 0, "budget.generate_minutes": 1.65}
    path, clock = recipe_file(ANSWERED_LONG | values), Clock()
    full = iter([True])

    def runs_out() -> None:
        if clock.now > 1019 and next(full, False):
            raise torch.OutOfMemoryError("as a small card would")

    slow_steps(monkeypatch, clock, runs_out)
    folder = run(load_recipe(path), path, clock=clock)
    assert whole(folder) == {"tuned": 5} and (folder.done("generate") or {})["batch_size"] == 4
    assert 70 < clock.now - 1000 < 99 and "budget" not in capsys.readouterr().err


def test_the_length_at_which_answers_were_cut_is_not_that_of_answers_that_were_as_long_as_allowed(
    recipe_file: RecipeFactory,
) -> None:
    from fast_ft.data.prepare import prepare
    from fast_ft.generate.answers import Answer, Generation
    from fast_ft.pipeline import generate_phase

    recipe = load_recipe(recipe_file({"generate.max_new_tokens": 128, "budget.generate_minutes": 1}))
    ends = {"a": (128, False, None), "b": (40, False, 1.0), "c": (31, False, 1.0), "d": (90, True, None)}
    made = {key: [Answer(key, "x", tokens, ended, within=cut)] for key, (tokens, ended, cut) in ends.items()}
    facts = generate_phase._facts(recipe, prepare(recipe), Generation(made, 1.0, 2, None, []), None)
    assert (facts["cut_by_budget"], facts["cut_at"]) == (2, 40)


# More minutes than before


def files_of(folder: RunDir) -> dict[str, Any]:
    """What a run left, to compare; of log.jsonl what does not tell the time."""
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    told = ("step", "stage", "loss", "learning_rate", "skipped")
    weights = sha256_file(folder.adapter / "adapter_model.safetensors")
    assert folder.manifest()["digests"]["adapter"] == weights
    assert folder.manifest()["digests"]["pred"] == sha256_file(folder.pred)
    return {
        "log": [[line[key] for key in told] for line in lines],
        "adapter": weights,
        "pred": read(folder.pred),
        "base": read(folder.base_pred) if folder.base_pred.is_file() else None,
        "ends": read(folder.answers),
    }


ENDLESS = ("budget.train_minutes=null", "budget.generate_minutes=null")


#: What the tests below run, within minutes and without.
TRAINED_LONG = {"curriculum.stages": [], "train.num_train_epochs": 10, "budget.train_minutes": 5}
ANSWERED_LONG = {
    "generate.max_new_tokens": 100, "generate.batch_size": 2, "budget.generate_minutes": 1, "judge.base_prompts": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(
    tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What a recipe's run leaves without budgets, run once."""
    done: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def files(values: dict[str, Any]) -> dict[str, Any]:
        for recipe, found in done:
            if recipe == values:
                return found
        path = write_recipe(tmp_path_factory.mktemp("straight"), tiny, train_file, test_file, values)
        done.append((values, files_of(run(load_recipe(path, ENDLESS), path))))
        return done[-1][1]

    return files


def only_run(path: Path) -> RunDir:
    (root,) = (path.parent / "runs").iterdir()
    return RunDir.at(root)


@pytest.mark.parametrize(("save_steps", "stop_at"), [(1, None), (None, 21)])
def test_with_more_minutes_training_goes_on_and_ends_as_without_the_budget(
    recipe_file: RecipeFactory,
    straight: Callable[[dict[str, Any]], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    save_steps: int | None,
    stop_at: int | None,
) -> None:
    """The budget ends it after 24 of 40 steps, the rate down from step 20 on; or it is stopped on that way.

    In the first case the machine is lost then, and another one goes on from the backup.
    """
    wanted = straight(TRAINED_LONG)
    drive = str(tmp_path / "drive") if stop_at is None else None
    path = recipe_file(TRAINED_LONG | {"train.save_steps": save_steps, "backup_dir": drive})
    clock = Ticking(monkeypatch, 12.0)
    stopping(monkeypatch, stop_at)
    with pytest.raises(BudgetMissed if stop_at is None else KeyboardInterrupt):
        run(load_recipe(path), path, clock=clock)
    folder = only_run(path)
    former = read(folder.pred) if stop_at is None else None
    assert "step-20" in {each.name for each in folder.checkpoints.iterdir()}
    stopping(monkeypatch, None)
    if stop_at is None:
        shutil.rmtree(folder.root)
    with pytest.raises(BudgetMissed, match=r"after step \d\d of 40"):
        run(load_recipe(path, ["budget.train_minutes=7"]), path, clock=clock)
    assert 24 < (folder.done("train") or {})["steps"] < 40
    if stop_at is None:
        assert clock.now - 1000 <= 7 * 60, "the steps that were trained twice count twice"
    assert run(load_recipe(path, ENDLESS), path, clock=clock).root == folder.root
    assert files_of(folder) == wanted
    train = folder.done("train") or {}
    assert train["steps"] == 40 and not {"why", "stopped_at_step", "minutes"} & train.keys()
    assert not any("train_minutes" in text for text in folder.manifest()["notes"])
    if former is not None:
        assert former in [read(kept) for kept in folder.root.glob("pred-*.json")]


def stopping(monkeypatch: pytest.MonkeyPatch, at: int | None) -> None:
    """Let a run be stopped after this step."""
    from fast_ft.common import console
    from fast_ft.pipeline import train_phase

    class Stopping(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.done == at:
                raise KeyboardInterrupt

    monkeypatch.setattr(train_phase, "Bar", Stopping)


def test_less_time_than_before_changes_nothing_that_is_there(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = recipe_file(TRAINED_LONG), Ticking(monkeypatch, 12.0)
    for minutes in ("5", "4", "5"):  # 5 again is no more than the 5 that ended it
        with pytest.raises(BudgetMissed, match="after step 24 of 40"):
            run(load_recipe(path, [f"budget.train_minutes={minutes}"]), path, clock=clock)
    assert not list(only_run(path).root.glob("pred-*.json"))


@pytest.mark.parametrize("stopped", [False, True])
def test_with_more_minutes_answers_are_made_again_to_their_full_length(
    recipe_file: RecipeFactory,
    straight: Callable[[dict[str, Any]], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    from fast_ft.generate.engine.llm_engine import LLMEngine

    wanted, path = straight(ANSWERED_LONG), recipe_file(ANSWERED_LONG)
    clock, decode = Clock(), LLMEngine.decode

    def slow(self: Any, burst: Any) -> None:
        decode(self, burst)
        clock.now += burst.steps * 0.5
        if stop and (only_run(path).pred_partial.read_text().count("\n") >= 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(LLMEngine, "decode", slow)
    stop = stopped
    with pytest.raises(KeyboardInterrupt if stopped else BudgetMissed):
        run(load_recipe(path), path, clock=clock)
    adapter = sha256_file(only_run(path).adapter / "adapter_model.safetensors")
    stop = False
    folder = run(load_recipe(path, ["budget.generate_minutes=60"]), path, clock=clock)
    assert files_of(folder) == wanted and wanted["adapter"] == adapter
    generated = folder.done("generate") or {}
    assert generated["base_answers"] == 2 and not {"cut_by_budget", "minutes"} & generated.keys()
