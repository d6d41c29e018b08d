"""The SFTTrainer of one stage: our own batches, our own step, one log line a step.

Trainer keeps what it does well: gradient clipping, fp16's loss scale, the optimizer's and the schedule's steps, and
trackers. Everything that a step needs of us is asked of the session (StageSession below).

Import this module after a model was loaded: importing unsloth patches trl and transformers, so it must come before
either.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import EncodedRow
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.train.optimizer import FlatWeights, make_scheduler
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

    def prepare_steps(self) -> None:
        """Make everything ready for the stage's first step."""

    def train_step(self, rows: Sequence[EncodedRow], loss_scale: Tensor | None) -> StepFacts:
        """Add the gradients of an effective batch to `flat`."""

    def end_step(self, entry: dict[str, Any]) -> bool:
        """Take note of a step that has ended; return whether training stops here."""

    def checkpoint_if_due(self, scaler: dict[str, Any] | None) -> None:
        """Save the state where it is time to, with this state of the loss scale."""


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
        weights = [p for p in session.loaded.model.parameters() if p.requires_grad]
        kept = [p.data for p in weights]
        super().__init__(
            model=session.loaded.model,
            args=sft_config(task, self.job, session.loaded, session.work_folder, len(self.batches)),
            train_dataset=Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels} for r in self.job.rows]),
            processing_class=session.loaded.tokenizer,
            data_collator=collate,
            optimizers=(session.optimizer, self.schedule),
            callbacks=[StepCallback(self)],
        )
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data  # TRL casts a quantised model's adapter to bf16, which fp16's GradScaler refuses
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def get_train_dataloader(self) -> DataLoader:
        """Return the stage's remaining batches, in our own order."""
        return DataLoader(list(self.job.rows), batch_sampler=self.batches, collate_fn=collate)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of an effective batch and return its loss, a 0-d tensor."""
        model.train()
        scaler = self.accelerator.scaler
        scale = scaler.scale(torch.ones((), device=self.session.loaded.device)) if scaler else None
        self.step_facts = self.session.train_step(inputs["rows"], scale)
        return self.step_facts.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the run's number of steps, over which trackers draw; this trainer counts its own stage's."""
        self.state.global_step += self.steps_before
        try:
            super().log(logs, start_time)
        finally:
            self.state.global_step -= self.steps_before

    def _rate_scale(self, step: int) -> float:
        return self.session.state.rate_scale(self.steps_before + step)


class StepCallback(TrainerCallback):
    """Writes one log line a step. Nothing is averaged, and a loss that is no number stays one."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer, self.session = trainer, trainer.session
        self.since = 0.0  #: when the step in hand began, by time.monotonic()
        self.is_spoilt = False  #: the step in hand has gradients that are no finite numbers, and no loss scale

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Put the loss scale back as it was, and make the session ready."""
        scaler = self.trainer.accelerator.scaler
        if self.session.state.scaler is not None and scaler is not None:
            scaler.load_state_dict(self.session.state.scaler)
        self.session.prepare_steps()
        self.since = time.monotonic()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Drop gradients that are no finite numbers, so that weights and moments stay as they are.

        A loss scale looks for itself; without one, such gradients would reach the weights.
        """
        finite = self.trainer.accelerator.scaler is not None or bool(self.session.flat.gradient.isfinite().all())
        self.is_spoilt = not finite
        if self.is_spoilt:
            self.session.optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Move the schedule on after a step that the loss scale skipped, as Trainer does after the others.

        The log, the checkpoints and the budget count all steps; else the rate would not be down at the last one.
        """
        if self.trainer.accelerator.optimizer_step_was_skipped:
            with warnings.catch_warnings(action="ignore"):  # torch expects a step of the optimizer first
                self.trainer.schedule.step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Hand the step's line to the session, and stop or save where it is time to."""
        if "grad_norm" not in logs:  # the summary at the end of train()
            return
        now, scaler = time.monotonic(), self.trainer.accelerator.scaler
        entry = self._entry(logs, seconds=now - self.since)
        self.since = now
        if self.session.end_step(entry):
            control.should_training_stop = True  # the stage's end saves the state
            return
        self.session.checkpoint_if_due(scaler.state_dict() if scaler is not None else None)

    def _entry(self, logs: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the line of the step that has just ended."""
        facts, at, scaler = self.trainer.step_facts, self.session.state, self.trainer.accelerator.scaler
        on_card = self.session.loaded.device == "cuda"
        return {
            "stage": self.trainer.job.name,
            "step": at.global_step + 1,
            "stage_step": at.step + 1,
            "loss": facts.loss.item(),
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": logs["learning_rate"],
            "tokens": facts.tokens,
            "supervised_tokens": facts.supervised_tokens,
            "seconds": round(seconds, 4),
            "gib": round(torch.cuda.memory_reserved() / 2**30, 3) if on_card else 0.0,
            "skipped": bool(self.trainer.accelerator.optimizer_step_was_skipped) or self.is_spoilt,
            "loss_scale": scaler.get_scale() if scaler is not None else None,
        }


def sft_config(task: TrainTask, job: StageJob, loaded: LoadedModel, work_folder: Path, steps: int) -> SFTConfig:
    """Return the trainer's settings for `steps` steps of a stage. What is off is off since we do it ourselves."""
    section = task.section
    return SFTConfig(
        output_dir=str(work_folder),
        # To Trainer an effective batch is one batch; the session cuts it into micro-batches of similar length.
        per_device_train_batch_size=section.effective_batch_size,
        gradient_accumulation_steps=1,
        num_train_epochs=1,  # all epochs of the stage are in its list of batches
        max_steps=steps,
        learning_rate=job.learning_rate,  # optimizer and schedule are given; trackers show this one
        max_grad_norm=section.max_grad_norm,
        seed=task.seed,
        data_seed=task.seed,
        fp16=loaded.dtype == "float16",
        bf16=loaded.dtype == "bfloat16",
        use_cpu=loaded.device == "cpu",
        gradient_checkpointing=False,  # the plan says which layers: models/activation_checkpointing.py
        # Every step has its own line, of numbers as they are.
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,  # we draw our own bar, over all stages
        save_strategy="no",  # checkpoints are ours (train/checkpoints.py), of the whole run and without pickles
        eval_strategy="no",  # the test set shapes nothing
        # A tracker is the recipe's choice, and nothing leaves the machine besides what it sends.
        report_to=section.report_to,
        run_name=work_folder.parent.name,
        project="fast_ft",
        trackio_space_id=None,
        trackio_static_space_id=False,
        push_to_hub=False,
        # Rows are tokens already: nothing is loaded by processes, renamed, cut, packed, padded or masked by TRL.
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        packing=False,
        padding_free=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        loss_type="nll",  # never computed by TRL: train/loss.py is the loss
        neftune_noise_alpha=None,  # Trainer's noise does not know where a row ends: train/neftune.py
    )


def collate(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Return the rows as they are, and beside them ids and labels (1, tokens), which Trainer's own counting wants."""
    ids = [token for row in rows for token in row.input_ids]
    labels = [label for row in rows for label in row.labels]
    return {"rows": list(rows), "input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
