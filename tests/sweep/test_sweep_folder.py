"""A sweep's folder that was damaged, moved or taken over; a sweep that is stopped; a trial that a bug ended."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common.errors import InputError
from fast_ft.recipe.loader import load_recipe
from fast_ft.sweep.clock import Clock
from fast_ft.sweep.files import SweepFile
from fast_ft.sweep.study import Study
from fast_ft.sweep.sweep import Sweep
from fast_ft.sweep.trial_runner import TrialRunner
from fast_ft.sweep.trial_task import TrialResult, TrialTask
from tests.fuzz.targets import TRIAL
from tests.helpers.parts import RecipeFactory

SEARCH = {"sampler": "grid", "objective": "chrf", "prompts": 10, "pruner": "none", "space": {"lora.r": [4, 8]}}
CHANGES = {"select.take": 8, "curriculum.stages": [], "judge.kind": "none", "search": SEARCH}


class Told:
    """A worker that gives back what it is told to, and counts what is asked of it."""

    def __init__(self, result: TrialResult | None = None) -> None:
        self.result, self.tasks, self.calls = result, [], []

    def idle(self) -> list[int]:
        return [0]

    def submit(self, worker: int, task: TrialTask) -> None:
        self.tasks.append(task)

    def wait(self, seconds: float) -> list[tuple[int, TrialResult | None]]:
        return [(0, self.result)]

    def interrupt(self) -> None:
        self.calls.append("interrupt")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def path(recipe_file: RecipeFactory) -> Path:
    return recipe_file(CHANGES)


@pytest.fixture
def root(path: Path, tmp_path: Path) -> Path:
    """The folder of a sweep whose first trial, the recipe itself, is done, and whose second is under way."""
    sweep = opened(path, tmp_path / "sweep")
    sweep.begin()
    study = study_of(sweep)
    study.finish(study.ask(sweep.space.own), 0.5, **TRIAL)
    study.ask({"lora.r": "8"})
    Clock(sweep.root / "clock.json", None).tick(now=True)
    return sweep.root


def opened(path: Path, root: Path) -> Sweep:
    return Sweep(load_recipe(path), path, hours=None, output=root)


def study_of(sweep: Sweep, **options: Any) -> Study:
    return Study(sweep.root / "study.journal", sweep.search, sweep.space, 1, **options)


def run_with(pool: Any, path: Path, root: Path) -> None:
    sweep = opened(path, root)
    sweep.run(lambda logs: pool)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sweep.json", lambda was: was[: len(was) // 2], "not valid JSON"),
        ("sweep.json", lambda was: b"", "not valid JSON"),
        ("sweep.json", lambda was: b"{}", "recipe: Field required"),
        ("sweep.json", lambda was: b"\xff", "UTF-8"),
        ("clock.json", lambda was: b"", 'Write {"seconds": N} into it'),
        ("clock.json", lambda was: b'{"seconds": -1}', "or delete it"),
        ("clock.json", lambda was: b'{"seconds": NaN}', "or delete it"),
        ("study.journal", lambda was: was.replace(b"}\n", b"\n", 2), "line 1: damaged, and more lines follow"),
        ("study.journal", lambda was: b"\0" * was.find(b"\n") + was[was.find(b"\n") :], "or delete it"),
        ("study.journal", lambda was: was.replace(b'"op_code":4', b'"op_code":99', 1), "Optuna cannot read it"),
        ("study.journal", lambda was: was.replace(b'"took"', b'"tock"', 1), "trial 0: took: Field required"),
        ("study.journal", lambda was: was.replace(b"[0.5]", b"[NaN]", 1), "trial 0: holds what no JSON file can"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_message_with_the_remedy(
    path: Path, root: Path, name: str, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    was = (root / name).read_bytes()
    damaged = content(was)
    assert damaged != was
    (root / name).write_bytes(damaged)
    assert main(["sweep", str(path), "--output", str(root)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {root / name}") and message in said and said.count("\n") == 1
    assert "--output" in said or "delete it" in said
    assert (root / name).read_bytes() == damaged and not (root / ".lease").exists()


def test_the_remedies_that_the_messages_name_work(path: Path, root: Path) -> None:
    (root / "sweep.json").unlink()
    (root / "clock.json").unlink()
    journal = root / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:-2], b"\0\0{\n", lines[-1]]))
    with pytest.raises(InputError, match=rf"line {len(lines) - 1}: damaged.*head -n {len(lines) - 2}\)"):
        run_with(Told(), path, root)
    journal.write_bytes(b"".join(lines[:-2]))  # head -n
    sweep = opened(path, root)
    sweep.begin()
    study = study_of(sweep)
    study.check()
    assert [record["value"] for record in study.records()] == [0.5]
    assert json.loads((root / "sweep.json").read_text())["recipe"]["lora"]["r"] == 4


@pytest.mark.parametrize(
    "torn",
    [
        lambda line: line[:-9],
        lambda line: b"\0" * len(line),
        lambda line: b"\0" * (len(line) - 1) + b"\n",
        lambda line: line[:9] + b"\0" * 30 + b"\n",
        lambda line: line[:-9] + b"\n",
        lambda line: line[:9] + b"\n\0\0\0",
        lambda line: b"12\n",
    ],
)
def test_a_torn_last_line_costs_that_line_only(path: Path, root: Path, torn: Any) -> None:
    journal = root / "study.journal"
    whole = journal.read_bytes()
    end = whole.rstrip(b"\n").rfind(b"\n") + 1
    journal.write_bytes(whole[:end] + torn(whole[end:]))
    study = study_of(opened(path, root))
    assert journal.read_bytes() == whole[:end]
    assert [record["value"] for record in study.records()] == [0.5]
    assert study.interrupted() == []  # the second trial's value was lost with the line: the grid still holds its point


def test_a_kill_between_any_two_lines_loses_no_point_and_tells_none_twice(path: Path, root: Path) -> None:
    """Optuna writes a trial in several lines: begun, handed out, its values, its facts, its state."""
    journal = root / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    found = []
    for count in range(1, len(lines) + 1):
        journal.write_bytes(b"".join(lines[:count]))
        study = study_of(opened(path, root))
        study.check()
        found.append(([r["value"] for r in study.records()], [point["lora.r"] for point in study.interrupted()]))
        assert study.interrupted() == [] and all(r["value"] is not None for r in study.records())
        after = study.ask({"lora.r": "8"})
        assert after.params == {"lora.r": "8"}, "and what is asked for next is handed out next"
    states = [state for n, state in enumerate(found) if n == 0 or state != found[n - 1]]
    begun = ([], ["4"])
    assert states[0] == ([], []) and begun in states and states[-2:] == [([0.5], []), ([0.5], ["8"])]


def test_values_that_changed_between_two_starts_are_refused(path: Path, root: Path, recipe_file: RecipeFactory) -> None:
    other = recipe_file(CHANGES | {"search": SEARCH | {"space": {"lora.r": [4, 16]}}}, name="other.yaml")
    with pytest.raises(InputError, match=r"another recipe \(.*search\.space\.lora\.r"):
        run_with(Told(), other, root)
    (root / "sweep.json").unlink()  # which is a remedy for a damaged one: the journal knows the values too
    with pytest.raises(InputError, match=r"search\.space\.lora\.r: trial 0 .* drawn from other values"):
        run_with(Told(), other, root)
    moved = recipe_file(CHANGES | {"search": SEARCH | {"space": {"train.warmup_steps": [1, 2]}}}, name="moved.yaml")
    (root / "sweep.json").unlink()
    with pytest.raises(InputError, match=r"search\.space\.lora\.r: trial 0 .* drawn from other values"):
        run_with(Told(), moved, root)


def test_a_sweep_that_was_taken_over_writes_no_more(path: Path, root: Path) -> None:
    """After SIGSTOP, say: another machine has found no sign of life and goes on with the folder."""
    sweep = opened(path, root)

    def lost() -> None:
        raise InputError("another process took this run over")

    study = study_of(sweep, before_write=lost)
    before = (root / "study.journal").read_bytes(), (root / "sweep.json").read_bytes()
    with pytest.raises(InputError, match="took this run over"):
        study.ask({"lora.r": "8"})
    with pytest.raises(InputError, match="took this run over"):
        SweepFile(sweep.sweep_json, lost).update(seconds=1.0)
    assert before == ((root / "study.journal").read_bytes(), (root / "sweep.json").read_bytes())


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("twice", [False, True])
def test_a_signal_lets_the_trials_save_their_steps_and_ends_the_sweep(
    path: Path, root: Path, kind: int, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Told()
    monkeypatch.setattr(pool, "wait", lambda seconds: signal.raise_signal(kind))
    if twice:
        monkeypatch.setattr(pool, "interrupt", lambda: signal.raise_signal(kind))
    with pytest.raises(KeyboardInterrupt):
        run_with(pool, path, root)
    assert pool.calls == (["close"] if twice else ["interrupt", "close"]) and len(pool.tasks) == 1
    assert not (root / ".lease").exists()
    assert study_of(opened(path, root)).interrupted() == [{"lora.r": "8"}]  # it is begun again


def test_a_link_out_of_the_folder_is_refused(path: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / "trials").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link out of its run folder"):
        run_with(Told(), path, root)


def test_no_trial_is_backed_up_or_kept_under_a_name_that_tells_where_the_sweep_lies(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(CHANGES | {"backup_dir": str(tmp_path / "drive")})
    names = set()
    for folder in ("here", "there"):
        sweep = opened(path, tmp_path / folder)
        recipes = sweep.begin()
        recipe = recipes.at(sweep.space.own)
        assert recipe.backup_dir is None and recipes.best_at(sweep.space.own).backup_dir == str(tmp_path / "drive")
        names.add(Path(recipe.output_dir).name)
    assert len(names) == 1 and "backup_dir is for single runs" in capsys.readouterr().err


def test_a_bugs_traceback_is_kept_and_a_users_error_stays_short(
    path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-not-to-be-shown")

    def broken(self: TrialRunner, task: TrialTask, times: Any) -> int:
        raise ZeroDivisionError("boom sk-not-to-be-shown")

    def wrong(self: TrialRunner, task: TrialTask, times: Any) -> int:
        raise InputError("lora.r: too large")

    sweep = opened(path, root)
    task = TrialTask(sweep.begin().at(sweep.space.own), "small.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(TrialRunner, "_run", wrong)
        assert TrialRunner().run(task) == TrialResult(problem="lora.r: too large")
        patch.setattr(TrialRunner, "_run", broken)
        result = TrialRunner().run(task)
    assert result.problem == "a bug: ZeroDivisionError: boom [SOME_API_KEY]"
    assert "in broken" in result.traceback and "sk-not-to-be-shown" not in result.traceback

    with pytest.raises(RuntimeError, match=r"the best recipe's answers(.|\n)*in broken"):  # a bug ends with status 1
        run_with(Told(result), path, root)
    kept = root / "logs" / "trial-2.txt"
    assert kept.read_text(encoding="utf-8") == result.traceback
    said = capsys.readouterr().err
    assert f"failed: {result.problem} (its traceback is in {kept})" in said and "in broken" not in said

    (root / "study.journal").unlink()
    with pytest.raises(RuntimeError, match=r"the recipe itself, as the first trial(.|\n)*in broken"):
        run_with(Told(result), path, root)
    (root / "study.journal").unlink()
    with pytest.raises(InputError, match=r"the recipe itself, as the first trial: too large$"):
        run_with(Told(TrialResult(problem="too large")), path, root)
