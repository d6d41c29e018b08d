"""A disk that refuses: nothing is half written, and the same command ends as if it had never refused."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common import atomic_files, console
from fast_ft.common.errors import InputError
from fast_ft.generate import answers
from fast_ft.pipeline import train_phase
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from tests.helpers.parts import RecipeFactory, write_recipe

Before = Callable[[str, Path], None]


def outcome(root: Path) -> dict[str, Any]:
    manifest = json.loads((root / "manifest.json").read_text())
    log = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    return {
        "digests": manifest["digests"],
        "pred": (root / "pred.json").read_bytes(),
        "losses": [line["loss"] for line in log],
        "files": sorted(str(path.relative_to(root)) for path in root.rglob("*")),
    }


def check_whole(root: Path) -> None:
    """Every file that is there can be read: JSON parses, lines are whole, checkpoints and adapter are complete."""
    for path in root.rglob("*"):
        assert not path.name.endswith((".new", ".old")), path
        if path.suffix == ".json" and path.parent.name != "adapter":
            json.loads(path.read_text())
        if path.suffix == ".jsonl":
            assert path.read_bytes() == b"" or path.read_bytes().endswith(b"\n"), path
            [json.loads(line) for line in path.read_text().splitlines()]
        if path.name.startswith("step-"):
            assert len(list(path.iterdir())) == 3, path


@pytest.fixture
def recipe(recipe_file: RecipeFactory) -> Path:
    return recipe_file({"train.save_steps": 2, "train.num_train_epochs": 1, "generate.max_new_tokens": 4})


def go(path: Path, root: Path) -> RunDir:
    return run(load_recipe(path, [f"output_dir={root}"]), path)


def failing(pick: Callable[[str, str], bool], number: int) -> Before:
    def before(what: str, path: Path) -> None:
        if pick(what, path.name):
            raise OSError(number, os.strerror(number), str(path))

    return before


def test_a_disk_that_refuses_any_file_once_changes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file's write, rename and append fail at their first time; the same command again and again ends well."""
    wanted = outcome(go(recipe, tmp_path / "whole").root)
    root, refused, number = tmp_path / "run", list[tuple[str, str]](), errno.ENOSPC

    def first_time(what: str, name: str) -> bool:
        if (what, name) in refused:
            return False
        refused.append((what, name))
        return True

    monkeypatch.setattr(atomic_files, "before", lambda what, path: failing(first_time, number)(what, path))
    attempts = 0
    while True:
        attempts += 1
        told = len(refused)
        number = (errno.ENOSPC, errno.EROFS)[attempts % 2]
        try:
            folder = go(recipe, root)
        except InputError as error:
            assert "cannot write" in str(error) and len(refused) == told + 1
            check_whole(root)
            continue
        if len(refused) == told:  # a report that failed ends the run all the same
            break
    assert outcome(folder.root) == wanted
    names = {name for _, name in refused}
    assert names >= {"manifest.json", "plan.json", "log.jsonl", "step-2", "loss.png", "adapter", "pred.partial.jsonl"}
    assert names >= {"answers.json", "pred.json", "report.html"} and attempts > 15


@pytest.mark.soak
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_at_each_write_of_a_run_in_turn_changes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    writes: list[str] = []
    monkeypatch.setattr(atomic_files, "before", lambda what, path: writes.append(f"{what} {path.name}"))
    wanted = outcome(go(recipe, tmp_path / "whole").root)
    assert len(writes) > 40
    for turn in range(len(writes)):
        count, root = Counter[str](), tmp_path / f"run-{turn}"

        def nth(what: str, name: str, count: Counter[str], turn: int) -> bool:
            count["all"] += 1
            return count["all"] == turn + 1

        monkeypatch.setattr(atomic_files, "before", failing(functools.partial(nth, count=count, turn=turn), number))
        try:
            go(recipe, root)
        except InputError as error:
            assert "cannot write" in str(error), writes[turn]
        if root.exists():
            check_whole(root)
        assert outcome(go(recipe, root).root) == wanted, writes[turn]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("where", ["training", "answers"])
def test_a_disk_that_is_full_in_truth_changes_nothing(
    recipe: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Filled up by somebody else at the third step, or the third answer; then they tidy up."""
    fill = small_disk / "fill"

    class Filling(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.title == where and self.done == 3:
                with pytest.raises(OSError, match="No space left"), fill.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(1 << 16 if shutil.disk_usage(small_disk).free >= 1 << 16 else 1))

    root = small_disk / "run"
    with monkeypatch.context() as patch:
        for module in (train_phase, answers):
            patch.setattr(module, "Bar", Filling)
        with pytest.raises(InputError, match=r"cannot write .*the disk is full"):
            go(recipe, root)
        with pytest.raises(InputError, match="the disk is full"):
            go(recipe, root)
    check_whole(root)
    fill.unlink()
    assert outcome(go(recipe, root).root) == outcome(go(recipe, tmp_path / "whole").root)


def test_a_line_that_does_not_fit_leaves_none_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"

    class Short:
        """A file on a disk that takes four bytes more, and then no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 4

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= (count := self.file.write(data[: self.left]))
            return int(count)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with atomic_files.Lines(path) as lines:
        lines.add({"step": 1})
        before = path.read_bytes()
        whole, lines._file = lines._file, Short(lines._file)  # type: ignore[assignment]
        with pytest.raises(InputError, match="the disk is full"):
            lines.add({"step": 2})
        assert path.read_bytes() == before
        lines._file = whole
        lines.add({"step": 2})
        lines.sync()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_space_is_checked_before_the_first_step(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "free_bytes", lambda folder: 1_000_000)
    with pytest.raises(InputError, match=r"run: two checkpoints, .* need about 2\d MB, and 1 MB are free"):
        go(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_a_read_only_folder_is_a_message(
    tiny: Path, train_file: Path, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, tiny, train_file, test_file)
    monkeypatch.setattr(atomic_files, "before", failing(lambda what, name: True, errno.EROFS))
    with pytest.raises(
        InputError, match=r"cannot write .*run.*: read-only file system\. .* Make it writable, or choose"
    ):
        go(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
