"""The page of `watch RUN_DIR`: how far a run is, from the files that are in its folder. It writes nothing there."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.report import run_data
from fast_ft.report.html import page
from fast_ft.report.run_names import given
from fast_ft.run import lock, time_spent
from fast_ft.run.folder import RunDir

ABOUT = "This page shows how far a run is. It holds no training rows."
RECENT = 20  #: steps that tell the speed and the time left
_PHASES = (("train", "training"), ("generate", "answers"), ("judge", "scores"))


def watch_page(folder: RunDir) -> str:
    """Return the page; it asks `watcher`'s function for what is new. Raises InputError for an unreadable manifest."""
    run = run_data.read_run(folder)
    sections = [
        ("now", "Now", '<div id="watch"></div>'),
        ("training", "Training", '<div id="curves"></div>'),
    ]
    facts = {"watch": watcher(folder)({}), "live": True}
    return page(f"{given(run) or run.name} · fast_ft", ABOUT, sections, facts, {})


def watcher(folder: RunDir) -> Callable[[Any], dict[str, Any]]:
    """Return what answers the page: the run's state, and its curves where they are not those that the page has."""
    last: list[run_data.Run] = []

    def answered(asked: Any) -> dict[str, Any]:
        """Read the folder. A file that is just being written is read again at the next question."""
        with contextlib.suppress(InputError, OSError):
            last[:] = [run_data.read_run(folder)]
        if not last:
            return {"problem": f"{folder.root}: nothing can be read there."}
        run = last[0]
        found = {"figures": _figures(folder, run), "says": _says(folder, run), "steps": len(run.lines)}
        seen = asked.get("steps") if isinstance(asked, dict) else None
        return found if seen == len(run.lines) else {**found, "curves": run_data.curves(run)}

    return answered


def planned_steps(run: run_data.Run) -> int | None:
    """Return how many optimizer steps the training has in all, or None before its rows are chosen."""
    section = run.recipe.get("train", {})
    batch, epochs, most = (section.get(key) for key in ("effective_batch_size", "num_train_epochs", "max_steps"))
    stages = run.recipe.get("curriculum", {}).get("stages") or [{}]
    if not run.manifest.stages or len(stages) != len(run.manifest.stages) or not batch or not epochs:
        return None
    each = zip(run.manifest.stages, stages, strict=True)
    total = sum(math.ceil(len(rows.ids) / batch) * (stage.get("num_train_epochs") or epochs) for rows, stage in each)
    return min(total, most) if most else total


def seconds_left(run: run_data.Run) -> float | None:
    """Return the seconds that the steps to come take at the recent steps' median; None where that is not known."""
    total, recent = planned_steps(run), [line["seconds"] for line in run.lines[-RECENT:] if line.get("seconds")]
    if "train" in run.manifest.phases or total is None or not recent:
        return None
    return max(0, total - len(run.lines)) * statistics.median(recent)


def _figures(folder: RunDir, run: run_data.Run) -> list[tuple[str, str]]:
    """Return (what, value) of loss, speed, memory and time."""
    total, left, lines = planned_steps(run), seconds_left(run), run.lines[-RECENT:]
    found = [("steps", f"{len(run.lines):,}" + (f" of {total:,}" if total else ""))]
    losses = [line["loss"] for line in lines if math.isfinite(line["loss"])]
    if losses:
        found.append((f"loss, mean of {len(losses)} steps", f"{statistics.fmean(losses):.2f}"))
    seconds = sum(line.get("seconds") or 0.0 for line in lines)
    if seconds:
        found.append(("tokens a second", f"{sum(line.get('tokens') or 0 for line in lines) / seconds:,.0f}"))
    memory, cap = max((line.get("gib") or 0.0 for line in run.lines), default=0.0), run_data.memory_cap(run)
    if memory:
        found.append(("GPU memory, GiB", f"{memory:.1f}" + (f" of {cap:.1f}" if cap else "")))
    if left is not None:
        found.append(("training time left", _minutes(left)))
    if "generate" not in run.manifest.phases and (answers := _lines_of(folder.pred_partial)):
        found.append(("answers so far", f"{answers:,}"))
    return [*found, ("minutes of finished phases", time_spent.shown(run.minutes))] if run.manifest.phases else found


def _says(folder: RunDir, run: run_data.Run) -> str:
    """Return what is done, what is under way, and when the folder changed last."""
    done = [name for phase, name in _PHASES if phase in run.manifest.phases]
    said = f"Done: {', '.join(done)}. " if done else ""
    if folder.report.is_file() and "generate" in run.manifest.phases:
        return f"{said}The run has ended; report.html in its folder has the whole of it."
    silent = time.time() - max((path.stat().st_mtime for path in _written(folder)), default=0.0)
    if not lock.is_held(folder.root):
        return f"{said}The run is not going on: no process holds its folder. Its command, given again, goes on."
    doing = next((name for phase, name in _PHASES if phase not in run.manifest.phases), "the report")
    return f"{said}Under way: {doing}. Last change: {_minutes(silent)} ago."


def _written(folder: RunDir) -> list[Path]:
    paths = (folder.manifest_path, folder.log, folder.plan, folder.pred_partial, folder.base_partial, folder.scores)
    return [path for path in paths if path.is_file()]


def _lines_of(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
