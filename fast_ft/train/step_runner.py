"""Forward and backward of an effective batch, in the micro-batches that the plan says and the card has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fast_ft.common import out_of_memory, seeds
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.process_group import Ranks
from fast_ft.common.wording import counted, duration
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models.base_layers import decoder_layers
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.micro_batches import cut, share
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.train import oom_recovery
from fast_ft.train.forward_backward import CaptureFailed, Passes
from fast_ft.train.micro_batch import MicroBatchShape
from fast_ft.train.optimizer import FlatWeights
from fast_ft.train.row_passes import RowPasses
from fast_ft.train.state import TrainState
from fast_ft.train.task import StepFacts, TrainTask

Result = TypeVar("Result")


class StepRunner:
    """Runs the steps of a task over one model, and takes a thriftier plan where memory runs out.

    All processes (`ranks`) take the same plan at the same step. `on_plan` is told of it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        flat: FlatWeights,
        task: TrainTask,
        plan: TrainPlan,
        ranks: Ranks,
        on_plan: Callable[[TrainPlan], None],
    ) -> None:
        self.loaded, self.flat, self.task, self.ranks, self.on_plan = loaded, flat, task, ranks, on_plan
        shape = MicroBatchShape(task.most_rows, task.longest, task.pad_id)
        passes = Passes if loaded.general is None else RowPasses
        self.passes = passes(loaded, flat, plan, shape, task.section.neftune_noise_alpha)
        self.out_of_memory = 0  #: times that memory ran out

    @property
    def plan(self) -> TrainPlan:
        """The plan that is followed now."""
        return self.passes.plan

    def train_step(self, rows: Sequence[EncodedRow], loss_scale: Tensor | None, at: TrainState) -> StepFacts:
        """Add the gradients of an effective batch to `flat`, those of all processes.

        `loss_scale` (0-d) is fp16's, or None. `at` is the state before the step.

        Raises:
            InputError: Memory ran out, and no thriftier plan is left.
        """
        facts = self._until_it_fits(partial(self._forward_backward, rows, loss_scale, at), at)
        self.ranks.sum(self.flat.gradient)
        self.ranks.sum(facts.loss)
        return facts

    def rehearse(self, at: TrainState) -> None:
        """Run a pass of each width that is to come, over all stages, and say how long the steps will take.

        Graphs are captured here, before the first step. Raises what `train_step` raises.
        """
        self._until_it_fits(partial(self._rehearse, self.task.step_lengths[at.global_step :]), at)

    def _forward_backward(self, rows: Sequence[EncodedRow], loss_scale: Tensor | None, at: TrainState) -> StepFacts:
        """Add this process's part of an effective batch's gradient; the loss returned is its part too."""
        lengths = [len(row.input_ids) for row in rows]
        supervised = sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:])
        self.passes.begin(supervised, loss_scale)
        total = torch.zeros((), device=self.loaded.device)
        own = share(lengths, self.ranks.size)[self.ranks.rank]
        most_rows, most_tokens = self.plan.micro_batch, self.plan.most_tokens
        stage = self.task.jobs[at.stage].index
        for number, piece in enumerate(cut([lengths[i] for i in own], most_rows=most_rows, most_tokens=most_tokens)):
            micro = self.passes.lay_out([rows[own[i]] for i in piece])
            place = number * self.ranks.size + self.ranks.rank  # no two passes draw the same
            total += self.passes(micro, seed=seeds.derive(self.task.seed, "train", stage, at.step, place))
        return StepFacts(sum(lengths), supervised, total)

    def _rehearse(self, steps: Sequence[Sequence[int]]) -> None:
        widths = oom_recovery.widths_to_come(self.plan, steps, self.ranks.rank)
        seconds = self.passes.rehearse({each for step in widths for each in step})
        if seconds:  # else there are fewer rows in a step than processes
            took = duration(oom_recovery.predicted_seconds(widths, seconds))
            note(f"{counted(len(steps), 'step')} will take {took}, by the passes measured just now")

    def _until_it_fits(self, attempt: Callable[[], Result], at: TrainState) -> Result:
        """Return what `attempt` returns. Where a process cannot do it, all take another plan and attempt it again."""
        while True:
            error: Exception | None = None
            is_short = is_uncapturable = 0
            try:
                result = attempt()
            except Exception as raised:
                is_short, is_uncapturable = out_of_memory.is_short(raised), isinstance(raised, CaptureFailed)
                if not (is_short or is_uncapturable):
                    raise
                error = raised.with_traceback(None)  # which would hold the activations
                error.__context__ = None  # whose traceback would, too
            is_short, is_uncapturable = self.ranks.most([is_short, is_uncapturable])
            if is_short:
                self._take_thriftier_plan(error, step=at.global_step + 1)
            elif is_uncapturable:
                self._follow(replace(self.plan, capture=False))
                reason = error or "in another process"
                note(f"the pass cannot be captured ({reason}): it runs kernel by kernel, more slowly")
            else:
                return result

    def _take_thriftier_plan(self, error: Exception | None, step: int) -> None:
        """Follow a plan that takes less memory. `error` is None where another process had it."""
        layers = len(decoder_layers(self.loaded.model))
        plan = oom_recovery.thriftier(self.plan, self.task.step_lengths, layers)
        if plan is None:
            raise InputError(
                f"out of memory with one row at a time, at step {step}. Lower model.max_length or lora.r, set "
                "train.gradient_checkpointing: true, or free the card."
            ) from error
        self.out_of_memory += 1
        self._follow(plan)
        most = "one row" if plan.most_tokens is None else f"at most {plan.most_tokens:,} tokens"
        note(
            f"out of memory: step {step} is done again with {most} in a pass, "
            f"{counted(plan.recompute_layers, 'layer')} computed again, {'with' if plan.capture else 'without'} graphs"
        )

    def _follow(self, plan: TrainPlan) -> None:
        self.loaded.model.zero_grad()
        self.passes.follow(plan)
        if self.loaded.device == "cuda":
            torch.cuda.empty_cache()
        self.on_plan(plan)
