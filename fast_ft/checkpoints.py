"""The checkpoints of a run: checkpoints/step-12, the newest two kept, each told whole by its digests.

A new one appears whole before an old one is removed. One whose digests fail is passed over for the one before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from fast_ft import atomic, state
from fast_ft.progress import note

KEPT = 2


def save(root: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill the checkpoint of this step, then remove all but the newest two, the oldest first."""
    path = root / f"step-{step}"
    with atomic.replace_folder(path) as target:
        write(target)
    for old in _there(root)[:-KEPT]:
        remove(old)
    return path


def newest(root: Path, *, before: int | None = None) -> Path | None:
    """Return the newest whole checkpoint (of a step below `before`), or None. Those after it are removed.

    What is removed is either damaged, which is said, or beyond the step from which the run goes on.
    """
    for path in reversed(_there(root)):
        if before is None or step(path) < before:
            problem = state.problem(path)
            if problem is None:
                return path
            note(f"warning: {path} is passed over: {problem}")
        remove(path)
    return None


def step(path: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(path.name.removeprefix("step-"))


def remove(path: Path) -> None:
    """Remove a checkpoint, its state.json first: what is half removed is then none any more."""
    (path / "state.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _there(root: Path) -> list[Path]:
    """Return the checkpoints, the oldest first."""
    found = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step)
