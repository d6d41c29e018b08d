"""A run's backup: one verified snapshot in another folder, such as a mounted Drive, from which a fresh machine goes on.

    backup_dir/strong-1a2b3c4d/snapshot-7/...            the run's files, copied and read back
    backup_dir/strong-1a2b3c4d/snapshot-7/complete.json  their digests; written last: without it there is no snapshot
    backup_dir/strong-1a2b3c4d/snapshot-8/...            "on": "snapshot-7": only what has changed since that one

Nothing is renamed there, since not every such folder renames in one piece. When a snapshot is complete those before it
are truncated, then deleted: what lies in a Drive's trash counts against its quota.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path, PurePosixPath

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.folders import make_folder
from fast_ft.common.minutes import Clock
from fast_ft.common.untrusted_files import json_object
from fast_ft.train import checkpoints

COMPLETE = "complete.json"
EVERY = 60.0  #: seconds between two backups of answers
_SHARE = 0.05  #: of the time that they may take
REPLIES = "beside/verdicts.jsonl"  #: a judge's replies, which were paid for, lie beside the runs that they are of
_LEFT_OUT = {"report.html", "map.png", "taste"}  #: made again from the rest


class Backup:
    """The backup of the run in folder `root`, below `backup_dir`, in a folder of the run's name."""

    def __init__(self, root: Path, backup_dir: str, clock: Clock = time.monotonic) -> None:
        try:
            self.root, self.folder = Path(root), Path(backup_dir).expanduser() / Path(root).name
            inside = self.folder.resolve().is_relative_to(self.root.resolve())
        except (OSError, ValueError, RuntimeError) as error:  # links in a circle, no home folder
            raise InputError(f"backup_dir: {backup_dir}: {error}. Name another folder") from error
        self._clock, self._due, self._failed = clock, clock() + EVERY, 0
        if inside:
            raise InputError(f"backup_dir: {backup_dir} lies in the run folder itself: name a folder on another disk")

    def say_needed(self, size: int) -> None:
        """Say how much room the backup takes, and warn where it is not there. `size`: bytes of one snapshot."""
        free = atomic_files.free_bytes(self.folder)
        text = f"backups to {self.folder}: about {size / 1e6:,.0f} MB, twice that while one replaces another"
        missing = "" if free >= 2 * size else f"; only {free / 1e6:,.0f} MB are free there, so none may be made"
        note(f"{'warning' if missing else 'note'}: {text}{missing}")

    def save(self) -> bool:
        """Make a snapshot of the run as it is, in place of those before. What fails is a warning: the run goes on."""
        return self._save(None)

    def answered(self, *, now: bool = False) -> bool:
        """Back up what came since the last whole snapshot: answers, in the main. Call it after each one.

        Does so every minute, or less often where that would take more than a twentieth of the time; or `now`. After a
        backup that failed it waits twice as long as before it, and goes back to every minute once one succeeds.
        """
        began = self._clock()
        whole = self._whole() if now or began >= self._due else None
        if whole is None:
            return False
        done = self._save(whole, is_quiet=self._failed > 0)  # one warning is enough
        took = self._clock() - began
        if done and self._failed:
            note("backups are made again")
        self._failed = 0 if done else self._failed + 1
        self._due = began + took + max(EVERY, took / _SHARE) * 2**self._failed
        return done

    def _save(self, whole: Path | None, *, is_quiet: bool = False) -> bool:
        """Make a snapshot; of what differs from the snapshot `whole`, where one is given. `is_quiet`: no warning."""
        number = max((_number(path) for path in self._there()), default=0) + 1
        target = self.folder / f"snapshot-{number}"
        try:
            there = _contents(whole)[0] if whole is not None else {}
            files = {}
            for path in self._files():
                name = path.relative_to(self.root).as_posix()
                if name in there and there[name] == atomic_files.sha256_file(path):
                    files[name] = there[name]
                else:
                    files[name] = copy(path, target / name)
            if (replies := self._replies()).is_file():
                files[REPLIES] = _copy_lines(replies, target / REPLIES)
            on = {"on": whole.name} if whole is not None else {}
            content = json.dumps({"run": self.root.name, **on, "files": files}, indent=1).encode()
            _write(target / COMPLETE, content)
            if (target / COMPLETE).read_bytes() != content:
                raise OSError(f"{target / COMPLETE} does not read back as it was written")
        except (OSError, InputError) as error:
            if not is_quiet:
                note(f"warning: no backup was made: {error}. The run goes on; the backup before this one stays.")
            discard(target)
            return False
        for old in self._there():
            if _number(old) < number and old != whole:
                discard(old)
        return True

    def _whole(self) -> Path | None:
        """Return the newest snapshot that is complete by itself."""
        for snapshot in reversed(self._there()):
            with contextlib.suppress(OSError, InputError):
                if _contents(snapshot)[1] is None:
                    return snapshot
        return None

    def restore(self) -> bool:
        """Copy the newest whole snapshot into the run folder; False where there is none. manifest.json comes last."""
        for snapshot in reversed(self._there()):
            try:
                files, on = _contents(snapshot)
                found = {name: snapshot / name for name in files}
                if on is not None:
                    found |= {name: on / name for name, path in found.items() if not path.exists()}
                for name, digest in files.items():
                    if atomic_files.sha256_file(found[name]) != digest:
                        raise ValueError(f"{name} is not as it was written")
            except (OSError, ValueError) as error:  # an InputError is one
                note(f"warning: {snapshot} is skipped: {error}")
                continue
            for name in sorted(files, key=lambda name: name == "manifest.json"):
                with atomic_files.refusal(self.root / name):
                    if name == REPLIES:
                        _add_lines(found[name], self._replies())
                    else:
                        copy(found[name], self.root / name)
            note(f"the run is restored from {snapshot}")
            return True
        return False

    def take_back(self) -> None:
        """Remove from the run folder what `restore` has put there."""
        for path in self.root.iterdir():
            if not path.name.startswith("."):
                discard(path) if path.is_dir() else path.unlink()

    def _replies(self) -> Path:
        return self.root.parent / Path(REPLIES).name

    def _there(self) -> list[Path]:
        """Return the snapshots, whole or not, the oldest first."""
        found = [p for p in self.folder.glob("snapshot-*") if p.name.removeprefix("snapshot-").isdecimal()]
        return sorted(found, key=_number)

    def _files(self) -> list[Path]:
        """Return what a fresh machine needs: no report, of checkpoints what training may go on from."""
        manifest = json.loads((self.root / "manifest.json").read_text(encoding="utf-8"))
        train = manifest["phases"].get("train")
        goes_on = train is None or train.get("why") == "budget"  # with more minutes
        needed = checkpoints.needed(self.root / "checkpoints") if goes_on else []
        kept = []
        for path in sorted(self.root.rglob("*")):
            parts = path.relative_to(self.root).parts
            if not path.is_file() or parts[0] in _LEFT_OUT or any(part.startswith(".") for part in parts):
                continue
            if parts[0] == "checkpoints" and not any(each in path.parents for each in needed):
                continue
            kept.append(path)
        return kept


