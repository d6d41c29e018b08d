"""What a judge has answered, kept for good: verdicts.jsonl beside the run folders, one line a reply.

A reply costs money and time, so it is on the disk before anything is made of it, and no question is asked twice: not
by another run in the same folder, nor after a kill. Beside the runs, not in a cache folder that a clean-up may empty.
A line holds the reply and a hash of what was asked, never the question, and nothing of the credentials.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError

FILE = "verdicts.jsonl"
COUNTS = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True)
class KeptReply:
    """A judge's reply as it came. `model`: the name that the server gave; token counts are the server's, or None.

    ending: how it ended, as judge/completion.py says.
    """

    key: str
    reply: str
    model: str
    rubric: str
    prompt_tokens: int | None
    completion_tokens: int | None
    ending: str = ""


def content_key(**content: Any) -> str:
    """Return 64 hex digits for what is asked: equal content, equal key."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class ReplyCache:
    """The replies in `path`, and those in the files `also`, which are only read.

    To write, use `with cache.locked():` around it; a second command that judges waits there for the first.
    """

    def __init__(self, path: Path, also: Sequence[Path] = ()) -> None:
        self.path = path
        self._also = [other for other in also if other.resolve() != path.resolve()]
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._there: dict[str, KeptReply] = {}
        self._read()

    def __len__(self) -> int:
        return len(self._there)

    def get(self, key: str) -> KeptReply | None:
        """Return the reply to what has this key, or None."""
        return self._there.get(key)

    def forget(self, keys: set[str]) -> None:
        """Leave these replies out of what `get` returns; a later line of the file then takes their place."""
        for key in keys:
            self._there.pop(key, None)

    def add(self, verdict: KeptReply) -> None:
        """Put a reply on the disk, then among what `get` returns."""
        with self._lock:
            assert self._file is not None, "verdicts are written under locked()"
            atomic_files.append(self._file, self.path, asdict(verdict))
            with atomic_files.refusal(self.path):
                os.fsync(self._file.fileno())
            self._there[verdict.key] = verdict

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Open the file for appending, alone; read what another command has added meanwhile."""
        if self.path.is_symlink() and self.path.resolve().parent != self.path.parent.resolve():
            raise InputError(
                f"{self.path} is a link to {self.path.resolve()}: replies would be written there. Put the file itself "
                "beside the runs, or take the link away"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}. Make its folder writable") from None
        with file:
            _lock_file(file, self.path)
            self._read()
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill in the middle of a line
                    file.write(b"\n")
            self._file = file
            try:
                yield
            finally:
                with self._lock:
                    self._file = None

    def _read(self) -> None:
        for path in (*self._also, self.path):
            if not path.is_file():
                continue
            for line in path.read_bytes().splitlines():
                if (verdict := parse(line)) is not None:
                    self._there[verdict.key] = verdict


def parse(line: bytes) -> KeptReply | None:
    """Return a line's reply, which may have been written by any version; None where the line holds none."""
    try:
        content = json.loads(line.decode("utf-8", "surrogatepass"))
        key, reply = content["key"], content["reply"]
    except (ValueError, TypeError, LookupError, RecursionError):  # half a line, or no reply's
        return None
    if not isinstance(key, str) or not isinstance(reply, str):
        return None
    texts = (value if isinstance(value := content.get(name), str) else "" for name in ("model", "rubric", "ending"))
    model, rubric, ending = texts
    prompt, completion = (value if type(value := content.get(name)) is int else None for name in COUNTS)
    return KeptReply(key, reply, model, rubric, prompt, completion, ending)


def _lock_file(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two commands at once may ask the same twice
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(f"another command judges with {path}: waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks, such as some network drives
        return
