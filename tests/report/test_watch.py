"""The live page of a run: what it reads from the folder of a finished, a stopped and a running run, and how it ends."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fast_ft.cli.main import main
from fast_ft.report.run_data import read_run
from fast_ft.report.watch import planned_steps, seconds_left, watch_page, watcher
from fast_ft.run import lock, provenance
from fast_ft.run.folder import RunDir
from tests.helpers.parts import ROOT
from tests.helpers.patience import PATIENCE
from tests.helpers.report_pages import made_run, recipe_file, training_rows


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    """A finished run of 40 steps; by its recipe it would have 50."""
    return made_run(recipe_file(tmp_path, training_rows(60)), ["a", "b"])[0]


def unfinished(folder: RunDir, steps: int) -> None:
    lines = folder.log.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.update(phases={})
    folder.log.write_text("".join(lines[:steps]), encoding="utf-8")


def figures(folder: RunDir) -> dict[str, str]:
    return dict(watcher(folder)({})["figures"])


def test_a_running_run_shows_loss_speed_memory_and_time_left(folder: RunDir) -> None:
    unfinished(folder, 30)
    with lock.hold(folder.root):
        state = watcher(folder)({})
    assert "Under way: training." in state["says"]
    shown = dict(state["figures"])
    assert shown["steps"] == "30 of 50" and shown["tokens a second"] == "1,800"
    assert shown["GPU memory, GiB"] == "9.3 of 14.0" and shown["training time left"] == "10 s"
    losses = [3 / step**0.5 for step in range(11, 31)]
    assert shown["loss, mean of 20 steps"] == f"{sum(losses) / 20:.2f}"
    assert len(state["curves"]["loss"]) == 30 and "curves" not in watcher(folder)({"steps": 30})


def test_a_stopped_run_says_so_and_a_finished_one_points_to_its_report(folder: RunDir) -> None:
    assert "Done: training, answers." in watcher(folder)({})["says"]
    folder.report.write_text("there", encoding="utf-8")
    assert "The run has ended" in watcher(folder)({})["says"] and "training time left" not in figures(folder)
    unfinished(folder, 12)
    assert "no process holds its folder" in watcher(folder)({})["says"]


def test_a_line_that_is_just_being_written_changes_nothing(folder: RunDir) -> None:
    unfinished(folder, 12)
    ask = watcher(folder)
    before = ask({})
    with folder.log.open("a", encoding="utf-8") as log:
        log.write('{"stage": "all", "st')
    assert ask({})["figures"] == before["figures"]


@pytest.mark.parametrize(("changes", "steps"), [
    ({}, 50), ({"train": {"num_train_epochs": 10, "max_steps": 35}}, 35), ({"curriculum": {"stages": []}}, 30),
])  # fmt: skip
def test_the_steps_of_all_stages_are_counted(tmp_path: Path, changes: dict[str, object], steps: int) -> None:
    folder, _ = made_run(recipe_file(tmp_path, training_rows(60), **changes), ["a"])
    assert planned_steps(read_run(folder)) == steps
    unfinished(folder, 10)
    assert seconds_left(read_run(folder)) == pytest.approx(0.5 * (steps - 10))


def test_the_page_holds_no_training_row_and_needs_none(folder: RunDir) -> None:
    row = json.loads((folder.root.parent / "train.json").read_text())[0]["conversations"][0]["value"]
    (folder.root.parent / "train.json").unlink()
    page = watch_page(folder)
    assert row not in page and "Not to be shared" not in page and "connect-src 'self'" in page


def test_ctrl_c_ends_the_command_cleanly(folder: RunDir) -> None:
    before = sorted(path.name for path in folder.root.iterdir())
    command = [sys.executable, "-m", "fast_ft", "watch", str(folder.root)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        assert process.stderr.readline().startswith("http://127.0.0.1:")
        assert process.stderr.readline() == "Ctrl-C stops it.\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(PATIENCE) == 0 and said == "stopped\n" and process.stdout.read() == ""
    assert sorted(path.name for path in folder.root.iterdir()) == before


def test_a_copy_with_only_what_a_run_needs_says_what_it_lacks(folder: RunDir, tmp_path: Path) -> None:
    for path in provenance.source_files():
        there = tmp_path / "copy" / "fast_ft" / path.relative_to(provenance.PACKAGE)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)
    command = [sys.executable, "-m", "fast_ft", "watch", str(folder.root)]
    ended = subprocess.run(
        command, cwd=tmp_path / "copy", capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "this copy of the program has no fast_ft.report.server" in ended.stderr


def test_watch_takes_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "nowhere")]) == 2
    assert "there is no such run folder" in capsys.readouterr().err