def copy(source: Path, target: Path) -> str:
    """Copy a file, read the copy back, and return its SHA-256; OSError where it is not the source's."""
    atomic_files.touch("write", target)
    make_folder(target.parent)
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())
    digest = atomic_files.sha256_file(target)
    if digest != atomic_files.sha256_file(source):
        raise OSError(f"{target} does not read back as {source.name}")
    return digest


def _copy_lines(source: Path, target: Path) -> str:
    """Copy the whole lines of a file to which others may be adding; else as copy()."""
    content = source.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    _write(target, content)
    if target.read_bytes() != content:
        raise OSError(f"{target} does not read back as {source.name}")
    return hashlib.sha256(content).hexdigest()


def _add_lines(source: Path, target: Path) -> None:
    """Add a file's lines to another's, which may be absent. A reply that stands there twice counts once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as file:
        file.write((b"\n" if file.tell() else b"") + source.read_bytes())


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


def _contents(snapshot: Path) -> tuple[dict[str, str], Path | None]:
    """Return {name: SHA-256} of a complete snapshot, and the one that it completes, if any.

    InputError for one that is not complete, or whose names lead out of it.
    """
    content = json_object(snapshot / COMPLETE, remedy="It was never finished.")
    files, on = content.get("files"), content.get("on")
    if not isinstance(files, dict) or "manifest.json" not in files:
        raise InputError(f"{snapshot / COMPLETE}: names no files of a run")
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise InputError(f"{snapshot / COMPLETE}: {name!r} leads out of the run folder")
    if on is not None and not re.fullmatch(r"snapshot-\d+", str(on)):
        raise InputError(f"{snapshot / COMPLETE}: {on!r} is no snapshot")
    return files, snapshot.with_name(str(on)) if on is not None else None


def _write(path: Path, content: bytes) -> None:
    atomic_files.touch("write", path)
    make_folder(path.parent)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _number(snapshot: Path) -> int:
    return int(snapshot.name.removeprefix("snapshot-"))
