"""A backup in another folder: verified, rolling, without renames; a fresh machine goes on from it."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common import atomic_files, console, folders
from fast_ft.common.errors import InputError
from fast_ft.generate import answers
from fast_ft.generate.engine.llm_engine import LLMEngine
from fast_ft.judge import scoring
from fast_ft.pipeline import backup, restore, train_phase
from fast_ft.pipeline.backup import COMPLETE, REPLIES, Backup
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run import folder as folder_of_run
from fast_ft.run.folder import RESTORED, RunDir, output_folder
from tests.helpers.judge_server import JudgeServer
from tests.helpers.parts import RecipeFactory, write_recipe


def recipe_in(folder: Path) -> dict[str, Any]:
    return {"train.save_steps": 2, "output_dir": str(folder / "local" / "run")}


@pytest.fixture
def path(recipe_file: RecipeFactory, tmp_path: Path) -> Path:
    return recipe_file(recipe_in(tmp_path))


def drive(tmp_path: Path) -> Path:
    return tmp_path / "drive" / "run"


def go(path: Path, tmp_path: Path, *overrides: str) -> Any:
    return run(load_recipe(path, [f"backup_dir={tmp_path}/drive", *overrides]), path)


@pytest.fixture(scope="module")
def whole(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of `path`'s recipe that was never stopped, made once; its backup is in drive(...) two folders above it."""
    folder = tmp_path_factory.mktemp("whole")
    made: RunDir = go(write_recipe(folder, tiny, train_file, test_file, recipe_in(folder)), folder)
    return made


@pytest.fixture
def finished(whole: RunDir, tmp_path: Path) -> RunDir:
    """That run and its backup, copied into the test's folder: as go(path, tmp_path) leaves them."""
    for name in ("local", "drive"):
        shutil.copytree(whole.root.parents[1] / name, tmp_path / name)
    return RunDir.at(tmp_path / "local" / "run")


