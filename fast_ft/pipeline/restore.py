"""A run comes back from its backup: copied beside, looked at, and moved into its folder; what is there is not touched.

    strong-1a2b3c4d/.fast_ft-restoring/   the snapshot's files, copied and looked at; after a kill they are copied again
    strong-1a2b3c4d/.fast_ft-restored/    all of them, each on its way into the folder, manifest.json last

Once the second one is there, the run is restored: after a kill the rest is moved.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.pipeline.backup import REPLIES, Backup, copy, found, replies_beside
from fast_ft.run.folder import RESTORED

_COPYING = ".fast_ft-restoring"


def restore(backup: Backup, check: Callable[[Path], object] = lambda folder: None) -> bool:
    """Put the newest whole snapshot into the run folder, in which no run is; return whether there is one.

    `check` sees a folder with the run before. What it raises leaves the run folder as it was.

    Raises:
        InputError: check's, in the snapshot's name; or what is restored is there already.
    """
    for snapshot in reversed(backup.snapshots()):
        try:
            files = found(snapshot)
            for name, (path, digest) in files.items():
                if atomic_files.sha256_file(path) != digest:
                    raise ValueError(f"{name} is not as it was written")
        except (OSError, ValueError) as error:  # an InputError is one
            note(f"warning: {snapshot} is skipped: {error}")
            continue
        beside = backup.root / _COPYING
        try:
            _copied({name: path for name, (path, _) in files.items()}, beside)
            _checked(check, beside, snapshot)
            beside.rename(backup.root / RESTORED)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        move_in(backup.root)
        note(f"the run is restored from {snapshot}")
        return True
    return False


def _copied(files: dict[str, Path], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, path in files.items():
        with atomic_files.refusal(folder / name):
            copy(path, folder / name)


def _checked(check: Callable[[Path], object], folder: Path, snapshot: Path) -> None:
    try:
        check(folder)
    except InputError as error:
        raise InputError(str(error).replace(str(folder), str(snapshot))) from error


def move_in(root: Path) -> None:
    """Move what was restored into the run folder, manifest.json last; nothing is done where nothing was.

    Raises:
        InputError: a file or folder of the same name is there. It stays.
    """
    beside = root / RESTORED
    if not beside.is_dir():
        return
    if (kept := beside / REPLIES).is_file():
        replies = replies_beside(root)
        with atomic_files.refusal(replies):
            _add_lines(kept, replies)
            kept.unlink()
            kept.parent.rmdir()
    for path in sorted(beside.iterdir(), key=lambda path: path.name == "manifest.json"):
        target = root / path.name
        if os.path.lexists(target):
            raise InputError(
                f"{target} is in the way of what comes from the run's backup. Move it away, then give the same command "
                "again"
            )
        with atomic_files.refusal(target):
            atomic_files.touch("rename", target)
            path.rename(target)
    beside.rmdir()


def _add_lines(source: Path, target: Path) -> None:
    """Add a file's lines to another's, which may be absent. A reply that stands there twice counts once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as file:
        file.write((b"\n" if file.tell() else b"") + source.read_bytes())
