"""A stage as training takes it: tokenised rows, and which of them each step sees; and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fast_ft.common import seeds
from fast_ft.data.encoding import EncodedRow


@dataclass(frozen=True)
class StageJob:
    """A stage, tokenised: `rows` in the stage's own order, `batches` of indices into them, one for each step."""

    index: int
    name: str
    rows: Sequence[EncodedRow]
    batches: Sequence[Sequence[int]]
    learning_rate: float

    @property
    def lengths(self) -> list[list[int]]:
        """The token counts of each step's rows."""
        return [[len(self.rows[index].input_ids) for index in batch] for batch in self.batches]


@dataclass(frozen=True)
class StageResult:
    """What a stage did. Tokens leave padding out; `supervised_tokens` are the trained ones.

    Losses are those of its first and its last step, in nats a token.
    """

    name: str
    steps: int
    skipped_steps: int
    tokens: int
    supervised_tokens: int
    first_loss: float
    last_loss: float
    seconds: float
    peak_gib: float


def batches(rows: int, epochs: int, size: int, *, shuffled: bool, seed: int, stage: int) -> list[list[int]]:
    """Return the row indices of every step of a stage: `ceil(rows / size)` steps an epoch.

    Shuffled epochs are drawn anew, each from (seed, stage, epoch).
    """
    steps = []
    for epoch in range(epochs):
        order = list(range(rows))
        if shuffled:
            seeds.generator(seed, stage, epoch).shuffle(order)
        steps += [order[start : start + size] for start in range(0, rows, size)]
    return steps
