"""A run's folder: nothing half-written, one recipe to a folder."""

from __future__ import annotations

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fast_ft.common import atomic_files
from fast_ft.common.atomic_files import replace_folder, sha256_file, write_bytes, write_json
from fast_ft.common.errors import InputError
from fast_ft.recipe.loader import digest
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir, output_folder
from fast_ft.run.listing import list_runs
from tests.helpers.patience import PATIENCE


def make(tmp_path: Path, **values: object) -> Recipe:
    base = {"model": {"name_or_path": "base"}, "data": {"train": "rows"}, "output_dir": f"{tmp_path}/runs/{{recipe}}-x"}
    return Recipe.model_validate(base | values)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_named_after_recipe_and_digest(tmp_path: Path) -> None:
    recipe = make(tmp_path, output_dir=f"{tmp_path}/{{recipe}}-{{digest8}}")
    assert RunDir.open(recipe, "recipes/strong.yaml").root == tmp_path / f"strong-{digest(recipe)[:8]}"


def test_another_budget_of_minutes_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    named = f"{tmp_path}/{{recipe}}-{{digest8}}"
    short, long = (make(tmp_path, output_dir=named, budget={"train_minutes": each}) for each in (5.0, None))
    assert output_folder(short, "a.yaml") == output_folder(long, "a.yaml")
    other = make(tmp_path, output_dir=named, budget={"memory_gib": 7.0})
    assert output_folder(other, "a.yaml") != output_folder(long, "a.yaml"), "another plan, another run"


def test_the_same_recipe_resumes(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    run = RunDir.open(recipe, "a.yaml")
    run.finish("data", 1.5, rows=100)
    again = RunDir.open(recipe, "a.yaml")
    assert (again.done("data") or {})["rows"] == 100 and again.done("train") is None
    assert again.recipe() == recipe
    homework = make(tmp_path, rules="ntu-ml-2025-hw5", output_dir=f"{tmp_path}/hw")  # a base that has gone since
    assert RunDir.open(homework, "hw.yaml").recipe() == homework


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a-x"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="no run's folder"):
        RunDir.open(make(tmp_path), "a.yaml")
    assert names(folder) == ["thesis.tex"]


def test_at_wants_a_run_and_a_whole_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        RunDir.at(tmp_path)
    (tmp_path / "manifest.json").write_text('{"recipe": ')
    with pytest.raises(InputError, match="not valid JSON"):
        RunDir.at(tmp_path)


def test_an_unknown_placeholder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\{digest\} is unknown \(did you mean 'digest8'"):
        RunDir.open(make(tmp_path, output_dir="runs/{digest}"), "a.yaml")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "pred.json"
    write_json(path, {"old": 1})

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_files.os, "fsync", refuse)
    with pytest.raises(InputError, match=r"cannot write .*pred\.json"):
        write_json(path, {"new": 2})
    with pytest.raises(InputError, match="cannot write"), replace_folder(tmp_path / "adapter") as beside:
        (beside / "weights").write_bytes(b"x")
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["pred.json"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell what is flushed")
def test_a_rename_is_on_the_disk_before_a_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []

    def flush(descriptor: int) -> None:
        done.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def rename(path: Path, target: Path) -> Path:
        done.append(("rename", Path(target).name))
        os.replace(path, target)  # noqa: PTH105
        return Path(target)

    monkeypatch.setattr(atomic_files.os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    monkeypatch.setattr(Path, "rename", rename)
    write_json(tmp_path / "pred.json", {})
    assert [what for what, _ in done] == ["flush", "rename", "flush"]
    assert done[1:] == [("rename", "pred.json"), ("flush", tmp_path.name)] and "pred.json" in done[0][1]
    for former in (False, True):
        done.clear()
        with replace_folder(tmp_path / "adapter") as beside:
            (beside / "weights").write_bytes(b"x")
        aside = [("rename", ".adapter.old")] if former else []
        assert done == [("flush", "weights"), *aside, ("rename", "adapter"), ("flush", tmp_path.name)]
    done.clear()
    atomic_files.move(tmp_path / "pred.json", tmp_path / "other.json")
    assert done == [("rename", "other.json"), ("flush", tmp_path.name)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_becomes_an_input_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="the disk is full"),
        replace_folder(tmp_path / "adapter"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert names(tmp_path) == []


def test_a_librarys_own_error_for_a_full_disk_is_recognised(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    with pytest.raises(InputError, match="the disk is full"), replace_folder(tmp_path / "adapter"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with replace_folder(target) as beside:
        (beside / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), replace_folder(target) as beside:
        (beside / "b").write_text("2")
        1 / 0  # noqa: B018
    assert names(target) == ["a"]
    with replace_folder(target) as beside:
        (beside / "b").write_text("2")
    assert names(target) == ["b"] and names(tmp_path) == ["adapter"]


def test_what_a_crash_left_is_put_right_on_resuming(tmp_path: Path) -> None:
    run = RunDir.open(make(tmp_path), "a.yaml")
    (run.root / ".adapter.old").mkdir()
    (run.root / ".adapter.old" / "weights").write_text("w")
    (run.root / ".adapter.1.new").mkdir()
    (run.root / ".pred.json.1.new").write_text("half")
    RunDir.open(make(tmp_path), "a.yaml")
    assert names(run.root) == ["adapter", "manifest.json"] and names(run.adapter) == ["weights"]


def test_digests_of_files_and_folders(tmp_path: Path) -> None:
    write_bytes(tmp_path / "d" / "a", b"abc")
    assert sha256_file(tmp_path / "d" / "a").startswith("ba7816bf")
    before = sha256_file(tmp_path / "d")
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    assert sha256_file(tmp_path / "d") != before


def test_runs_are_listed_with_what_differs(tmp_path: Path) -> None:
    one = RunDir.open(make(tmp_path), "a.yaml")
    one.finish("data", 30)
    one.finish("train", 90)
    write_json(one.scores, {"kind": "openai", "mean": 4.5})
    RunDir.open(make(tmp_path, lora={"r": 32}), "b.yaml")
    broken = tmp_path / "runs" / "c"
    broken.mkdir()
    (broken / "manifest.json").write_text("[")
    runs = {run.folder.name: run for run in list_runs(tmp_path / "runs")}
    assert runs["a-x"].state == "done" and runs["a-x"].minutes == 2.0 and runs["a-x"].score == 4.5
    assert runs["b-x"].state == "unfinished" and runs["b-x"].settings["lora.r"] == 32
    assert runs["c"].state == "unreadable"
    assert list_runs(tmp_path / "none") == []


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    """As two compilers of one kernel do: each writes the whole file, and neither takes away what the other renames."""
    path, meeting = tmp_path / "kernel", threading.Barrier(2)
    with pytest.MonkeyPatch.context() as patch:
        # both have written before one renames
        patch.setattr(atomic_files, "before", lambda what, _: meeting.wait(PATIENCE) if what == "rename" else None)
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(atomic_files.write_bytes, path, b"whole" * 1000) for _ in range(2)]:
                done.result()
    assert path.read_bytes() == b"whole" * 1000 and list(tmp_path.iterdir()) == [path]
