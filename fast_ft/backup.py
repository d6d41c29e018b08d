"""A run's backup: one verified snapshot in another folder, such as a mounted Drive, from which a fresh machine goes on.

    backup_dir/strong-1a2b3c4d/snapshot-7/...            the run's files, copied and read back
    backup_dir/strong-1a2b3c4d/snapshot-7/complete.json  their digests; written last: without it there is no snapshot

Nothing is renamed there, since not every such folder renames in one piece. When a snapshot is complete those before it
are truncated, then deleted: what lies in a Drive's trash counts against its quota.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path, PurePosixPath

from fast_ft import atomic, checkpoints
from fast_ft.errors import InputError
from fast_ft.outside import json_object
from fast_ft.progress import note

COMPLETE = "complete.json"
_LEFT_OUT = {"report.html", "map.png", "taste"}  #: made again from the rest


class Backup:
    """The backup of the run in folder `root`, below `backup_dir`, in a folder of the run's name."""

    def __init__(self, root: Path, backup_dir: str) -> None:
        self.root, self.folder = Path(root), Path(backup_dir).expanduser() / Path(root).name
        if self.folder.resolve().is_relative_to(self.root.resolve()):
            raise InputError(f"backup_dir: {backup_dir} lies in the run folder itself: name a folder on another disk")

    def say_needed(self, size: int) -> None:
        """Say how much room the backup takes, and warn where it is not there. `size`: bytes of one snapshot."""
        free = atomic.free_bytes(self.folder)
        text = f"backups to {self.folder}: about {size / 1e6:,.0f} MB, twice that while one replaces another"
        missing = "" if free >= 2 * size else f"; only {free / 1e6:,.0f} MB are free there, so none may be made"
        note(f"{'warning' if missing else 'note'}: {text}{missing}")

    def save(self) -> bool:
        """Make a snapshot of the run as it is, in place of those before. What fails is a warning: the run goes on."""
        number = max((_number(path) for path in self._there()), default=0) + 1
        target = self.folder / f"snapshot-{number}"
        try:
            files = {}
            for path in self._files():
                name = path.relative_to(self.root).as_posix()
                files[name] = copy(path, target / name)
            content = json.dumps({"run": self.root.name, "files": files}, indent=1).encode()
            _write(target / COMPLETE, content)
            if (target / COMPLETE).read_bytes() != content:
                raise OSError(f"{target / COMPLETE} does not read back as it was written")
        except OSError as error:
            note(f"warning: no backup was made: {error}. The run goes on; the backup before this one stays.")
            discard(target)
            return False
        for old in self._there():
            if _number(old) < number:
                discard(old)
        return True

    def restore(self) -> bool:
        """Copy the newest whole snapshot into the run folder; False where there is none. manifest.json comes last."""
        for snapshot in reversed(self._there()):
            try:
                files = _contents(snapshot)
                for name, digest in files.items():
                    if atomic.sha256_file(snapshot / name) != digest:
                        raise ValueError(f"{name} is not as it was written")
            except (OSError, ValueError) as error:  # an InputError is one
                note(f"warning: {snapshot} is passed over: {error}")
                continue
            for name in sorted(files, key=lambda name: name == "manifest.json"):
                with atomic.refusal(self.root / name):
                    copy(snapshot / name, self.root / name)
            note(f"the run is restored from {snapshot}")
            return True
        return False

    def _there(self) -> list[Path]:
        """Return the snapshots, whole or not, the oldest first."""
        found = [p for p in self.folder.glob("snapshot-*") if p.name.removeprefix("snapshot-").isdecimal()]
        return sorted(found, key=_number)

    def _files(self) -> list[Path]:
        """Return what a fresh machine needs: no report, of checkpoints the newest, and none of a finished training."""
        manifest = json.loads((self.root / "manifest.json").read_text(encoding="utf-8"))
        newest = max((self.root / "checkpoints").glob("step-*"), key=checkpoints.step, default=None)
        kept = []
        for path in sorted(self.root.rglob("*")):
            parts = path.relative_to(self.root).parts
            if not path.is_file() or parts[0] in _LEFT_OUT or any(part.startswith(".") for part in parts):
                continue
            if parts[0] == "checkpoints" and ("train" in manifest["phases"] or newest not in path.parents):
                continue
            kept.append(path)
        return kept


def copy(source: Path, target: Path) -> str:
    """Copy a file, read the copy back, and return its SHA-256; OSError where it is not the source's."""
    atomic.before("write", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())
    digest = atomic.sha256_file(target)
    if digest != atomic.sha256_file(source):
        raise OSError(f"{target} does not read back as {source.name}")
    return digest


def discard(folder: Path) -> None:
    """Truncate the files of a folder, then delete it. The digests go first: half a snapshot is none."""
    paths = sorted(folder.rglob("*"), key=lambda path: (path.name != COMPLETE, -len(path.parts)))
    try:
        for path in paths:
            if path.is_file():
                os.truncate(path, 0)
                path.unlink()
        for path in (*paths, folder):
            if path.is_dir():
                path.rmdir()
    except OSError as error:
        note(f"warning: {folder} could not be deleted: {error}")


def _contents(snapshot: Path) -> dict[str, str]:
    """Return {name: SHA-256} of a complete snapshot; InputError for one that is not, or whose names lead out of it."""
    files = json_object(snapshot / COMPLETE, remedy="It was never finished.").get("files")
    if not isinstance(files, dict) or "manifest.json" not in files:
        raise InputError(f"{snapshot / COMPLETE}: names no files of a run")
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise InputError(f"{snapshot / COMPLETE}: {name!r} leads out of the run folder")
    return files


def _write(path: Path, content: bytes) -> None:
    atomic.before("write", path)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _number(snapshot: Path) -> int:
    return int(snapshot.name.removeprefix("snapshot-"))
