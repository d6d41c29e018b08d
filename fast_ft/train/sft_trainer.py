"""The stage's SFTTrainer: our own batches, our own step, one log line a step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fast_ft.common import seeds
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.plan.micro_batches import cut, share
from fast_ft.train import oom_recovery
from fast_ft.train.optimizer import make_scheduler

if TYPE_CHECKING:
    from fast_ft.data.batches import StageJob
    from fast_ft.train.session import Course


def collate(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Return the rows as they are, and beside them ids and labels (1, tokens), which Trainer's own counting wants."""
    import torch

    ids = [token for row in rows for token in row.input_ids]
    labels = [label for row in rows for label in row.labels]
    return {"rows": list(rows), "input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


def make_trainer(course: Course, job: StageJob) -> Any:
    """Return an SFTTrainer that runs the stage's remaining batches."""
    import torch
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PrinterCallback, TrainerCallback
    from transformers.trainer_callback import ProgressCallback
    from trl import SFTConfig, SFTTrainer

    section, loaded, progress, passes = course.section, course.loaded, course.progress, course.passes
    first, before = progress.step, progress.global_step
    remaining = list(job.batches[first:])[: course.left]

    class StageTrainer(SFTTrainer):
        seen: list[dict[str, Any]]  # the log's lines of this stage

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            # Trackers draw over the run's steps; this trainer counts its own stage's.
            self.state.global_step += before
            try:
                super().log(logs, start_time)
            finally:
                self.state.global_step -= before

        def get_train_dataloader(self) -> Any:
            return DataLoader(list(job.rows), batch_sampler=remaining, collate_fn=collate)

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            model.train()
            while True:
                short: Exception | None = None
                try:
                    total = self._own_share(inputs["rows"])
                except torch.OutOfMemoryError as error:
                    short = error.with_traceback(None)  # which would hold the activations
                if not course.ranks.any(short is not None):
                    break
                oom_recovery.shrink(course, short, progress.global_step + 1)
            course.ranks.sum(course.flat.gradient)
            course.ranks.sum(total)
            return total

        def _own_share(self, rows: Sequence[EncodedRow]) -> Any:
            """Add up this process's part of an effective batch's gradient; return its part of the loss."""
            step, scaler, ranks = first + self.state.global_step, self.accelerator.scaler, course.ranks
            scale = scaler.scale(torch.ones((), device=loaded.device)) if scaler else None
            lengths = [len(row.input_ids) for row in rows]
            supervised = sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:])
            passes.begin(supervised, scale)
            total = torch.zeros((), device=loaded.device)
            own = share(lengths, ranks.size)[ranks.rank]
            pieces = cut(
                [lengths[i] for i in own], most_rows=course.plan.micro_batch, most_tokens=course.plan.most_tokens
            )
            for number, piece in enumerate(pieces):
                micro = passes.lay_out([rows[own[i]] for i in piece])
                place = number * ranks.size + ranks.rank  # no two passes draw the same
                total += passes(micro, seed=seeds.derive(course.seed, "train", job.index, step, place))
            self.step_facts = (sum(lengths), supervised, total)
            return total

    class Steps(TrainerCallback):
        """One line a step: nothing is averaged, and a loss that is no number stays one."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if progress.scaler is not None and trainer.accelerator.scaler is not None:
                trainer.accelerator.scaler.load_state_dict(progress.scaler)
            passes.open()
            oom_recovery.rehearse(course)
            if course.pace is not None:
                course.pace.start()
            self.since = time.monotonic()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            # A loss scale looks for itself; without one, a gradient that is no number would reach the weights.
            self.spoilt = trainer.accelerator.scaler is None and not bool(course.flat.gradient.isfinite().all())
            if self.spoilt:
                course.optimizer.zero_grad(set_to_none=True)  # no gradient, no step: weights and moments stay

        def on_step_end(self, *_: Any, **__: Any) -> None:
            # Trainer moves the schedule on after steps that changed the weights. Ours counts all steps, as the log, the
            # checkpoints and the budget do: else the rate would not be down at the last one.
            if trainer.accelerator.optimizer_step_was_skipped:
                with warnings.catch_warnings(action="ignore"):  # torch expects a step of the optimizer first
                    scheduler.step()

        def on_log(self, args: Any, trainer_state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "grad_norm" not in logs:  # the summary at the end of train()
                return
            now = time.monotonic()
            tokens, supervised, loss = trainer.step_facts
            scaler = trainer.accelerator.scaler
            scaled_down = bool(trainer.accelerator.optimizer_step_was_skipped)
            progress.step, progress.global_step = progress.step + 1, progress.global_step + 1
            entry = {
                "stage": job.name,
                "step": progress.global_step,
                "stage_step": progress.step,
                "loss": loss.item(),
                "grad_norm": float(logs["grad_norm"]),
                "learning_rate": logs["learning_rate"],
                "tokens": tokens,
                "supervised_tokens": supervised,
                "seconds": round(now - self.since, 4),
                "gib": round(torch.cuda.memory_reserved() / 2**30, 3) if loaded.device == "cuda" else 0.0,
                "skipped": scaled_down or self.spoilt,
                "loss_scale": scaler.get_scale() if scaler is not None else None,
            }
            self.since = now
            trainer.seen.append(entry)
            course.log(entry)
            if course.stepped(entry):
                control.should_training_stop = True  # the stage's end saves the state
                return
            due = section.save_steps and progress.step % section.save_steps == 0
            if (due or course.turns) and progress.step < len(job.batches):
                progress.scaler = scaler.state_dict() if scaler is not None else None
                course.checkpoint()

    config = SFTConfig(
        output_dir=str(course.work_folder),
        per_device_train_batch_size=section.effective_batch_size,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_steps=len(remaining),
        learning_rate=job.learning_rate,
        max_grad_norm=section.max_grad_norm,
        seed=course.seed,
        data_seed=course.seed,
        fp16=loaded.dtype == "float16",
        bf16=loaded.dtype == "bfloat16",
        use_cpu=loaded.device == "cpu",
        gradient_checkpointing=False,  # ours: models/activation_checkpointing.py
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=section.report_to,
        run_name=course.work_folder.parent.name,
        project="fast_ft",
        trackio_space_id=None,  # trackio keeps to this machine
        trackio_static_space_id=False,
        push_to_hub=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        loss_type="nll",
        packing=False,
        padding_free=False,
        max_length=None,
        neftune_noise_alpha=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    weights = [p for p in loaded.model.parameters() if p.requires_grad]
    kept = [p.data for p in weights]
    total = sum(len(each.batches) for each in course.jobs) if course.carry.schedule else len(job.batches)
    scheduler = make_scheduler(
        course.optimizer,
        section,
        job.learning_rate,
        total,
        before if course.carry.schedule else first,
        scale=lambda step: course.rate_scale(before + step),
    )
    trainer = StageTrainer(
        model=loaded.model,
        args=config,
        train_dataset=Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels} for r in job.rows]),
        processing_class=loaded.tokenizer,
        data_collator=collate,
        optimizers=(course.optimizer, scheduler),
        callbacks=[Steps()],
    )
    for weight, data in zip(weights, kept, strict=True):
        weight.data = data  # TRL casts a quantised model's adapter to bf16, which fp16's GradScaler refuses
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.seen = []
    return trainer
