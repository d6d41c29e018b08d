"""The callback by which a watch sees a trainer's steps.

Importing this module imports transformers, so it is imported after Unsloth, which patches transformers.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Observer(Protocol):
    """What is told of a trainer's steps: bench.watch.Watch."""

    steps: list[dict[str, Any]]

    @property
    def launched(self) -> int:
        """How many steps were launched."""

    def settled(self, steps: list[dict[str, Any]], /) -> bool:
        """Whether the steps that have ended are enough."""

    def train_began(self) -> None:
        """Training begins."""

    def step_began(self) -> None:
        """An optimizer step begins."""

    def gradients_are_there(self, model: nn.Module) -> None:
        """The gradients of a step are complete, and the optimizer has not yet used them."""

    def step_launched(self, *, skipped: bool) -> None:
        """An optimizer step was launched, or done."""

    def logged(self, loss: float, grad_norm: float) -> None:
        """The oldest launched step has ended with this loss, in nats per token, and gradient norm."""


class WatchCallback(TrainerCallback):
    """Tell `watch` of each event, and stop the trainer after `stop_after` steps, or once the watch has seen enough.

    The trainer's schedule stays as it is.
    """

    def __init__(self, watch: Observer, trainer: Trainer, stop_after: int) -> None:
        self.watch, self.trainer, self.stop_after = watch, trainer, stop_after

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Note when training began."""
        self.watch.train_began()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note when the first step began."""
        self.watch.step_began()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Look at the gradients, before the optimizer uses them."""
        self.watch.gradients_are_there(self.trainer.model)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note the step. Our trainer may log it in its own on_step_end, or after the next one."""
        self.watch.step_launched(skipped=bool(self.trainer.accelerator.optimizer_step_was_skipped))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the trainer after the last step, or once the steps that have ended are enough."""
        enough = self.watch.launched >= self.stop_after or self.watch.settled(self.watch.steps)
        control.should_training_stop |= enough

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Record a step that has ended; the log at the end of training has no gradient norm."""
        if "grad_norm" in logs:
            self.watch.logged(logs["loss"], logs["grad_norm"])
