"""One run in a folder at a time: a lease that its holder renews every 15 s, and that a dead holder cannot keep.

The lease is the file `.lease` in the run folder. It names host, boot, process and start, and counts beats. A folder may
lie on a Drive that several machines mount, so another machine's clock is never believed: either the folder's own clock
(the age of the lease beside that of a file just written there) says that no beat came for 60 s, or this process watches
the count itself. On one machine a holder whose process has ended is told at once, by process id, boot and start time.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files, folders, processes
from fast_ft.common.console import note
from fast_ft.common.errors import InputError

NAME = ".lease"
BEAT = 15.0  #: seconds between two beats
STALE = 60.0  #: seconds without a beat, after which the holder counts as dead


class Lease:
    """A held lease. `check` raises InputError once the folder is another process's, or has another name."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content, self.lost = path, content, False
        self._folder: int | None = None  # the folder itself, whatever its name; no such thing on Windows
        with contextlib.suppress(OSError):
            self._folder = os.open(path.parent, os.O_RDONLY)

    def check(self) -> None:
        """Raise InputError where the folder was renamed, or is another's now: this process slept for long, say."""
        there = _read(self.path)
        if not self.lost and (there is None or there.get("token") == self.content["token"]) and self.path.exists():
            return
        if self._moved():
            now = self._name_now()
            to = f"renamed to {now}" if now is not None else "moved or deleted"
            where = "What it had saved is there" if now is not None else "What it had saved went with it"
            raise InputError(
                f"{self.path.parent} was {to} while this run was writing to it, so the run stops. {where}. Give the "
                "folder its former name again, or set output_dir to its new one; then the same command goes on"
            )
        if self.lost or there is not None:
            raise InputError(
                f"{self.path.parent}: another process took this run over while this one gave no sign of life. "
                "What it had saved is there; this one stops."
            )

    def beat(self) -> None:
        """Count one beat, unless the lease is another's by now."""
        there = _read(self.path)
        if self._moved() or (there is not None and there.get("token") != self.content["token"]):
            self.lost = True
            return
        self.content["beat"] += 1
        content = _text(self.content).encode()
        with contextlib.suppress(OSError):
            # In place: a Drive's rename may leave two files of one name. In one write, and cut to length only after it:
            # whoever reads meanwhile finds this beat or the last one, and never an empty lease. All are of one length:
            # who has read up to the end of the last beat's must not find one more byte there.
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                os.write(file, content)
                os.ftruncate(file, len(content))
            finally:
                os.close(file)

    def give_back(self) -> None:
        """Remove the lease, wherever the folder is by now."""
        path = self.path
        if self._moved() and (now := self._name_now()) is not None:
            path = now / NAME
        there = _read(path)
        if there is not None and there.get("token") == self.content["token"]:
            path.unlink(missing_ok=True)
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def _moved(self) -> bool:
        """Tell whether the folder's name leads to nothing now, or to another folder."""
        try:
            there = self.path.parent.stat()
        except OSError:
            return True
        return self._folder is not None and not os.path.samestat(there, os.fstat(self._folder))

    def _name_now(self) -> Path | None:
        """Return the folder's present name, where the system tells it."""
        try:
            name = Path(f"/proc/self/fd/{self._folder}").readlink()
            return name if os.path.samestat(name.stat(), os.fstat(self._folder or 0)) else None
        except OSError:
            return None


@contextlib.contextmanager
def hold(
    root: Path, *, every: float = BEAT, stale: float = STALE, sleep: Callable[[float], object] = time.sleep
) -> Iterator[Lease]:
    """Hold the run folder `root`, made if need be; InputError where a living process holds it, saying which.

    A folder that was made for the lease alone, and stayed empty, is removed again.
    """
    root = Path(root)
    made = folders.make_folder(root)
    try:
        lease = _acquire(root / NAME, stale, sleep)
        ended = threading.Event()

        def beats() -> None:
            """Beat until the run ends, or the lease is lost."""
            while not ended.wait(every) and not lease.lost:
                lease.beat()

        thread = threading.Thread(target=beats, name="lease", daemon=True)
        thread.start()
        try:
            with folders.guarded(root, lease.check):
                yield lease
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                lease.give_back()
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()  # refuses where something is in it


