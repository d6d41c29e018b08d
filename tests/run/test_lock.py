"""One run in a folder: held against living processes, given up by dead ones, whatever another machine's clock says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common import atomic_files, console, processes
from fast_ft.common.errors import InputError
from fast_ft.generate import answers
from fast_ft.pipeline import train_phase
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run import lock
from tests.helpers.parts import ROOT, RecipeFactory

HOLDER = """
import sys
from pathlib import Path
from fast_ft.common import atomic_files as atomic
from fast_ft.generate import answers as generate
from fast_ft.run import lock as lease
from fast_ft.common import processes
from fast_ft.common import console as progress
from fast_ft.pipeline import train_phase
with lease.hold(Path(sys.argv[1]), every=0.05):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=ROOT, text=True, stdin=-1, stdout=-1
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def foreign(root: Path, *, age: float, **values: object) -> Path:
    """Write the lease of a process on another machine, whose last beat is this number of seconds old."""
    root.mkdir(exist_ok=True)
    path = root / lock.NAME
    content = {"host": "colab-7", "boot": "b", "pid": 4, "process": "9", "since": "2026-01-31", "token": "t", "beat": 3}
    path.write_text(json.dumps(content | values))
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def never(_: float) -> None:
    raise AssertionError("nothing had to be waited for")


def test_a_second_run_in_a_folder_is_refused_and_told_by_whom(
    holder: subprocess.Popen[str], tmp_path: Path, recipe_file: RecipeFactory
) -> None:
    with pytest.raises(InputError, match=rf"in use by process {holder.pid} on .* \(since 20"):
        lock.hold(tmp_path / "run", sleep=never).__enter__()
    path = recipe_file({"output_dir": str(tmp_path / "run")})
    with pytest.raises(InputError, match=rf"in use by process {holder.pid}"):
        run(load_recipe(path), path)
    assert [each.name for each in (tmp_path / "run").iterdir()] == [lock.NAME]
    holder.communicate("")  # it ends by itself and gives the folder back
    assert not (tmp_path / "run").exists(), "made for the lease alone, and gone with it"


