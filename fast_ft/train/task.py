"""What a session trains, and whom it tells about it: values that `pipeline` makes without loading torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.minutes import Measurements
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import EncodedRow
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainTask:
    """All stages, since one schedule spans them, and the parts of the recipe that say how they are trained.

    `pad_id` fills a pass up to its width. Training stops after `stop_after` steps, counted over all stages (None: not
    before the end); the schedule stays that of the whole task. `validation` are rows whose loss is measured at each
    stage's end and every `eval_steps` steps.
    """

    jobs: Sequence[StageJob]
    section: schema.Train
    carry: schema.Carry
    seed: int
    pad_id: int
    stop_after: int | None = None
    validation: Sequence[EncodedRow] = ()

    @property
    def total(self) -> int:
        """The number of steps of all stages."""
        return sum(len(job.batches) for job in self.jobs)

    @property
    def step_lengths(self) -> list[list[int]]:
        """The token counts of each step's rows, over all stages."""
        return [lengths for job in self.jobs for lengths in job.lengths]

    @property
    def step_tokens(self) -> list[int]:
        """The tokens of each step, over all stages."""
        return [sum(lengths) for lengths in self.step_lengths]

    @property
    def longest(self) -> int:
        """The tokens of the longest row."""
        return max(len(row.input_ids) for job in self.jobs for row in job.rows)

    @property
    def most_rows(self) -> int:
        """The rows of the largest effective batch."""
        return max(len(batch) for job in self.jobs for batch in job.batches)

    @cached_property
    def measurements(self) -> Measurements:
        """When the validation loss is measured, and over how many tokens."""
        lengths, steps = [len(row.input_ids) for row in self.validation], [len(job.batches) for job in self.jobs]
        return Measurements.over(lengths, steps, self.section.eval_steps)


@dataclass(frozen=True)
class StepFacts:
    """What a step saw: its tokens, those of them that are trained, and its loss (0-d) in nats per trained token."""

    tokens: int
    supervised_tokens: int
    loss: Tensor


def ignore(*_: object) -> None:
    """Do nothing: the callback of whoever does not want to know."""


@dataclass(frozen=True)
class TrainCallbacks:
    """What a session tells its caller, and the one thing that it asks.

    on_step(entry): a step has ended; `entry` is its line in the log.
    on_checkpoint(step, write): a checkpoint is due after `step`; `write` fills a folder with it. Returns why it was not
        saved, or None.
    on_plan(plan): the plan was replaced by a thriftier one, which a resumed run has to follow.
    on_best(step, write): the weights after `step` have the least validation loss so far, and train.load_best is set;
        `write` fills a folder with them. Returns why they were not kept, or None.
    on_rewind(step): training goes back to the state after `step`; what came later is trained again.
    find_checkpoint(step): returns the newest whole checkpoint of a step below `step`, or None.
    watch: counts the seconds of making a session, of its trainers and of rehearsing passes, before the first step.
    """

    on_step: Callable[[dict[str, Any]], None] = ignore
    on_checkpoint: Callable[[int, Callable[[Path], None]], str | None] = ignore
    on_plan: Callable[[TrainPlan], None] = ignore
    on_best: Callable[[int, Callable[[Path], None]], str | None] = ignore
    on_rewind: Callable[[int], None] = ignore
    find_checkpoint: Callable[[int], Path | None] = ignore
    watch: Stopwatch = field(default_factory=Stopwatch)
