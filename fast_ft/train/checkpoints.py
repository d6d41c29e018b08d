"""The checkpoints of a run: checkpoints/step-12 and so on; the newest two are kept.

A new checkpoint appears whole before an old one is removed. A checkpoint that is not as its digests say is passed over
for the one before it. Where a budget brings the learning rate down early, the checkpoint from which it goes down is
kept too: with more minutes training goes on from there, as if there had been no budget.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.minutes import longer
from fast_ft.recipe import schema
from fast_ft.train import state

if TYPE_CHECKING:
    from torch import nn

KEPT = 2


@dataclass(frozen=True)
class ResumePoint:
    """From where training goes on: a checkpoint's folder (None: from the beginning), and how far it came.

    `state.seconds` are those of all steps up to `timed_until`, also where that is a later step.
    """

    folder: Path | None
    state: state.TrainState
    timed_until: int


def save(root: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill the checkpoint of this step, then remove all but the newest two, the oldest first."""
    path = root / f"step-{step}"
    with atomic_files.replace_folder(path) as target:
        write(target)
    _prune(root)
    return path


def save_best(root: Path, step: int, write: Callable[[Path], None]) -> None:
    """Let `write` fill best-<step>, the weights of the least validation loss so far.

    Former ones stay as long as a checkpoint names them: training may go back to it.
    """
    with atomic_files.replace_folder(best(root, step)) as target:
        write(target)


def best(root: Path, step: int) -> Path:
    """Return the folder with the weights after this step, which had the least validation loss."""
    return root / f"best-{step}"


def newest(root: Path) -> Path | None:
    """Return the newest whole checkpoint, or None. Nothing is removed: another process may be training here."""
    return next((path for path in reversed(_there(root)) if state.problem(path) is None), None)


def settle(root: Path, *, before: int | None = None) -> Path | None:
    """Return the newest whole checkpoint (of a step below `before`), or None, and make it the newest one of all.

    Checkpoints that are too old, not below `before` or damaged are removed; a warning names the damaged ones. It and
    the one before it stay. For the process that holds the run's lock.
    """
    _prune(root)  # a kill may have come before this was done
    for path in reversed(_there(root)):
        if before is None or step(path) < before:
            problem = state.problem(path)
            if problem is None:
                return path
            note(f"warning: {path} is skipped: {problem}")
        remove(path)
    return None


def resume_point(root: Path, minutes: float | None) -> ResumePoint:
    """Return from where training goes on within a budget of minutes.

    That is the newest checkpoint; but where a smaller budget brought the learning rate down, it is the one from which
    the rate went down. What was trained since then is trained again, and the adapter becomes that of a run without the
    smaller budget.
    """
    path = settle(root)
    if path is None:
        return ResumePoint(None, state.TrainState(), 0)
    done = state.read(path)
    turn = root / f"step-{done.anneal_from}"
    if done.stop_at is not None and longer(minutes, done.minutes) and turn.is_dir() and state.problem(turn) is None:
        settle(root, before=done.anneal_from + 1)  # removes what lies beyond
        return ResumePoint(turn, replace(state.read(turn), seconds=done.seconds), done.global_step)
    return ResumePoint(path, done, done.global_step)


def needed(root: Path) -> list[Path]:
    """Return the checkpoints from which a run may still go on: the newest, and the one at the full learning rate."""
    last = _there(root)[-1:]
    turns = [turn for path in last for turn in _turn(path) if turn != path]
    return [
        *last,
        *turns,
        *(best(root, each) for path in [*last, *turns] if path.is_dir() for each in _best_step(path)),
    ]


def size(model: nn.Module, section: schema.Train) -> int:
    """Return the bytes of one checkpoint: the adapter, and two numbers a weight, of 1 byte each in adamw_8bit."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return sum(p.numel() * (p.element_size() + (2 if section.optim == "adamw_8bit" else 8)) for p in weights)


def space(model: nn.Module, section: schema.Train, root: Path, *, timed: bool = False) -> tuple[int, str]:
    """Return the bytes that training will still write, and what they are for, as atomic_files.check_space takes them.

    Three checkpoints, since an old one goes when the new one is whole, and the adapter; what is there already is taken
    off. `timed`: there is a budget of minutes, and one more checkpoint where the learning rate begins to go down.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    there = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    needed = (
        (KEPT + 1 + timed) * size(model, section) + weights * (4 if section.load_best else 1) + 20_000_000
    )  # tokenizer, log, pictures, report
    kept = "three checkpoints, a fourth" if timed else "two checkpoints, a third"
    return max(0, needed - there), f"{kept} while it is written, adapter and report"


def step(path: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(path.name.removeprefix("step-"))


def remove(path: Path) -> None:
    """Remove a checkpoint, its state.json first: what is half removed then no longer counts as a checkpoint."""
    (path / "state.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _prune(root: Path) -> None:
    """Remove all checkpoints but the newest two and those that `_turn` names for them, the oldest first."""
    there = _there(root)
    kept = {*there[-KEPT:], *(turn for path in there[-KEPT:] for turn in _turn(path))}
    for old in there:
        if old not in kept:
            remove(old)
    named = {best(root, each) for path in kept if path.is_dir() for each in _best_step(path)}
    last = step(there[-1]) if there else 0
    for old in root.glob("best-*"):  # one of a later step may be named by the next checkpoint
        if old not in named and old.name.removeprefix("best-").isdecimal() and int(old.name[5:]) <= last:
            shutil.rmtree(old, ignore_errors=True)


def _best_step(path: Path) -> list[int]:
    try:
        found = state.read(path).best_step
    except InputError:
        return []
    return [] if found is None else [found]


def _turn(path: Path) -> list[Path]:
    """Return the checkpoint from which the learning rate of this one's run goes down early, if it does."""
    try:
        done = state.read(path)
    except InputError:  # settle() says so
        return []
    return [path.parent / f"step-{done.anneal_from}"] if done.stop_at is not None else []


def _there(root: Path) -> list[Path]:
    """Return the checkpoints, the oldest first."""
    found = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step)
