"""A training session: stage after stage over one model, each stage one SFTTrainer with our own step.

The trainer sees an effective batch as one batch. train/step_runner.py cuts it into micro-batches of similar length and
divides each one's summed loss by the trained tokens of the whole effective batch, so that the cut changes memory and
speed but not the gradient. Each step seeds torch from (recipe seed, stage, step): a resumed run draws the same dropout
and the same noise as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from fast_ft.common import process_group, signals
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.minutes import TrainPace, longer
from fast_ft.data.encoding import EncodedRow
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.train import replicas, state
from fast_ft.train.divergence import BadStepWatch, Rewind
from fast_ft.train.optimizer import FlatWeights, make_optimizer
from fast_ft.train.step_runner import StepRunner
from fast_ft.train.stopping import Stopping
from fast_ft.train.task import StepFacts, TrainCallbacks, TrainTask
from fast_ft.train.validation import Validation


class TrainSession:
    """Trains what is left of a task; `state` is how far it came, and `save_state` writes all that a resume needs.

    Where several processes train (`ranks`), each has a session over the same task and takes its share of every batch.
    Gradients are added up before they are used, so weights stay equal. What hangs on one process's clock, memory or
    signals is agreed on.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        task: TrainTask,
        plan: TrainPlan,
        work_folder: Path,
        callbacks: TrainCallbacks | None = None,
        pace: TrainPace | None = None,
        ranks: process_group.Ranks = process_group.ALONE,
    ) -> None:
        self.loaded, self.task, self.work_folder, self.ranks = loaded, task, work_folder, ranks
        self.callbacks = callbacks or TrainCallbacks()
        self.stopping = Stopping(ranks, pace)
        self.state = state.TrainState()
        self.flat = FlatWeights(loaded.model)
        self.steps = StepRunner(loaded, self.flat, task, plan, ranks, self.callbacks.on_plan)
        self.validation = Validation(self.steps.passes, task, self.callbacks, self.stopping)
        self.optimizer = make_optimizer(self.flat, task.section)
        self.notes: list[str] = []  #: what the manifest has to know
        self.peak_gib = 0.0  #: of GPU memory reserved, over all stages
        self.gave_up = False  #: bad numbers came twice, or there is no good state; the last good state is the end
        self.is_stranded = False  #: bad numbers came once, and no state from before them is left
        self.ahead = loaded.device == "cuda" and ranks.size == 1  #: a step may be launched while the last one runs
        self._in_flight = 0  # steps that were launched, and have not ended
        self._watch = BadStepWatch(task.section.max_bad_steps)
        self._is_rehearsed = False
        self._first_weights: Tensor | None = None  # the adapter before the first step

    @property
    def finished(self) -> bool:
        """Whether all stages are trained."""
        return self.state.stage >= len(self.task.jobs)

    @property
    def left(self) -> int | None:
        """How many steps may still be taken before the task's `stop_after`; None: all."""
        after = self.task.stop_after
        return None if after is None else max(0, after - self.state.global_step)

    @property
    def out_of_time(self) -> bool:
        """Whether budget.train_minutes ended the training before its last step."""
        return self.stopping.time_is_up and not self.finished and self.state.global_step > 0

    def free(self) -> None:
        """Give back the model and all that was made over it. What is known of the steps stays."""
        del self.steps, self.validation, self.optimizer, self.flat
        self.callbacks, self._first_weights = TrainCallbacks(), None
        self.loaded.free()

    def save_state(self, folder: Path) -> None:
        """Write what `resume` reads into an existing folder."""
        state.save(folder, self.loaded.model, self.optimizer, self.state)

    def resume(self, folder: Path) -> None:
        """Go on from a saved state, in place of from the beginning.

        Where the budget allows more minutes than before, a learning rate that went down early does so no more.

        Raises:
            InputError: The state cannot be read, or is of another adapter.
        """
        self.state = state.read(folder)
        pace = self.stopping.pace
        if longer(pace.minutes if pace is not None else None, self.state.minutes):
            self.state.anneal_from, self.state.stop_at = 0, None
        if not state.load(folder, self.loaded.model, self.optimizer):
            self._warn(
                f"the checkpoint after step {self.state.global_step} has the moments of another optimizer than "
                f"train.optim: {self.task.section.optim}: training goes on with new ones"
            )
        self.state.fit_to([len(job.batches) for job in self.task.jobs])
        if not self.finished and self.state.step >= len(self.task.jobs[self.state.stage].batches):
            self._next_stage()

    def run(self) -> None:
        """Train what is left.

        Raises:
            InputError: Memory ran out, and no thriftier plan is left.
            KeyboardInterrupt: The run was asked to stop; its state is saved.
            process_group.Lost: Another process has ended; the state is saved.
        """
        replicas.share_state(self.ranks, self.save_state, self.resume)
        if self.state.global_step == 0:
            self._first_weights = self.flat.parameter.detach().cpu().clone()
        try:
            with signals.calling(self.stopping.ask):
                while self._goes_on():
                    job = self.task.jobs[self.state.stage]
                    self._run_stage()
                    if self._watch.diverged and not self.stopping.interrupted:
                        self._go_back(self._watch.rewind())
                        if self.gave_up:
                            break
                    elif self.state.step == len(job.batches):  # else it was stopped; the checkpoint is saved
                        self._next_stage()
        finally:
            self.steps.passes.close()

    def prepare_steps(self) -> None:
        """Make everything ready for the first step of a trainer.

        Called when the trainer begins: Unsloth compiles again after a pass that came before.
        """
        self.steps.passes.open()
        if self.loaded.device == "cuda" and not self._is_rehearsed:
            self._is_rehearsed = True
            with self.callbacks.watch.during("rehearsal"):
                self.steps.rehearse(self.state)
        if self.stopping.pace is not None:
            self.stopping.pace.start()

    def train_step(self, rows: Sequence[EncodedRow], loss_scale: Tensor | None) -> StepFacts:
        """Add the gradients of an effective batch to `flat`; `loss_scale` (0-d) is fp16's, or None."""
        facts = self.steps.train_step(rows, loss_scale, self._launched)
        self._in_flight += 1
        return facts

    @property
    def _launched(self) -> state.TrainState:
        """The state as it will be when all launched steps have ended."""
        at, more = self.state, self._in_flight
        return replace(at, step=at.step + more, global_step=at.global_step + more)

    @property
    def runs_ahead(self) -> bool:
        """Whether the next step may be launched before it is known what came of the last one.

        It may not where the last one's numbers or weights are needed first: where the state is saved or measured after
        it, where bad numbers are being counted, and where a request or the budget may end the training.
        """
        at = self._launched
        is_needed = self._is_due(at) or self.validation.is_due(at)
        return self.ahead and not is_needed and self._watch.is_calm and not self.stopping.is_near(self.state)

    def end_step(self, entry: dict[str, Any]) -> bool:
        """Count a step that has ended and log its line; return whether training stops here, whatever the reason."""
        at = self.state
        at.step, at.global_step = at.step + 1, at.global_step + 1
        self._in_flight -= 1
        if warning := self.stopping.count_time(at, is_newest=self._in_flight == 0):
            self.notes.append(warning)
        is_up = self.stopping.is_up(at)
        is_last = is_up and self._in_flight == 0
        if self.validation.is_due(at) or (is_last and self.validation.is_on):
            said, problems = self.validation.measure(at)
            entry |= said
            self.notes += problems
        self.callbacks.on_step(entry)
        self._watch.see(entry, is_last=at.global_step == self.task.total)
        self.stopping.agree(at, is_up=is_up)
        return self.stopping.interrupted or self._watch.diverged or self.out_of_time

    def checkpoint_if_due(self, scaler: GradScaler | None) -> bool:
        """Save the state every `save_steps` steps, and where the learning rate begins to go down early; else False.

        `scaler` is fp16's. At a stage's end the state is saved anyway. While bad steps are being counted, none is
        saved: it would take the place of one that training may have to go back to.
        """
        if not self._is_due(self.state) or self._watch.is_counting:
            return False
        assert self._in_flight == 0, "the weights are those of the state"
        self.state.scaler = scaler.state_dict() if scaler is not None else None
        self._checkpoint()
        return True

    def _is_due(self, at: state.TrainState) -> bool:
        """Return whether a checkpoint is due after the step that `at` stands behind."""
        every = self.task.section.save_steps
        due = bool(every and at.step % every == 0) or at.begins_to_anneal
        return due and at.step < len(self.task.jobs[at.stage].batches)

    def _run_stage(self) -> None:
        # Imported only now: unsloth, which may have loaded the model, is imported before trl and transformers.
        with self.callbacks.watch.during("trainer"):
            from fast_ft.train.sft_trainer import StageTrainer

        before, lost = self.state.global_step, None
        with self.callbacks.watch.during("trainer"):
            trainer = StageTrainer(self)
        self._in_flight = 0
        if self.loaded.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer.train()
        except process_group.Lost as error:  # the weights are those after the last step
            lost = error
        except InputError:
            trainer.steps.settle(all_of_them=True)  # the lines of the steps before
            raise
        scaler = trainer.accelerator.scaler
        self.state.scaler = scaler.state_dict() if scaler is not None else None
        if lost is None and not replicas.have_equal_weights(self.ranks, self.flat.parameter):
            self._warn(f"after step {self.state.global_step} the processes' weights are not equal to the bit")
        if not self._watch.diverged and self.state.global_step > before:
            self._checkpoint()
        if lost is not None:
            note(f"warning: {lost}: training stops after step {self.state.global_step}, its state saved")
            raise lost
        if self.loaded.device == "cuda":
            self.peak_gib = max(self.peak_gib, torch.cuda.max_memory_reserved() / 2**30)

    def _next_stage(self) -> None:
        self.state.stage, self.state.step = self.state.stage + 1, 0
        if not self.task.carry.optimizer and not self.finished:
            self.optimizer = make_optimizer(self.flat, self.task.section)
            self.state.scaler = None

    def _checkpoint(self) -> None:
        """Save the state, unless the weights are known to be bad: the last step's loss was no number."""
        if not self._watch.broken and (
            problem := self.callbacks.on_checkpoint(self.state.global_step, self.save_state)
        ):
            self.notes.append(problem)

    def _go_back(self, rewind: Rewind) -> None:
        """Go back to the last good state and halve the learning rate; the second time that is the end."""
        seconds, is_the_end = self.state.seconds, self.state.rate_factor < 1
        good = self.callbacks.find_checkpoint(rewind.before)
        self.optimizer = make_optimizer(self.flat, self.task.section)
        self.state = state.TrainState()
        if good is not None:
            self.resume(good)
        elif self._first_weights is not None:
            with torch.no_grad():
                self.flat.parameter.copy_(self._first_weights)
        else:  # a resumed run whose only checkpoint was bad
            self.is_stranded = is_the_end = True
        self.gave_up = self.ranks.share(is_the_end)
        replicas.share_state(self.ranks, self.save_state, self.resume)
        self.state.seconds, self.state.rate_factor = seconds, 0.5
        at = self.state.global_step
        self.callbacks.on_rewind(at)
        what = "that is the end" if self.gave_up else "the learning rate is halved from there"
        self._warn(
            f"no finite loss or gradients from step {rewind.first_bad} on: back to the state after step {at}; {what}"
        )

    def _goes_on(self) -> bool:
        self.stopping.agree(self.state, is_up=self.stopping.is_up(self.state))
        if self.stopping.interrupted:
            raise KeyboardInterrupt
        return not self.finished and self.left != 0 and not self.out_of_time

    def _warn(self, text: str) -> None:
        self.notes.append(text)
        note(f"warning: {text}")
