"""A stage as training takes it: tokenised rows, and which of them each step sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fast_ft.common import seeds
from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.data import mixing
from fast_ft.data.curriculum import Stage
from fast_ft.data.encoding import EncodedRow
from fast_ft.recipe.steps import steps_of

#: Rows that a stage may see, each counted as often as it is seen: their order is drawn before training begins.
MOST_ROWS = 10_000_000


@dataclass(frozen=True)
class StageJob:
    """A stage, tokenised: `rows` in the stage's own order, and for each step a batch of indices into them.

    `index` counts stages from 0; `learning_rate` is the stage's peak.
    """

    index: int
    name: str
    rows: Sequence[EncodedRow]
    batches: Sequence[Sequence[int]]
    learning_rate: float

    @property
    def lengths(self) -> list[list[int]]:
        """The token counts of each step's rows."""
        return [[len(self.rows[index].input_ids) for index in batch] for batch in self.batches]


def epochs_within(stage: Stage, weights: Sequence[float], size: int, most: int | None) -> float:
    """Return a stage's epochs, or as many of them as `most` steps need. InputError where they see over MOST_ROWS rows.

    weights: how often an epoch sees each row. size: rows of a step.
    """
    an_epoch, epochs = mixing.epoch_rows(weights), stage.num_train_epochs
    if most is not None:
        epochs = min(epochs, most / steps_of(an_epoch, size, 1))
    seen = an_epoch * max(epochs, 1)
    if seen > MOST_ROWS:
        raise InputError(
            f"stage {stage.name}: its epochs, of {counted(an_epoch, 'row')} each, see {seen:,.0f} rows in all, and at "
            f"most {MOST_ROWS:,} can be planned for. Lower train.num_train_epochs, train.max_steps or a weight in "
            "data.train."
        )
    return epochs


def batches(
    rows: int,
    epochs: float,
    size: int,
    *,
    shuffled: bool,
    seed: int,
    stage: int,
    weights: Sequence[float] | None = None,
) -> list[list[int]]:
    """Return the row indices of every step of a stage: `ceil(rows of an epoch / size)` steps an epoch.

    weights: how often an epoch sees each row; None: once. Each shuffled epoch has an order of its own, drawn from
    (seed, stage, epoch). Of an epoch that is begun, as in 1.5 epochs, the first steps are taken.
    """
    steps = []
    an_epoch = rows if weights is None else mixing.epoch_rows(weights)
    for epoch in range(math.ceil(epochs)):
        order = list(range(rows)) if weights is None else mixing.epoch(weights, seed, stage, epoch)
        if shuffled:
            seeds.generator(seed, stage, epoch).shuffle(order)
        steps += [order[start : start + size] for start in range(0, len(order), size)]
    return steps[: steps_of(an_epoch, size, epochs)]
