"""Files and folders that appear whole or not at all: written beside, flushed to the disk, renamed into place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fast_ft.common.errors import InputError
from fast_ft.common.folders import guard, make_folder

# What a disk or its owner refuses. Any other OSError is a bug, and keeps its traceback.
_REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EBUSY, errno.EINVAL, errno.ESTALE, errno.ENOTCONN,
}  # fmt: skip

#: Called with (what, path) before anything touches the disk: "write", "rename", "append". Tests alone set it, to fail,
#: kill or count; it is the module's, since writes come from everywhere.
before: Callable[[str, Path], object] = lambda what, path: None  # noqa: E731


def touch(what: str, path: Path) -> None:
    """Let the guards of folders, and a test, refuse what is about to be done. Call it before each write or rename."""
    guard(path)
    before(what, path)


def _beside(path: Path) -> Path:
    """Return where this thread writes what takes the place of `path`: two threads may write one file."""
    return path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.new"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises InputError if the disk refuses; the old file is then untouched."""
    path = Path(path)
    with refusal(path):
        guard(path)  # before a folder that was moved away is made again
        make_folder(path.parent)
        beside = _beside(path)
        try:
            touch("write", path)
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            touch("rename", path)
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as write_bytes does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON, indented, as write_bytes does. NaN and infinity raise ValueError: they are no JSON."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Return what write_json writes."""
    return _json(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a path to write a large file to, piece by piece; on leaving the file takes the place of `path`, whole.

    If the body raises, `path` stays as it was. Raises InputError for a full or read-only disk, whoever reports it.
    """
    path = Path(path)
    beside = _beside(path)
    with refusal(path):
        make_folder(path.parent)
        touch("write", path)
        try:
            yield beside
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            touch("rename", path)
            beside.replace(path)
        except BaseException:
            _remove(beside)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on leaving it takes the place of `path`, whole.

    If the body raises, `path` stays as it was. Raises InputError for a full or read-only disk, whoever reports it.
    """
    path = Path(path)
    beside = _beside(path)
    old = path.parent / f".{path.name}.old"
    with refusal(path):
        _remove(beside)
        touch("write", path)
        make_folder(beside)
        try:
            yield beside
            touch("rename", path)
            for item in sorted(beside.rglob("*")):
                if item.is_file():
                    with item.open("rb") as file:
                        os.fsync(file.fileno())
            # A full folder cannot be renamed over another, so the old one steps aside. See `recover`.
            if path.exists():
                _remove(old)
                path.rename(old)
            try:
                touch("swap", path)
                beside.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            _sync_folder(path.parent)
        except BaseException:
            _remove(beside)
            raise
        _remove(old)


def move(path: Path, to: Path) -> None:
    """Rename a file within its folder."""
    with refusal(to):
        touch("rename", to)
        path.replace(to)
        _sync_folder(to.parent)


class Lines:
    """A file of JSON lines that grows by whole lines, to be used in a with statement.

    A line that the disk refuses leaves no part of itself, and raises InputError.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with refusal(self.path):
            touch("append", self.path)
            self._file = self.path.open("ab", buffering=0)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, value: object) -> None:
        """Append one value. NaN is written as NaN: a log keeps what was measured."""
        append(self._file, self.path, value)

    def keep(self, count: int) -> list[Any]:
        """Cut the file after its first `count` lines, and return the values of the lines that went, where whole."""
        lines = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        with refusal(self.path):
            touch("append", self.path)
            self._file.truncate(sum(map(len, lines[:count])))
        gone = []
        for line in lines[count:]:
            with contextlib.suppress(ValueError, RecursionError):  # the power may have failed in the middle of it
                gone.append(json.loads(line))
        return gone

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises InputError where the disk refuses."""
        with refusal(self.path):
            os.fsync(self._file.fileno())


def append(file: IO[bytes], path: Path, value: object) -> None:
    """Append JSON's whole line, or none of it, to `path`, open unbuffered as `file`. InputError: the disk refuses."""
    line = memoryview(_json(json.dumps(value, ensure_ascii=False)))
    end = os.fstat(file.fileno()).st_size
    with refusal(path):
        try:
            touch("append", path)
            while line:
                line = line[file.write(line) :]  # a full disk takes a part first
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _json(text: str) -> bytes:
    """Return JSON text as a line of UTF-8; half a character, which UTF-8 cannot hold, is escaped as JSON does it."""
    return (text + "\n").encode("utf-8", "backslashreplace")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise InputError where fewer than `needed` bytes are free in an existing folder."""
    free = free_bytes(folder)
    if free < needed:
        raise InputError(
            f"{folder}: {what} need about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free there. Free some "
            "space, or choose an output_dir on another disk"
        )


def free_bytes(folder: Path) -> int:
    """Return the bytes that may still be written in a folder."""
    return shutil.disk_usage(folder).free


def recover(root: Path) -> None:
    """Repair, under `root`, what a crash in the middle of a write left. Call it before a run goes on."""
    for old in list(root.rglob(".*.old")):
        target = old.with_name(old.name[1 : -len(".old")])
        if target.exists():
            _remove(old)
        else:
            old.rename(target)
    for beside in list(root.rglob(".*.new")):
        _remove(beside)


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256 in hex, or a folder's: over the names and contents of its files, in order of name."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for item in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{item.relative_to(path).as_posix()}\0{sha256_file(item)}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def refusal(path: Path) -> Iterator[None]:
    """Turn what a disk or its owner refuses within, while `path` is written, into InputError with a remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        guard(path)  # a folder that was moved away explains the error
        # safetensors and pyarrow wrap the system's error in types of their own; its text stays.
        full = "No space left on device" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not (isinstance(error, OSError) and error.errno in _REFUSED):
            raise
        reason = "the disk is full" if full else str(getattr(error, "strerror", error)).lower()
        remedy = "Free some space" if full else "Make it writable, or choose another output_dir"
        if getattr(error, "errno", None) == errno.EFBIG:
            remedy = "Raise the limit that `ulimit -f` shows, or choose an output_dir on another disk"
        raise InputError(
            f"cannot write {path}: {reason}. What was there is as it was. {remedy}, then run the command again"
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # else a rename may be lost when the power fails; Windows has no such call
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
