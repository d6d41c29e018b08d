"""The same rows through Unsloth's layers or ours, in our trainer, from one random base and one adapter."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import card_base, ours
from bench.card_scale import Scale
from bench.watch import Watch
from fast_ft.common import environment
from fast_ft.common.errors import InputError
from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models.loaders import choose
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train.task import TrainTask


class KeptWatch(Watch):
    """A watch that keeps the steps as they end: a way that is stopped leaves those that it took."""

    def __init__(self, started: float, keep: Callable[[str, Any], None]) -> None:
        super().__init__(started)
        self._keep = keep

    def logged(self, loss: float, grad_norm: float) -> None:
        """Record a step, and keep all steps; the card computes the next one meanwhile."""
        super().logged(loss, grad_norm)
        self._keep("steps", self.steps)


def measure(scale: Scale, keep: Callable[[str, Any], None], work: Path, backend: str, started: float) -> None:
    """Train `scale.steps` steps through "fused" or "unsloth", and keep the steps and the first gradient's sketch."""
    watch = KeptWatch(started, keep)
    environment.for_libraries()  # before the card is touched
    if not (work / "base").is_dir():
        if backend == "unsloth":  # which patches transformers, so that nothing may be made here before it
            raise InputError("the part `ours` has left no base to load")
        card_base.as_folder(work, scale.config | {"num_hidden_layers": scale.layers}, scale.dtype)
        watch.stamp("written")
    model = schema.Model(name_or_path=str(work / "base"), dtype=scale.dtype, max_length=max(512, scale.row_tokens))
    maker = choose.make_loader(model, card_base.LORA, seed=1, name=backend)
    watch.stamp("imported")
    loaded = maker.for_training(work / "adapter")
    watch.stamp("loaded")
    keep("backend", loaded.backend)
    keep("dtype", loaded.dtype)
    keep("notes", loaded.notes)
    from fast_ft.train.session import TrainSession  # behind Unsloth, which patches transformers

    rows = random_rows(scale.rows, scale.row_tokens, scale.config["vocab_size"])
    task = task_over(rows, [list(range(len(rows)))] * scale.steps, schema.Train(effective_batch_size=len(rows)))
    session = TrainSession(loaded, task, TrainPlan(len(rows), backend=loaded.backend), work / f"stages-{backend}")
    keep("tokens_per_step", sum(len(row.input_ids) for row in rows))
    ours.train(session, watch)
    watch.finish()
    keep("steps", watch.steps)
    keep("gradient", {key: watch.gradient[key] for key in ("step", "sketch") if key in watch.gradient})
    keep("stamps", watch.stamps)


def random_rows(count: int, tokens: int, vocabulary: int) -> list[EncodedRow]:
    """Return rows of random tokens, of which the second half is trained; always the same ones."""
    draw, rows = random.Random(0), []
    for index in range(count):
        ids = [draw.randrange(3, vocabulary) for _ in range(tokens)]
        half = tokens // 2
        rows.append(EncodedRow(str(index), ids, [IGNORE_INDEX] * half + ids[half:]))
    return rows


def task_over(rows: list[EncodedRow], batches: list[list[int]], section: schema.Train) -> TrainTask:
    """Return the task of training one stage over rows, in these batches."""
    job = StageJob(0, "random rows", rows, batches, section.learning_rate)
    return TrainTask([job], section, schema.Carry(), seed=1, pad_id=0)
