"""The checkpoints of a run: checkpoints/step-12, the newest two kept, each told whole by its digests.

A new one appears whole before an old one is removed. One whose digests fail is passed over for the one before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fast_ft import atomic, recipe, state
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
    """Return the newest whole checkpoint (of a step below `before`), or None; it and the one before stay.

    What is removed is too old, or beyond the step from which the run goes on, or damaged, which is said.
    """
    there = _there(root)
    for old in there[:-KEPT]:
        remove(old)  # a kill may have come before this was done
    for path in reversed(there[-KEPT:]):
        if before is None or step(path) < before:
            problem = state.problem(path)
            if problem is None:
                return path
            note(f"warning: {path} is passed over: {problem}")
        remove(path)
    return None


def size(model: Any, section: recipe.Train) -> int:
    """Return the bytes of one checkpoint: the adapter, and two numbers a weight, of 1 byte each in adamw_8bit."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return sum(p.numel() * (p.element_size() + (2 if section.optim == "adamw_8bit" else 8)) for p in weights)


def space(model: Any, section: recipe.Train, root: Path) -> tuple[int, str]:
    """Return the bytes that training will still write, and what they are for: an argument pair for atomic.check_space.

    Three checkpoints, since an old one goes when the new one is whole, and the adapter; what is there already is taken
    off.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    there = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    needed = (KEPT + 1) * size(model, section) + weights + 20_000_000  # tokenizer, log, pictures, report
    return max(0, needed - there), "two checkpoints, a third while it is written, adapter and report"


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
