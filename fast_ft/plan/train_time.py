"""How long training takes, stage by stage: its steps, and the validation loss that is measured between them.

Pure arithmetic, for one end of a card's rates at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fast_ft.common.minutes import Measurements
from fast_ft.hub.families import ModelShape
from fast_ft.plan import cost_model
from fast_ft.plan.plans import step_seconds, widths_of
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.plan.training_work import Rates, Training


@dataclass(frozen=True)
class TrainMinutes:
    """Minutes of each stage, all in all, and of all `measurements` of the validation loss, which are among them."""

    stages: list[float]
    validation: float
    measurements: int


def train_minutes(
    shape: ModelShape,
    training: Training,
    plan: TrainPlan,
    stages: Sequence[Sequence[Sequence[int]]],
    validation: Sequence[int],
    eval_steps: int | None,
    rates: Rates,
) -> TrainMinutes:
    """Return the predicted minutes of training.

    `stages` holds the token counts of the rows of each step of each stage; `validation` those of the validation rows,
    whose loss is measured at each stage's end and every `eval_steps` steps.
    """
    after = Measurements.over(validation, [len(stage) for stage in stages], eval_steps).after
    once = validation_seconds(shape, training, plan, validation, rates)
    ends = [0, *itertools.accumulate(map(len, stages))]
    times = [sum(begun < step <= end for step in after) for begun, end in itertools.pairwise(ends)]
    steps = [sum(step_seconds(shape, training, plan, step, rates) for step in stage) for stage in stages]
    minutes = [(taken + count * once) / 60 for taken, count in zip(steps, times, strict=True)]
    return TrainMinutes(minutes, len(after) * once / 60, len(after))


def validation_seconds(
    shape: ModelShape, training: Training, plan: TrainPlan, lengths: Sequence[int], rates: Rates
) -> float:
    """Return the predicted seconds of one measurement over rows of these token counts.

    The plan's passes are run forward only and without graphs, and each one's loss is waited for.
    """
    row = sum(n * n for n in lengths) / max(1, sum(lengths))
    widths = widths_of(replace(plan, capture=False), lengths)
    passes = [cost_model.forward_seconds(shape, training, rates, each, row=row) for each in widths]
    return sum(max(each.card, each.host) for each in passes)