def stopped_at(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Begin the run, and lose it in this step."""

    class Stopping(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.done == step:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_phase, "Bar", Stopping)
        go(path, tmp_path)


def test_a_fresh_machine_goes_on_from_the_backup(
    path: Path, whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    stopped_at(path, tmp_path, monkeypatch, 5)
    assert [each.name for each in drive(tmp_path).iterdir()] == ["snapshot-2"], "one, of step 4"
    said = capsys.readouterr().err
    assert "backups to " in said and "twice that while one replaces another" in said
    shutil.rmtree(tmp_path / "local")  # the runtime is lost, and its disk with it
    folder = go(path, tmp_path)
    said = capsys.readouterr().err
    assert "the run is restored from" in said and "going on after step 4 of 6" in said
    assert folder.manifest()["digests"] == whole.manifest()["digests"]
    assert folder.pred.read_bytes() == whole.pred.read_bytes()
    assert not list(drive(tmp_path).glob(".*")), "its lease is given back"

    shutil.rmtree(tmp_path / "local")  # now a finished run is lost
    again = go(path, tmp_path)
    assert "training" not in capsys.readouterr().err and again.pred.read_bytes() == whole.pred.read_bytes()
    assert again.report.is_file(), "made anew"
    (snapshot,) = drive(tmp_path).iterdir()
    names = {name.split("/")[0] for name in json.loads((snapshot / COMPLETE).read_text())["files"]}
    assert "adapter" in names and not names & {"checkpoints", "report.html"}


@pytest.mark.parametrize("lost", [True, False])
def test_a_fresh_machine_goes_on_from_the_answers_too(
    path: Path,
    whole: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lost: bool,
) -> None:
    """A machine that vanishes leaves what the last copy held; one that is told to stop leaves all."""

    class Stopping(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.title == "answers" and self.done == 3:
                raise RuntimeError("the machine is gone") if lost else KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(RuntimeError if lost else KeyboardInterrupt):
        patch.setattr(backup, "EVERY", 0.0 if lost else 1e9)
        patch.setattr(backup, "_SHARE", math.inf)
        patch.setattr(answers, "Bar", Stopping)
        go(path, tmp_path)
    older, newer = sorted(drive(tmp_path).iterdir())
    held = json.loads((newer / COMPLETE).read_text())
    assert held["on"] == older.name and "adapter/adapter_model.safetensors" in held["files"]
    assert not (newer / "adapter").exists() and (older / "adapter").is_dir()
    partial = (newer / "pred.partial.jsonl").read_bytes()
    assert partial.count(b"\n") == 3

    shutil.rmtree(tmp_path / "local")
    drawn = []
    run_pool = LLMEngine.run
    monkeypatch.setattr(LLMEngine, "run", lambda pool, rows, **o: drawn.append(rows) or run_pool(pool, rows, **o))
    folder = go(path, tmp_path)
    assert f"restored from {newer}" in capsys.readouterr().err
    assert sum(row.known is not None for row in drawn[-1]) == 3, "these are not answered again"
    assert folder.pred.read_bytes() == whole.pred.read_bytes()
    assert len(list(drive(tmp_path).iterdir())) == 1, "a finished run is one whole snapshot"


def test_answers_are_backed_up_each_minute_and_take_a_twentieth_of_the_time(tmp_path: Path) -> None:
    root, now = tmp_path / "run", 0.0
    root.mkdir()
    (root / "manifest.json").write_text('{"phases": {"train": {}}}')
    kept = Backup(root, str(tmp_path / "drive"), clock=lambda: now)

    def asked(at: float) -> bool:
        nonlocal now
        now = at
        return kept.answered()

    assert not asked(61), "there is no whole snapshot that it could stand on"
    assert kept.save() and asked(62) and not asked(121) and asked(123)
    contents = Backup._files

    class Slow(Backup):
        def _files(self) -> list[Path]:
            nonlocal now
            now += 10
            return contents(self)

    kept = Slow(root, str(tmp_path / "drive"), clock=lambda: now)
    assert asked(183.5) and not asked(193.5 + 199) and asked(193.5 + 201)
    assert sorted(each.name for each in (tmp_path / "drive" / "run").iterdir()) == ["snapshot-1", "snapshot-5"]


def test_a_judges_replies_are_in_the_backup_and_come_back(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were paid for. A server of our own answers three questions; then the machine is gone."""
    judged = ("judge.kind=openai", "judge.model=ours", "judge.concurrency=1")

    class Stopping(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.title == "judging" and self.done == 3:
                raise RuntimeError("the machine is gone")

    server = JudgeServer(lambda place, before, text: "")
    with server.running() as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(backup, "EVERY", 0.0)
            patch.setattr(backup, "_SHARE", math.inf)
            patch.setattr(scoring, "Bar", Stopping)
            go(path, tmp_path, *judged)
        shutil.rmtree(tmp_path / "local")
        folder = go(path, tmp_path, *judged)
    assert folder.done("judge") is not None and len(server.asked) >= 4
    assert sum(count == 1 for count in server.asked.values()) >= 3, "these were not asked for again"
    (snapshot,) = drive(tmp_path).iterdir()
    assert len((snapshot / REPLIES).read_text().splitlines()) >= len(server.asked)


def full_for(name: str) -> Callable[[str, Path], None]:
    """Return what stands before each write: a Drive that has no room for the snapshots' files of this name."""

    def before(what: str, file: Path) -> None:
        if "snapshot-" in str(file) and file.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before


def test_a_backup_of_answers_that_fails_warns_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(atomic_files, "before", full_for("pred.partial.jsonl"))
    monkeypatch.setattr(backup, "EVERY", 0.0)
    assert go(path, tmp_path).pred.is_file()
    assert capsys.readouterr().err.count("no backup was made") == 1
    assert len(list(drive(tmp_path).iterdir())) == 1


def test_after_a_backup_that_failed_others_are_tried_less_often_until_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, now = tmp_path / "run", [0.0]
    root.mkdir()
    (root / "manifest.json").write_text('{"phases": {"train": {}}}')
    kept = Backup(root, str(tmp_path / "drive"), clock=lambda: now[0])
    assert kept.save()

    def made(first: int, last: int) -> list[int]:
        return [now[0] for now[0] in range(first, last + 1) if kept.answered()]

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "before", full_for("complete.json"))
        assert made(1, 200) == [], "at 60 s, and at 180 s, 120 s later"
    assert made(201, 600) == [420, 480, 540, 600], "240 s later, and from then on each minute"
    said = capsys.readouterr().err
    assert said.count("no backup was made") == 1 and said.count("backups are made again") == 1


def test_a_backup_in_a_folder_that_renames_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(rename: Any) -> Any:
        def refuse(source: Any, target: Any, **options: Any) -> Any:
            if str(tmp_path / "drive") in (*map(str, Path(str(target)).parents), *map(str, Path(str(source)).parents)):
                raise OSError(errno.ENOTSUP, "this folder renames nothing")
            return rename(source, target, **options)

        return refuse

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(OSError, match="renames nothing"):
        (tmp_path / "drive").mkdir()
        (tmp_path / "drive" / "a").touch()
        (tmp_path / "drive" / "a").rename(tmp_path / "drive" / "b")
    stopped_at(path, tmp_path, monkeypatch, 5)
    shutil.rmtree(tmp_path / "local")
    assert go(path, tmp_path).pred.is_file()


def test_old_snapshots_are_truncated_before_they_are_deleted(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, seen = os.unlink, list[int]()

    def watched(file: Any, *arguments: Any, **options: Any) -> None:
        if "snapshot-" in str(file):
            seen.append(Path(file).stat().st_size)
        unlink(file, *arguments, **options)

    monkeypatch.setattr(os, "unlink", watched)
    go(path, tmp_path)
    assert len(seen) > 20 and set(seen) == {0}


def test_a_copy_that_does_not_read_back_is_no_backup(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (before,) = drive(tmp_path).iterdir()
    digest = atomic_files.sha256_file
    monkeypatch.setattr(
        atomic_files, "sha256_file", lambda p: "0" if "snapshot-" in str(p) and p.name == "log.jsonl" else digest(p)
    )
    assert not Backup(finished.root, str(tmp_path / "drive")).save()
    assert "no backup was made" in capsys.readouterr().err
    assert list(drive(tmp_path).iterdir()) == [before] and (before / COMPLETE).is_file()


def test_a_full_drive_is_a_warning_and_the_run_goes_on(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(atomic_files, "before", full_for("adapter.safetensors"))
    monkeypatch.setattr(atomic_files, "free_bytes", lambda folder: 0 if folder == drive(tmp_path) else 10**12)
    assert go(path, tmp_path).pred.is_file()
    said = capsys.readouterr().err
    assert "only 0 MB are free there, so none may be made" in said and "no backup was made: " in said
    (snapshot,) = drive(tmp_path).iterdir()
    assert (snapshot / COMPLETE).is_file() and not (snapshot / "checkpoints").exists(), "what fitted in the end"


@pytest.mark.parametrize(
    "damage",
    [
        "unfinished",
        "a flipped byte",
        "a file gone",
        "a name that leads out",
        "on none",
        "on one elsewhere",
        "on a list",
    ],
)
def test_a_snapshot_that_is_not_whole_is_passed_over_for_the_one_before(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    root = tmp_path / "local" / "run"
    (root / "checkpoints").mkdir(parents=True)
    (root / "manifest.json").write_text('{"phases": {}}')
    (root / "log.jsonl").write_text("{}\n")
    kept = Backup(root, str(tmp_path / "drive"))
    assert kept.save()
    newer = drive(tmp_path) / "snapshot-2"
    shutil.copytree(drive(tmp_path) / "snapshot-1", newer)
    if damage == "unfinished":
        (newer / COMPLETE).unlink()
    elif damage == "a flipped byte":
        (newer / "log.jsonl").write_text("[]\n")
    elif damage == "a file gone":
        (newer / "log.jsonl").unlink()
    else:
        content = json.loads((newer / COMPLETE).read_text())
        if damage.startswith("on "):
            (newer / "log.jsonl").unlink()
            content["on"] = {"none": "snapshot-99", "one elsewhere": "../run/snapshot-1", "a list": [1]}[damage[3:]]
        else:
            content["files"]["../../evil"] = content["files"]["log.jsonl"]
        (newer / COMPLETE).write_text(json.dumps(content))
    shutil.rmtree(root)
    assert restore.restore(kept)
    said = capsys.readouterr().err
    assert "snapshot-2 is skipped" in said and "restored from" in said and "snapshot-1" in said
    assert sorted(each.name for each in root.iterdir()) == ["log.jsonl", "manifest.json"]
    assert not (tmp_path / "evil").exists() and not (tmp_path / "local" / "evil").exists()


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("backup_dir", "/content/drive/MyDrive/runs", 'drive.mount("/content/drive")'),
        ("backup_dir", "/content/drive", "Google Drive is not mounted"),
        ("output_dir", "/content/drive/MyDrive/runs/{recipe}", 'drive.mount("/content/drive")'),
        ("backup_dir", "/mnt/no-such-disk/a/b", "mkdir /mnt/no-such-disk"),
        ("backup_dir", "/media/no-such-disk", "its disk is not mounted"),
        ("output_dir", "/Volumes/no-such-disk/run", "its disk is not mounted"),
        ("backup_dir", "{tmp}/link/run", "its disk is not mounted"),
        ("backup_dir", "{tmp}/file/backups", "cannot make the folder {tmp}/file/backups/run: not a directory"),
        ("backup_dir", "/proc/no-such-folder", "cannot make the folder /proc/no-such-folder/run: no such file"),
        ("backup_dir", "{tmp}/circle", "backup_dir: {tmp}/circle: "),
        ("backup_dir", "~no-such-user/backups", "backup_dir: ~no-such-user/backups: "),
        ("output_dir", "~no-such-user/runs", "output_dir: ~no-such-user/runs: "),
        ("output_dir", "{tmp}/" + "a" * 300, "file name too long"),
        ("output_dir", "{tmp}/circle/run", "cannot make the folder {tmp}/circle/run: "),
    ],
)
def test_a_folder_that_cannot_be_made_or_whose_disk_is_not_mounted_is_one_message(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, name: str, words: str
) -> None:
    (tmp_path / "link").symlink_to("/mnt/no-such-disk/backups")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main([str(path), f"{key}={name.replace('{tmp}', str(tmp_path))}"]) == 2
    (said,) = capsys.readouterr().err.split("error: ")[1:]
    assert words.replace("{tmp}", str(tmp_path)) in said
    assert sorted(tmp_path.rglob("*")) == before, "a refused run leaves nothing behind"
    assert not Path("/mnt/no-such-disk").exists() and not folders.DRIVE.exists()


@pytest.mark.usefixtures("finished")
def test_the_backup_of_another_run_of_the_same_name_is_not_taken_for_this_ones(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {file: file.read_bytes() for file in drive(tmp_path).rglob("*") if file.is_file()}
    other = [str(path), f"backup_dir={tmp_path}/drive", f"output_dir={tmp_path}/other/run", "lora.r=2"]
    assert main(other) == 2
    said = capsys.readouterr().err
    assert "Where the backup is another run's, name another backup_dir" in said and "lora.r: 4 -> 2" in said
    assert not (tmp_path / "other").exists(), "a refused run leaves nothing behind"
    assert {file: file.read_bytes() for file in drive(tmp_path).rglob("*") if file.is_file()} == held


@pytest.mark.usefixtures("finished")
def test_a_users_own_folder_is_refused_before_anything_is_restored_into_it(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "other" / "run"
    (mine / "photos").mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    (mine / "photos" / "a.jpg").write_text("x")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for override in ("lora.r=2", "lora.r=4"):
        assert main([str(path), f"backup_dir={tmp_path}/drive", f"output_dir={mine}", override]) == 2
        assert "is there already and is no run's folder" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(("what", "name"), [("write", "log.jsonl"), ("rename", "adapter"), ("rename", "manifest.json")])
def test_a_restoring_that_was_killed_is_done_again_or_goes_on(
    path: Path, finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, name: str
) -> None:
    pred, root = finished.pred.read_bytes(), finished.root
    shutil.rmtree(root)

    def killed(seen: str, file: Path) -> None:
        if seen == what and file.name == name and root in file.parents:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic_files, "before", killed)
        go(path, tmp_path)
    assert not (root / "manifest.json").exists(), "until all else is there"
    assert (root / RESTORED).is_dir() == (what == "rename")
    folder = go(path, tmp_path)
    assert folder.pred.read_bytes() == pred and not list(folder.root.glob(".fast_ft-*"))


def test_what_lies_in_the_way_of_a_run_that_is_restored_stays(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for name, text in (("notes.txt", "mine"), (f"{RESTORED}/notes.txt", "the run's"), (f"{RESTORED}/a", "")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    with pytest.raises(InputError, match=r"notes\.txt is in the way .* Move it away"):
        restore.move_in(root)
    assert (root / "notes.txt").read_text() == "mine" and (root / RESTORED / "notes.txt").read_text() == "the run's"
    (root / "notes.txt").rename(tmp_path / "mine.txt")
    restore.move_in(root)
    assert sorted(each.name for each in root.iterdir()) == ["a", "notes.txt"]


def test_a_users_own_folder_of_a_snapshots_name_stays(path: Path, tmp_path: Path) -> None:
    mine = drive(tmp_path) / "snapshot-2024" / "photos" / "a.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    folder = go(path, tmp_path)
    assert mine.read_text() == "x"
    (kept,) = (each for each in drive(tmp_path).iterdir() if each.name != "snapshot-2024")
    (kept / COMPLETE).unlink()  # as a kill leaves one: it is known for a snapshot, and goes
    assert Backup(folder.root, str(tmp_path / "drive")).save() and not kept.exists() and mine.is_file()


def test_a_backup_never_takes_the_place_of_another_runs(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_of_run, "now", lambda: "2026-01-01T00:00:00+00:00")
    go(path, tmp_path)
    monkeypatch.setattr(folder_of_run, "now", lambda: "2026-02-02T00:00:00+00:00")
    other = load_recipe(path, [f"output_dir={tmp_path}/other/run"])
    run(other, path, until="adapter")  # without a backup, in a folder of the same name
    held = {file: file.read_bytes() for file in drive(tmp_path).rglob("*") if file.is_file()}
    assert main([str(path), f"output_dir={tmp_path}/other/run", f"backup_dir={tmp_path}/drive"]) == 2
    said = capsys.readouterr().err
    assert (
        "holds the backup of another run, begun at 2026-01-01T00:00:00+00:00" in said and "another backup_dir" in said
    )
    assert {file: file.read_bytes() for file in drive(tmp_path).rglob("*") if file.is_file()} == held
    assert go(path, tmp_path).pred.is_file(), "the run itself goes on"


def test_a_disk_that_is_mounted_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(folders, "PLACES", (tmp_path / "mnt",))
    (tmp_path / "drive").mkdir()
    with pytest.raises(InputError, match=r"there is no .*drive/MyDrive"):
        folders.make_folder(tmp_path / "drive" / "MyDrive" / "runs" / "a")
    for name in ("drive/MyDrive", "mnt/disk"):
        (tmp_path / name).mkdir(parents=True)
        folders.make_folder(tmp_path / name / "runs" / "a")
        assert (tmp_path / name / "runs" / "a").is_dir()


def test_a_backup_elsewhere_is_the_same_run(path: Path, recipe_file: RecipeFactory, tmp_path: Path) -> None:
    plain = recipe_file()
    folders = {output_folder(load_recipe(plain, each), plain) for each in ([], [f"backup_dir={tmp_path}/drive"])}
    assert len(folders) == 1
    with pytest.raises(InputError, match="lies in the run folder itself"):
        Backup(tmp_path / "run", str(tmp_path / "run" / "backup"))
    backup.discard(tmp_path / "nowhere")
