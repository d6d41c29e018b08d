"""`runs`: one line a run, by recipe; what it calls a difference; what --prune deletes, and what it never touches."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_ft.cli.main import main
from fast_ft.common.atomic_files import write_json
from fast_ft.recipe.loader import load_recipe
from fast_ft.report import run_data
from fast_ft.run import lock, prune
from fast_ft.run.folder import RunDir, output_folder
from fast_ft.run.listing import differing, ended_as, list_runs, unusual
from tests.helpers.parts import RecipeFactory
from tests.helpers.patience import PATIENCE

#: Another value for each of many keys, as a second version of a recipe has it.
MANY = [
    "lora.r=8", "lora.lora_alpha=32", "model.max_length=64", "select.take=12", "select.deduplicate=near", "seed=7",
    "train.learning_rate=0.003", "train.warmup_steps=0", "train.weight_decay=0.1", "train.max_grad_norm=0.5",
    "train.effective_batch_size=8", "generate.max_new_tokens=9", "generate.batch_size=2", "train.save_steps=3",
    "data.train_on=last",
]  # fmt: skip


def make(path: Path, *overrides: str, phases: tuple[str, ...] = ("train", "generate"), **facts: object) -> RunDir:
    """A run folder as `run` begins it, with these phases finished after 90 s each."""
    folder = RunDir.open(load_recipe(path, list(overrides)), path)
    for phase in phases:
        folder.finish(phase, 90.0, **facts)
    return folder


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["runs", *words]) == 0
    return capsys.readouterr().out


@pytest.fixture
def nine(recipe_file: RecipeFactory, tmp_path: Path) -> Path:
    """Nine runs of three recipes, which differ in up to 15 keys."""
    for name in ("alpha", "beta", "gamma"):
        path = recipe_file(name=f"{name}.yaml")
        judged = make(path)
        write_json(judged.scores, {"kind": "openai", "model": "gpt-4o-mini", "mean": 4.314})
        make(path, "lora.r=2", 'run_name="two ranks"', phases=("train",))
        make(path, *MANY, phases=())
    return tmp_path / "runs"


def test_nine_runs_of_three_recipes_fit_on_one_screen(
    nine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(nine.parent)  # a folder's name may be longer than the screen is wide
    lines = listed(capsys, nine.name).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert lines[0] == "9 runs of 3 recipes in runs"
    assert [line for line in lines if line in ("alpha", "beta", "gamma")] == ["alpha", "beta", "gamma"]
    (judged,) = [line for line in lines if "alpha-" in line and "4.31 gpt-4o-mini" in line]
    assert " done " in judged and " 3.0 min " in judged
    (named,) = [line for line in lines if "beta-" in line and "two ranks: " in line]
    assert named.endswith("r=2") and " trained " in named and " 1.5 min " in named
    (many,) = [line for line in lines if "gamma-" in line and " unfinished " in line]
    assert "=" in many and (" + 14" in many or " + 13" in many or " + 12" in many)


def test_a_wide_terminal_shows_three_settings_and_all_shows_each(
    nine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (many,) = [line for line in listed(capsys, str(nine)).splitlines() if "alpha-" in line and " + 12" in line]
    assert many.count("=") == 3
    shown = listed(capsys, str(nine), "--all")
    for override in MANY:
        assert shown.count(f"      {override}\n") >= 3, "in each recipe's third run"
    assert "A line shows settings" not in shown


def test_of_many_runs_the_newest_are_shown_and_all_shows_the_others(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file()
    for seed in range(12):
        folder = make(path, f"seed={seed}")
        folder.update(started=f"2026-01-01T00:00:{seed:02}+00:00")
    out = listed(capsys, str(tmp_path / "runs"))
    assert "small (2 older runs left out; --all shows them)" in out
    assert "seed=2" in out and "seed=11" in out and "seed=1\n" not in out
    assert "seed=1\n" in listed(capsys, str(tmp_path / "runs"), "--all")


def test_a_recipe_with_the_newest_run_stands_last(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(["old", "new", "old2"]):
        folder = make(recipe_file(name=f"{name[:3]}.yaml"), f"seed={number}")
        folder.update(started=f"2026-01-0{number + 1}T00:00:00+00:00")
    out = listed(capsys, str(tmp_path / "runs"))
    assert out.index("\nnew\n") < out.index("\nold\n"), "the third run is of the first recipe"


def test_json_holds_every_difference_and_the_judge(nine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(listed(capsys, str(nine), "--json"))
    assert len(content["runs"]) == 9 and content["sentences"] == []
    scored = [run for run in content["runs"] if run["score"] is not None]
    assert [run["judge"]["model"] for run in scored] == ["gpt-4o-mini"] * 3 and scored[0]["score"] == 4.314
    assert all(set(run["differs"]) == {each.partition("=")[0] for each in MANY} for run in content["runs"])
    assert {run["state"] for run in content["runs"]} == {"done", "trained", "unfinished"}
    assert [run["run_name"] for run in content["runs"]].count("two ranks") == 3


def test_settings_of_the_answers_are_differences(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    path = recipe_file()
    first, second = make(path), make(path, "seed=1")
    second.update(started="2999-01-01", recipe=first.manifest()["recipe"], generated_with={"max_new_tokens": 2})
    assert differing(list_runs(tmp_path / "runs")) == [{"generate.max_new_tokens": n} for n in (6, 2)]


def test_what_most_runs_share_is_not_shown(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    path = recipe_file()
    for number, overrides in enumerate([["seed=1"], ["seed=1", "lora.r=2"], ["seed=1", "lora.r=8"], ["seed=2"]]):
        make(path, *overrides).update(started=f"2026-01-0{number + 1}T00:00:00+00:00")
    assert unusual(list_runs(tmp_path / "runs")) == [
        {"lora.r": 4}, {"lora.r": 2}, {"lora.r": 8}, {"seed": 2, "lora.r": 4},
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["nope"], ["nope", "--json"], ["nope", "--prune", "--yes"], ["nope/below"]])
def test_a_folder_that_is_not_there_is_an_error(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {words[0]}: there is no such folder")
    assert listed(capsys) == "no runs in runs yet\n", "the default folder comes with the first run"
    (tmp_path / "file").write_text("")
    assert main(["runs", "file"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--yes"], "give --prune too"), (["--prune", "--json"], "leave --json out"), (["--prune", "--all"], "--all")],
)
def test_options_that_do_not_go_together(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", *words]) == 2
    assert said in capsys.readouterr().err


def test_report_and_runs_agree_on_minutes(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    path = recipe_file()
    line = {"stage": "easy", "step": 1, "loss": 2.0, "seconds": 45.0}
    finished, stopped = make(path), make(path, "seed=1", phases=())
    for folder in (finished, stopped):
        folder.log.write_text(f"{json.dumps(line)}\n" * 2)
    minutes = {run.folder: run.minutes for run in list_runs(tmp_path / "runs")}
    assert minutes == {finished.root: 3.0, stopped.root: 1.5}, "a stopped training took time too"
    assert {folder.root: run_data.read_run(folder).minutes for folder in (finished, stopped)} == minutes


def test_a_name_changes_nothing_else(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    path = recipe_file()
    plain, named = (load_recipe(path, each) for each in ([], ['run_name="best"']))
    assert output_folder(plain, path) == output_folder(named, path)


def test_another_programs_manifest_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3, "name": "A browser extension"}')
    assert listed(capsys, str(tmp_path)) == f"no runs in {tmp_path} yet\n"
    assert main(["runs", str(tmp_path), "--prune", "--yes"]) == 0
    assert (tmp_path / "extension" / "manifest.json").is_file()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_prune_deletes_failed_and_unfinished_runs_only(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, runs = recipe_file(), tmp_path / "runs"
    kept = [make(path, "seed=1"), make(path, "seed=2", phases=("train",)), make(path, "seed=3", why="budget")]
    gone = [
        make(path, "seed=4", phases=()), make(path, "seed=5", worthless="the loss rose"),
        make(path, "seed=6", why="numbers"),
    ]  # fmt: skip
    (gone[0].checkpoints / "5").mkdir(parents=True)
    (runs / "notes").mkdir()
    (runs / "notes" / "mine.txt").write_text("mine")
    broken = runs / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("[")
    assert main(["runs", str(runs), "--prune", "--yes"]) == 0
    assert names(runs) == sorted([*(run.root.name for run in kept), "notes", "broken"])
    assert capsys.readouterr().err.count("deleted: ") == 3
    assert main(["runs", str(runs), "--prune", "--yes"]) == 0
    assert "no failed or unfinished run" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("yes\n", 0), ("\n", 1), ("n\n", 1), ("", 1)])
def test_prune_asks_first(
    answer: str, left: int, recipe_file: RecipeFactory, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make(recipe_file(), phases=())
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["runs", str(tmp_path / "runs"), "--prune"]) == 0
    err = capsys.readouterr().err
    assert "unfinished, 0.0 minutes of training" in err and "Delete 1 run folder for good?" in err
    assert len(names(tmp_path / "runs")) == left and ("nothing was deleted" in err) == bool(left)


def test_prune_without_a_terminal_asks_for_yes(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(recipe_file(), phases=())
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["runs", str(tmp_path / "runs"), "--prune"]) == 2
    assert "add --yes" in capsys.readouterr().err and len(names(tmp_path / "runs")) == 1


def test_prune_leaves_a_run_that_is_in_use(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, runs = make(recipe_file(), phases=()), tmp_path / "runs"
    (run,) = list_runs(runs)
    assert run.state == "unfinished"
    with lock.hold(folder.root):
        assert " running " in listed(capsys, str(runs))
        assert main(["runs", str(runs), "--prune", "--yes"]) == 0
        with pytest.raises(prune.InputError, match="in use by process"):  # it began after the list was made
            prune.delete(run)
        assert folder.manifest_path.is_file()


def test_prune_deletes_what_a_killed_process_left(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    folder = make(recipe_file(), phases=())
    hold = f"from fast_ft.run import lock; import os\nwith lock.hold(lock.Path({str(folder.root)!r})): os._exit(1)"
    subprocess.run([sys.executable, "-c", hold], check=False, timeout=PATIENCE)
    assert (folder.root / ".lease").is_file()
    assert [run.state for run in list_runs(tmp_path / "runs")] == ["unfinished"]
    assert main(["runs", str(tmp_path / "runs"), "--prune", "--yes"]) == 0
    assert names(tmp_path / "runs") == []


def test_prune_leaves_a_run_that_has_gone_on(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    folder = make(recipe_file(), phases=())
    (run,) = list_runs(tmp_path / "runs")
    folder.finish("train", 1.0)
    with pytest.raises(prune.InputError, match="has gone on since"):
        prune.delete(run)
    assert folder.manifest_path.is_file() and ended_as(folder.record()) == "trained"


@pytest.mark.parametrize("place", ["the run", "above it", "the root", "in it"])
def test_prune_goes_through_no_link(
    place: str, recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, runs = make(recipe_file(), phases=()), tmp_path / "linked"
    elsewhere = tmp_path / "elsewhere"
    if place == "the root":
        runs.symlink_to(tmp_path / "runs")
    else:
        runs.mkdir()
        if place == "in it":
            elsewhere.mkdir()
            (elsewhere / "mine.txt").write_text("mine")
            (folder.root / "checkpoints").symlink_to(elsewhere)
            folder.root.rename(runs / "run")
        elif place == "the run":
            (runs / "run").symlink_to(folder.root)
        else:
            (runs / "above").symlink_to(tmp_path / "runs")
    assert main(["runs", str(runs), "--prune", "--yes"]) == 0
    assert "link" in capsys.readouterr().err or place == "above it", "what lies behind a linked folder is not listed"
    where = runs / "run" if place == "in it" else folder.root
    assert (where / "manifest.json").is_file()
    assert place != "in it" or (elsewhere / "mine.txt").is_file()


@pytest.mark.parametrize("what", ["a sweep's trial", "a run inside", "a public score", "no run's manifest"])
def test_prune_leaves_what_others_need(
    what: str, recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, runs = recipe_file(), tmp_path / "runs"
    folder = make(path, phases=())
    if what == "a sweep's trial":
        (runs / "sweep.json").write_text("{}")
    elif what == "a run inside":
        make(path, f"output_dir={folder.root / 'inside'}", "seed=1")
    elif what == "a public score":
        (folder.root / "submissions.json").write_text('{"submissions": []}')
    else:
        folder.update(recipe={"name": "a cake"})
    assert main(["runs", str(runs), "--prune", "--yes"]) == 0
    assert f"{folder.root} stays: " in capsys.readouterr().err and folder.manifest_path.is_file()


def test_a_prune_that_is_stopped_is_ended_by_the_next(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(recipe_file(), phases=())
    (folder.root / "checkpoints" / "5").mkdir(parents=True)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        assert main(["runs", str(tmp_path / "runs"), "--prune", "--yes"]) == 130
    assert not folder.root.exists() and len(names(tmp_path / "runs")) == 1
    assert main(["runs", str(tmp_path / "runs"), "--prune", "--yes"]) == 0
    assert names(tmp_path / "runs") == []


def test_a_name_that_acts_on_a_terminal_is_shown_only(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(recipe_file(), 'run_name="a\\u001b[2Jb"')
    out = listed(capsys, str(tmp_path / "runs"))
    assert "a\\u001b[2Jb" in out and "\x1b" not in out


@pytest.mark.parametrize(("zone", "shown"), [("WEST+11", "31 Jan 2020"), ("EAST-14", "01 Feb 2020")])
def test_times_are_this_machines(
    zone: str, shown: str, recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(recipe_file()).update(started="2020-01-31T12:00:00+00:00")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            assert shown in listed(capsys, str(tmp_path / "runs"))
    finally:
        time.tzset()
