"""What the driver of a sweep asks of a worker, and what comes back: two values that a pipe or Ray can carry."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fast_ft.recipe.schema import Recipe


@dataclass(frozen=True)
class TrialTask:
    """What a worker does next: train `recipe` (its output_dir is the run folder) and answer its data.test.

    trained: a run folder whose training was the same. stop_after: train up to that step only, and answer the first
    `prompts` into stage-answers/<step>/pred.json.
    """

    recipe: Recipe
    name: str  #: the recipe file's
    trained: Path | None = None
    stop_after: int | None = None
    prompts: int = 0

    @property
    def root(self) -> Path:
        """The trial's run folder."""
        return Path(self.recipe.output_dir)


@dataclass(frozen=True)
class TrialResult:
    """What became of a task. `problem`: why there is no answer, in a sentence; `stopped`: it was interrupted.

    traceback: of a bug; "" where the recipe or the machine was at fault.
    seconds: {load, steps, steps_before, train, answer, all}; train and answer may hold load; steps_before are the steps
    that an earlier task took. times: {first_step, trained}, in seconds
    since 1970.
    """

    problem: str | None = None
    traceback: str = ""
    stopped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    prompts: int = 0


class TaskRunner(Protocol):
    """Does tasks, one after another: a TrialRunner."""

    def run(self, task: TrialTask) -> TrialResult:
        """Do a task, and say what became of it."""
