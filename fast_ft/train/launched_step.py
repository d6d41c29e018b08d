"""A step that was launched, and what is known of it before the device has computed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fast_ft.train.task import StepFacts

if TYPE_CHECKING:
    from transformers import TrainerState


def mark() -> torch.cuda.Event:
    """Return an event that the card reaches when it has done all that it was given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class LaunchedStep:
    """One optimizer step. Its loss, its gradient's norm and the loss scale after it come from the device.

    `number` and `epoch` are Trainer's. `skipped`: whether the host skipped it; None: the device decides, by the norm.
    `gib`: GPU memory reserved when it was launched. `numbers_3` lies on the host, and is complete once `done` is.
    """

    number: int
    epoch: float | None
    facts: StepFacts
    learning_rate: float
    gib: float
    skipped: bool | None
    numbers_3: Tensor
    done: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        state: TrainerState,
        facts: StepFacts,
        learning_rate: float,
        skipped: bool | None,
        norm: Tensor,
        scale: Tensor | None,
    ) -> LaunchedStep:
        """Return the step that was just launched; its numbers are copied as soon as the device has computed them.

        `norm` and `scale` (0-d) are the gradient's norm before clipping, and fp16's loss scale or None.
        """
        last = facts.loss if scale is None else scale
        numbers_3 = torch.stack([each.detach().float() for each in (facts.loss, norm, last)])
        done, gib = None, 0.0
        if numbers_3.is_cuda:
            on_card, numbers_3 = numbers_3, torch.empty(3, pin_memory=True)
            numbers_3.copy_(on_card, non_blocking=True)
            done, gib = mark(), round(torch.cuda.memory_reserved() / 2**30, 3)
        return cls(state.global_step, state.epoch, facts, learning_rate, gib, skipped, numbers_3, done)

    def read(self) -> tuple[float, float, float]:
        """Wait until the step is computed; return its loss, its gradient's norm before clipping, and the loss scale."""
        if self.done is not None:
            self.done.synchronize()
        loss, norm, scale = self.numbers_3.tolist()
        return loss, norm, scale
