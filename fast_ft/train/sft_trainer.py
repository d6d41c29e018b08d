"""The SFTTrainer of one stage: our own batches, our own step, one log line a step.

Trainer keeps what it does well: the loop, fp16's loss scale, the optimizer's and the schedule's steps, and trackers.
Everything that a step needs of us is asked of the session (stage_session.py).

The loop never waits for the card where the session runs ahead: while a step is computed, the host lays out and launches
the next one, and then reads what came of the first (train/launched_step.py). Whether a step is skipped is decided on
the card, by the loss scale or by gradients that are no finite numbers. Wherever a number decides what comes next, all
launched steps are read first.

Import this module after a loader was made: importing unsloth patches trl and transformers, so it must come before
either.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from trl import SFTTrainer

from fast_ft.data.encoding import EncodedRow
from fast_ft.train.launched_step import LaunchedStep, mark
from fast_ft.train.optimizer import decides_on_device, make_scheduler
from fast_ft.train.sft_settings import collate, sft_config
from fast_ft.train.stage_session import StageSession


class StageTrainer(SFTTrainer):
    """Runs what is left of the stage at which the session stands.

    An effective batch is one batch to Trainer; `training_step` hands it to the session, which cuts it up.
    """

    def __init__(self, session: StageSession) -> None:
        task, state = session.task, session.state
        self.session, self.job = session, task.jobs[state.stage]
        self.steps_before = state.global_step  #: over all stages
        self.batches = list(self.job.batches[state.step :])[: session.left]
        carried = task.carry.schedule
        # Trainer has accelerate wrap it; this one moves on whenever it is told to.
        self.schedule = make_scheduler(
            session.optimizer,
            task.section,
            self.job.learning_rate,
            total=task.total if carried else len(self.job.batches),
            start=state.global_step if carried else state.step,
            scale=self._rate_scale,
        )
        self.steps = StepCallback(self)
        weights = [p for p in session.loaded.model.parameters() if p.requires_grad]
        kept = [p.data for p in weights]
        super().__init__(
            model=session.loaded.model,
            args=sft_config(task, self.job, session.loaded, session.work_folder, len(self.batches)),
            train_dataset=_dataset(self.job.rows),
            processing_class=session.loaded.tokenizer,
            data_collator=collate,
            optimizers=(session.optimizer, self.schedule),
            callbacks=[self.steps],
        )
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data  # TRL casts a quantised model's adapter to bf16, which fp16's GradScaler refuses
        # Trainer drops all gradients behind each step, which goes through all modules. Ours are set to 0 at once.
        session.loaded.patches.replace(session.loaded.model, "zero_grad", _keep_gradients)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.decides_on_device = decides_on_device(session.optimizer)  #: whether a step is skipped
        self._operations = 0.0  # a token's, once they are counted

    def get_train_dataloader(self) -> DataLoader:
        """Return the stage's remaining batches, in our own order."""
        return DataLoader(list(self.job.rows), batch_sampler=self.batches, collate_fn=collate)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device | None = None
    ) -> tuple[list[dict[str, Any]], None]:
        """Return the next batch. Its tokens are not counted here: Trainer would wait for the card to tell it them."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return what Trainer counts for a batch. The model's weights are looked through once, not at every step."""
        tokens = inputs["input_ids"].numel()
        self._operations = self._operations or super().floating_point_ops(inputs) / tokens
        return round(self._operations * tokens)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of an effective batch and return its loss, a 0-d tensor."""
        if not model.training:  # setting it goes through all modules
            model.train()
        self.step_facts = self.session.train_step(inputs["rows"], self.loss_scale())
        return self.step_facts.loss

    def loss_scale(self) -> Tensor | None:
        """Return fp16's loss scale as it is now on the device (0-d), or None."""
        scaler = self.accelerator.scaler
        return scaler.scale(torch.ones((), device=self.session.loaded.device)) if scaler is not None else None

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Unscale and clip the flat gradient; return its norm before, on the device. Trainer's own way: each matrix."""
        return self._clipped(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """Return the gradient's norm on the device, where nothing is clipped too."""
        return self._clipped(math.inf) if grad_norm is None else grad_norm

    def _clipped(self, most: float) -> Tensor:
        self.accelerator.unscale_gradients()
        self.grad_norm = self.session.flat.clip(most)
        return self.grad_norm

    def log_step(self, step: LaunchedStep, logs: dict[str, float]) -> None:
        """Log what came of a step, under its own number: Trainer may be at a later one."""
        now = self.state.global_step, self.state.epoch
        self.state.global_step, self.state.epoch = step.number, step.epoch
        try:
            self.log(logs)
        finally:
            self.state.global_step, self.state.epoch = now

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the run's number of steps, over which trackers draw; this trainer counts its own stage's."""
        self.state.global_step += self.steps_before
        try:
            super().log(logs, start_time)
        finally:
            self.state.global_step -= self.steps_before

    def _rate_scale(self, step: int) -> float:
        return self.session.state.rate_scale(self.steps_before + step)


def _dataset(rows: Sequence[EncodedRow]) -> Dataset:
    """Return the rows as TRL wants them.

    Nothing here asks for datasets' cache. With a name of ours, datasets does not pickle the whole table for a name.
    """
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    return Dataset(InMemoryTable.from_pydict(columns), fingerprint="rows")


def _keep_gradients(set_to_none: bool = True) -> None:
    """Do nothing, in place of a model's zero_grad: FlatWeights.zero_gradients does it."""


class StepCallback(TrainerCallback):
    """Writes one log line a step. Nothing is averaged, and a loss that is no number stays one."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer, self.session = trainer, trainer.session
        self.since = 0.0  #: when the step whose line comes next began, by time.monotonic()
        self.before: torch.cuda.Event | None = None  #: the same on a card; None on a CPU
        self.rate = 0.0  #: the learning rate of the step in hand
        self.is_spoilt = False  #: the host knows that the step in hand has gradients that are no finite numbers
        self.launched: list[LaunchedStep] = []  #: the steps that were not yet read, the oldest first

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Put the loss scale back as it was, and make the session ready."""
        scaler = self.trainer.accelerator.scaler
        if self.session.state.scaler is not None and scaler is not None:
            scaler.load_state_dict(self.session.state.scaler)
        self.session.prepare_steps()
        self._begin_step()

    def _begin_step(self) -> None:
        self.since, self.before = time.monotonic(), mark() if self.session.flat.gradient.is_cuda else None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Let gradients that are no finite numbers change neither weights nor moments.

        A loss scale looks for itself. Without one the optimizer is told on the device, or finds no gradients.
        """
        if self.trainer.accelerator.scaler is not None:
            return
        if self.trainer.decides_on_device:
            self.session.optimizer.found_inf = (~self.trainer.grad_norm.isfinite()).float()
            return
        self.is_spoilt = not bool(self.session.flat.gradient.isfinite().all())
        if self.is_spoilt:
            self.session.optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the step, read those that can be read without waiting, and stop or save where it is time to.

        The schedule moves on after a step that the loss scale skipped, as Trainer lets it do after the others: log,
        checkpoints and the budget count all steps, and else the rate would not be down at the last one.
        """
        is_skipped = bool(self.trainer.accelerator.optimizer_step_was_skipped)
        if is_skipped:
            with warnings.catch_warnings(action="ignore"):  # torch expects a step of the optimizer first
                self.trainer.schedule.step()
        known = None if self.trainer.decides_on_device else is_skipped or self.is_spoilt
        self.launched.append(
            LaunchedStep.of(
                state, self.trainer.step_facts, self.rate, known, self.trainer.grad_norm, self.trainer.loss_scale()
            )
        )
        if self.settle():
            control.should_training_stop = True  # the stage's end saves the state

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note the learning rate of the step, before the schedule moves on."""
        self.rate = self.trainer.schedule.get_last_lr()[0]

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Read all steps: it is the stage's end."""
        self.settle(all_of_them=True)

    def settle(self, *, all_of_them: bool = False) -> bool:
        """Write the lines of launched steps, all but the newest where the session runs ahead; return whether to stop.

        Once a step says that training stops, those behind it are the last.
        """
        stops = False
        while self.launched and (all_of_them or stops or len(self.launched) > 1 or not self.session.runs_ahead):
            stops |= self._settle(self.launched.pop(0))
        return stops

    def _settle(self, step: LaunchedStep) -> bool:
        loss, norm, scale = step.read()
        now, at = time.monotonic(), self.session.state
        seconds = now - self.since
        if self.before is not None and step.done is not None:  # the host that runs ahead learns late of a step's end
            seconds = self.before.elapsed_time(step.done) / 1e3
        entry = {
            "stage": self.trainer.job.name,
            "step": at.global_step + 1,
            "stage_step": at.step + 1,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": step.learning_rate,
            "tokens": step.facts.tokens,
            "supervised_tokens": step.facts.supervised_tokens,
            "seconds": round(seconds, 4),
            "gib": step.gib,
            "skipped": not math.isfinite(norm) if step.skipped is None else step.skipped,
            "loss_scale": scale if self.trainer.accelerator.scaler is not None else None,
        }
        self.since, self.before = now, step.done
        self.trainer.log_step(step, {"loss": loss, "grad_norm": norm, "learning_rate": step.learning_rate})
        if self.session.end_step(entry):
            return True
        is_saved = self.session.checkpoint_if_due(self.trainer.accelerator.scaler)
        if is_saved or "validation_seconds" in entry:  # no step was running: the next one begins only now
            self._begin_step()
        return False