def is_held(root: Path) -> bool:
    """Return whether a living process holds `root`, as a look tells.

    Of another machine's lease, and of one that is cut off in writing, its age by this clock tells.
    """
    holder = _read(root / NAME)
    if holder is not None and (holds := _holds(root, holder)) is not None:
        return holds
    with contextlib.suppress(OSError):
        return time.time() - (root / NAME).stat().st_mtime < 10 * STALE  # clocks differ
    return False


def _acquire(path: Path, stale: float, sleep: Callable[[float], object]) -> Lease:
    content = _self(path.parent)
    for _ in range(3):
        try:
            with atomic_files.refusal(path):
                atomic_files.touch("write", path)
                with path.open("x", encoding="utf-8") as file:
                    file.write(_text(content))
            return Lease(path, content)
        except InputError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
        holder = _read(path) or {}
        if _alive(path, holder, stale, sleep):
            break
        aside = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
        try:
            path.rename(aside)
        except OSError:
            path.unlink(missing_ok=True)  # gone already, or a folder that renames nothing
        if (_read(aside) or holder).get("token") != holder.get("token"):
            aside.rename(path)  # somebody else found it dead too, and was faster: this is theirs
            continue
        aside.unlink(missing_ok=True)
        if holder and _lives(holder):
            note(f"note: {path.parent} is a copy of a folder that {_name(holder)} holds; it is a run of its own now")
        elif holder:
            note(f"note: {_name(holder)} left this run behind without ending it; it is taken over")
    raise InputError(
        f"{path.parent} is in use by {_name(_read(path) or {})}. One run in a folder at a time: wait for it or end it; "
        "or give this one its own output_dir"
    )


def _alive(path: Path, holder: dict[str, Any], stale: float, sleep: Callable[[float], object]) -> bool:
    """Tell whether the lease's holder lives; may watch the file for up to `stale` seconds."""
    if (holds := _holds(path.parent, holder)) is not None:
        return holds
    if (age := _age(path)) is None or age > stale:
        return False
    note(f"note: {path.parent} may be in use by {_name(holder)}: watching for a sign of life, {stale:.0f} s at most")
    for _ in range(round(stale)):
        sleep(1.0)
        there = _read(path)
        if not path.exists():
            return False
        if there is not None and (there.get("token"), there.get("beat")) != (holder.get("token"), holder.get("beat")):
            return True
    return False


def _holds(root: Path, holder: dict[str, Any]) -> bool | None:
    """Tell whether a process of this machine holds the folder itself, no copy of it; None where that is unknown."""
    lives = _lives(holder)
    return lives and ("folder" not in holder or processes.has_open(holder["pid"], root))


def _lives(holder: dict[str, Any]) -> bool | None:
    """Tell whether the lease's holder is a process that runs on this machine; None where that cannot be told."""
    boot = processes.boot()
    if boot is None or (holder.get("host"), holder.get("boot")) != (socket.gethostname(), boot):
        return None
    return processes.started(holder.get("pid", 0)) == holder.get("process")


def _age(path: Path) -> float | None:
    """Return the seconds since the last beat by the folder's own clock; None where the lease has gone."""
    probe = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
    try:
        with atomic_files.refusal(path):
            probe.write_bytes(b"")
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _self(folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder.resolve()),
        "host": socket.gethostname(),
        "boot": processes.boot(),
        "pid": os.getpid(),
        "process": processes.started(os.getpid()),
        "since": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }


def _text(content: dict[str, Any]) -> str:
    """Return a lease's JSON, as long at each beat as at any other."""
    return json.dumps(content) + " " * (20 - len(str(content["beat"])))


def _read(path: Path) -> dict[str, Any] | None:
    """Return the lease's content, or None where it cannot be read at this moment."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"
