"""The SFTTrainer's settings, and how rows become what it calls a batch. Imported as sft_trainer.py is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import EncodedRow
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.train.task import TrainTask


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
        logging_strategy="no",  # Trainer would wait for every number; each step has its own line all the same
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
