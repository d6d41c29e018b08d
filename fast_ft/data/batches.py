"""A stage as training takes it: tokenised rows, and which of them each step sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fast_ft.common import seeds
from fast_ft.data import mixing
from fast_ft.data.encoding import EncodedRow
from fast_ft.recipe.steps import steps_of


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
