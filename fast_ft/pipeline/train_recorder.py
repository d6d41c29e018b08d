"""What a training session tells, written into the run folder: the log, checkpoints, the plan."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files, out_of_memory, processes
from fast_ft.common.console import Bar, note
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.pipeline.set_up import keep_plan
from fast_ft.plan.run_plan import RunPlan, TrainPlan
from fast_ft.run.folder import RunDir
from fast_ft.train import checkpoints
from fast_ft.train.task import TrainCallbacks

SMOOTHED = 10  #: steps over which the bar's loss and speed are means, as the picture's loss is


def start_up(watch: Stopwatch, step_seconds: float) -> dict[str, float]:
    """Return the seconds from the command to its first step, which has just ended after `step_seconds`, by parts.

    total: all of them, from the start of the process. before: those before the phase that trains. The others are the
    watch's names.
    """
    parts = watch.seconds()
    parts["other"] = parts.get("other", 0.0) - step_seconds
    since = processes.age()
    found = {"total": since - step_seconds, "before": since - sum(parts.values()) - step_seconds} if since else {}
    return {name: round(seconds, 3) for name, seconds in (found | parts).items()}


def _import_for_the_end() -> None:
    """Import what draws the picture behind the last step, which takes a second, while the card computes."""
    with contextlib.suppress(ImportError):  # said where it is needed
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401


def _unsaved(
    save: Callable[[Path, int, Callable[[Path], None]], object], root: Path, step: int, write: Callable[[Path], None]
) -> str | None:
    """Save and return None, or return that there was no memory for it."""
    try:
        save(root, step, write)
    except Exception as error:
        if not out_of_memory.is_short(error):
            raise
        return "out of memory, in the smallest pieces too"
    return None


class Recorder:
    """Writes what a training session tells into the run folder, and shows it on the bar."""

    def __init__(
        self,
        folder: RunDir,
        plan: RunPlan,
        log: atomic_files.Lines,
        lines: list[dict[str, Any]],
        bar: Bar,
        watch: Stopwatch,
    ) -> None:
        self.folder, self.plan, self.log, self.lines, self.bar, self.watch = folder, plan, log, lines, bar, watch
        self._has_begun = False
        self.validation = ""  #: what the bar shows of the last validation loss

    def callbacks(self) -> TrainCallbacks:
        """Return what to give to the session."""
        return TrainCallbacks(
            on_step=self.add_step,
            on_checkpoint=self.save_checkpoint,
            on_plan=self.keep_plan,
            on_best=self.save_best,
            on_rewind=self.rewind,
            find_checkpoint=self.find_checkpoint,
            watch=self.watch,
        )

    def keep_plan(self, plan: TrainPlan) -> None:
        """Write the plan with which training goes on, beside the one for answers."""
        keep_plan(self.folder, replace(self.plan, train=plan))

    def add_step(self, line: dict[str, Any]) -> None:
        """Add a step's line to the log; of this command's first step, note what came before it."""
        if not self._has_begun:
            self._has_begun = True
            threading.Thread(target=_import_for_the_end, name="imports", daemon=True).start()
            self.folder.update(start_up=start_up(self.watch, line["seconds"]))
        self.log.add(line)
        self.lines.append(line)
        last = self.lines[-SMOOTHED:]
        speed = sum(each["tokens"] for each in last) / max(sum(each["seconds"] for each in last), 1e-9)
        memory = f"  {line['gib']:.1f} GiB" if line["gib"] else ""
        if "validation_loss" in line:
            self.validation = f"  validation {line['validation_loss']:.3f}"
        facts = f"mean loss {self._mean_loss():.3f}{self.validation}  {speed:,.0f} tokens/s{memory}"
        self.bar.advance(1, f"{line['stage']}  {facts}")

    def _mean_loss(self) -> float:
        """Return the mean loss of the last steps: one step's depends on which rows it saw."""
        finite = [line["loss"] for line in self.lines[-SMOOTHED:] if math.isfinite(line["loss"])]
        return sum(finite) / len(finite) if finite else math.nan

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> str | None:
        """Let `write` fill the checkpoint of this step. Return what to note where there is no memory for it."""
        self.log.sync()  # a checkpoint's steps are in the log, whatever happens to the machine
        if problem := _unsaved(checkpoints.save, self.folder.checkpoints, step, write):
            text = f"no checkpoint after step {step}: {problem}"
            note(f"warning: {text}. Training goes on; the next checkpoint holds these steps")
            return text
        self.folder.on_saved()
        return None

    def save_best(self, step: int, write: Callable[[Path], None]) -> str | None:
        """Let `write` fill the folder of the weights of the least validation loss. Returns as save_checkpoint does."""
        if problem := _unsaved(checkpoints.save_best, self.folder.checkpoints, step, write):
            text = f"the weights after step {step}, of the least validation loss so far, were not kept: {problem}"
            note(f"warning: {text}. Training goes on")
            return text
        return None

    def find_checkpoint(self, before: int) -> Path | None:
        """Return the newest whole checkpoint of a step below `before`, or None."""
        return checkpoints.settle(self.folder.checkpoints, before=before)

    def rewind(self, step: int) -> None:
        """Move the lines of the steps after this one from the log to diverged.jsonl."""
        with atomic_files.Lines(self.folder.diverged) as aside:
            for line in self.log.keep(step):
                aside.add(line)
        self.bar.advance(step - len(self.lines))
        del self.lines[step:]
