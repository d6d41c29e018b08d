"""What the trainer of a stage asks of the session; train/session.py has the one that is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fast_ft.data.encoding import EncodedRow
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.train.optimizer import FlatWeights
from fast_ft.train.state import TrainState
from fast_ft.train.task import StepFacts, TrainTask


class StageSession(Protocol):
    """What the trainer asks of the session whose stage it runs; train/session.py has the one that is used."""

    task: TrainTask
    loaded: LoadedModel
    state: TrainState
    flat: FlatWeights
    optimizer: Optimizer
    work_folder: Path

    @property
    def left(self) -> int | None:
        """The steps that may still be taken; None: all."""

    @property
    def runs_ahead(self) -> bool:
        """Whether the next step may begin before it is known what came of the last one."""

    def prepare_steps(self) -> None:
        """Make everything ready for the stage's first step."""

    def train_step(self, rows: Sequence[EncodedRow], loss_scale: Tensor | None) -> StepFacts:
        """Add the gradients of an effective batch to `flat`."""

    def end_step(self, entry: dict[str, Any]) -> bool:
        """Take note of a step that has ended; return whether training stops here."""

    def checkpoint_if_due(self, scaler: GradScaler | None) -> bool:
        """Save the state where it is time to, with the state of this loss scale; else return False."""