def test_a_killed_holder_is_stale_at_once(
    holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder.kill()  # not waited for: a zombie still has its process id
    while processes.started(holder.pid) is not None:
        pass
    with lock.hold(tmp_path / "run", sleep=never):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()
    assert f"process {holder.pid} on" in capsys.readouterr().err


def test_a_process_that_is_suspended_holds_its_folder_and_goes_on(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    path = tmp_path / "run" / lock.NAME
    holder.send_signal(signal.SIGSTOP)
    os.waitpid(holder.pid, os.WUNTRACED)
    os.utime(path, (1, 1))  # no beat since 1970
    with pytest.raises(InputError, match=f"in use by process {holder.pid}"):
        lock.hold(tmp_path / "run", sleep=never).__enter__()
    holder.send_signal(signal.SIGCONT)
    holder.communicate("")
    assert holder.returncode == 0 and not path.exists()


def test_a_process_id_that_was_given_anew_holds_nothing(tmp_path: Path) -> None:
    mine = lock._self(tmp_path) | {"process": "1", "token": "of one that had this process id before"}
    (tmp_path / lock.NAME).write_text(json.dumps(mine))
    with lock.hold(tmp_path, sleep=never):
        pass


def test_a_dead_machine_is_stale_after_60_seconds(tmp_path: Path) -> None:
    foreign(tmp_path, age=61)
    with lock.hold(tmp_path, sleep=never):
        pass
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("age", [30, -3600])  # -3600: its clock, or this one, is an hour wrong
def test_another_machine_is_watched_and_its_clock_not_believed(tmp_path: Path, age: float) -> None:
    path, waited = foreign(tmp_path, age=age), []
    with lock.hold(tmp_path, sleep=waited.append):
        assert sum(waited) == 60
    path, waited = foreign(tmp_path, age=age), []

    def beat_after_ten(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 10:
            foreign(tmp_path, age=age, beat=4)

    with pytest.raises(InputError, match="in use by process 4 on colab-7"):
        lock.hold(tmp_path, sleep=beat_after_ten).__enter__()
    assert len(waited) == 10 and json.loads(path.read_text())["beat"] == 4


def test_a_lease_cut_off_in_writing_is_watched_like_any_other(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).write_text("")
    waited: list[float] = []
    with lock.hold(tmp_path, sleep=waited.append):
        assert sum(waited) == 60


def test_whoever_reads_while_a_lease_beats_finds_a_whole_one(tmp_path: Path) -> None:
    with lock.hold(tmp_path, every=3600) as held:
        beats = threading.Thread(target=lambda: [held.beat() for _ in range(500)])
        beats.start()
        while beats.is_alive():
            assert json.loads((tmp_path / lock.NAME).read_text())["token"] == held.content["token"]
        assert json.loads((tmp_path / lock.NAME).read_text())["beat"] == 500


def test_a_lease_is_as_long_at_each_beat_as_at_any_other(tmp_path: Path) -> None:
    """A reader that has come to its end, while a longer one is written over it, would find the last byte twice."""
    with lock.hold(tmp_path, every=3600) as held:
        sizes = {(tmp_path / lock.NAME).stat().st_size}
        for _ in range(11):
            held.beat()
            sizes.add((tmp_path / lock.NAME).stat().st_size)
    assert len(sizes) == 1


def test_a_lease_that_is_cut_off_in_writing_counts_as_held_while_it_is_fresh(tmp_path: Path) -> None:
    assert not lock.is_held(tmp_path)
    (tmp_path / lock.NAME).write_text("")
    assert lock.is_held(tmp_path)
    os.utime(tmp_path / lock.NAME, (1, 1))
    assert not lock.is_held(tmp_path)


def test_a_copied_folder_is_not_held_by_the_run_that_it_was_copied_from(
    holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert (tmp_path / "copy" / lock.NAME).is_file()
    with lock.hold(tmp_path / "copy", sleep=never):
        pass
    assert f"is a copy of a folder that process {holder.pid} on" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for same in ("run", "link"):
        with pytest.raises(InputError, match=f"in use by process {holder.pid}"):
            lock.hold(tmp_path / same, sleep=never).__enter__()
    (tmp_path / "run").rename(tmp_path / "renamed")
    with pytest.raises(InputError, match=f"in use by process {holder.pid}"):
        lock.hold(tmp_path / "renamed", sleep=never).__enter__()


@pytest.mark.parametrize(("module", "title", "unit"), [(train_phase, "training", 3), (answers, "answers", 2)])
def test_a_folder_that_is_renamed_stops_its_run_at_the_next_write_and_nothing_is_lost(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, title: str, unit: int
) -> None:
    old, new = tmp_path / "run", tmp_path / "moved" / "other name"
    new.parent.mkdir()
    path = recipe_file({"output_dir": str(old), "train.save_steps": 2})

    class Renaming(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if (self.title, self.done) == (title, unit):
                old.rename(new)

    with monkeypatch.context() as patch, pytest.raises(InputError) as caught:
        patch.setattr(module, "Bar", Renaming)
        run(load_recipe(path), path)
    assert f"{old} was renamed to {new}" in str(caught.value)
    assert not old.exists(), "the run is in one piece"
    assert not (new / lock.NAME).exists(), "and given back"
    new.rename(old)
    folder = run(load_recipe(path), path)
    whole = run(load_recipe(path, [f"output_dir={tmp_path}/whole"]), path)
    assert folder.manifest()["digests"] == whole.manifest()["digests"]


def test_a_renamed_folder_is_left_alone_even_where_another_one_has_its_name(tmp_path: Path) -> None:
    with lock.hold(tmp_path / "run") as held:
        (tmp_path / "run").rename(tmp_path / "new")
        (tmp_path / "run").mkdir()
        held.beat()
        with pytest.raises(InputError, match=r"run was renamed to .*new while"):
            atomic_files.write_text(tmp_path / "run" / "file", "text")
        assert not list((tmp_path / "run").iterdir())
    assert not list((tmp_path / "new").iterdir())
    with lock.hold(tmp_path / "run") as held:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(InputError, match="run was moved or deleted while"):
            held.check()


def test_a_lease_that_was_deleted_in_a_folder_that_is_there_is_written_again(tmp_path: Path) -> None:
    with lock.hold(tmp_path) as held:
        (tmp_path / lock.NAME).unlink()
        atomic_files.write_text(tmp_path / "file", "text")
        held.beat()
        assert json.loads((tmp_path / lock.NAME).read_text())["token"] == held.content["token"]


def test_a_run_that_lost_its_folder_stops(tmp_path: Path) -> None:
    with lock.hold(tmp_path, every=3600) as held:
        held.beat()
        held.check()
        assert json.loads((tmp_path / lock.NAME).read_text())["beat"] == 1
        foreign(tmp_path, age=0)  # taken over while this process slept
        held.beat()
        with pytest.raises(InputError, match="another process took this run over"):
            held.check()
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "colab-7", "not ours to remove"
