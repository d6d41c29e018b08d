"""Do two ways of training do the same work? One optimizer step of each, compared where it can be seen.

A comparison of speed counts only between steps that agree. On random weights a loss is near ln(vocabulary) whatever
is masked, so agreement is shown on a trained model, with an adapter whose B matrices are not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import EncodedRow
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train.session import TrainSession
from fast_ft.train.task import TrainCallbacks, TrainTask


@dataclass(frozen=True)
class StepRecord:
    """One step: trained tokens, loss in nats per token, the adapter's gradients (fp32, on the CPU) by name."""

    supervised_tokens: int
    loss: float
    gradients: dict[str, Any]

    @property
    def grad_norm(self) -> float:
        """Return the norm of all gradients together."""
        return float(sum(float((g.double() ** 2).sum()) for g in self.gradients.values()) ** 0.5)


def first_step(
    loaded: LoadedModel,
    rows: Sequence[EncodedRow],
    *,
    pad_id: int,
    plan: TrainPlan,
    work_folder: Path,
    seed: int = 3407,
) -> StepRecord:
    """Run one step over `rows` through the real trainer and record it, before the optimizer uses the gradients."""
    step = RowsInSteps(rows, [list(range(len(rows)))])
    gradients, log = run_steps(loaded, step, pad_id=pad_id, plan=plan, work_folder=work_folder, seed=seed)
    return StepRecord(log[0]["supervised_tokens"], log[0]["loss"], gradients[0])


@dataclass(frozen=True)
class RowsInSteps:
    """Rows, and which of them each step takes."""

    rows: Sequence[EncodedRow]
    steps: list[list[int]]


def run_steps(
    loaded: LoadedModel, work: RowsInSteps, *, pad_id: int, plan: TrainPlan, work_folder: Path, seed: int = 3407,
    stands_still: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Run the steps through the real trainer; return gradients by name, and the log of all steps.

    The gradients are those of the first step alone; or those of each one where the adapter `stands_still`, at a
    learning rate of 0.
    """
    from transformers import TrainerCallback

    from fast_ft.train.sft_trainer import StageTrainer

    # Clipping at a huge norm divides the fp16 loss scale out and leaves the gradients as they are.
    size = len(work.steps[0])
    section = schema.Train(effective_batch_size=size, max_grad_norm=1e9, optim="adamw_torch", warmup_steps=0)
    log: list[dict[str, Any]] = []
    job = StageJob(0, "agreement", work.rows, work.steps, 0.0 if stands_still else section.learning_rate)
    task = TrainTask([job], section, schema.Carry(), seed, pad_id)
    session = TrainSession(loaded, task, plan, work_folder, TrainCallbacks(on_step=log.append))
    gradients: list[dict[str, Any]] = []

    class Capture(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            """Copy a step's gradients, before the optimizer uses them."""
            if stands_still or not gradients:
                named = loaded.model.named_parameters()
                gradients.append(
                    {name: w.grad.detach().float().cpu().clone() for name, w in named if w.grad is not None}
                )

    trainer = StageTrainer(session)
    trainer.add_callback(Capture())
    trainer.train()
    return gradients, log


def disagreements(
    a: StepRecord, b: StepRecord, *, loss: float = 0.002, grad_norm: float = 0.02, cosine: float = 0.99
) -> list[str]:
    """Say where two steps differ: trained tokens exactly, loss and gradient norm by share, gradients by cosine."""
    found = []
    if a.supervised_tokens != b.supervised_tokens:
        found.append(f"trained tokens: {a.supervised_tokens} and {b.supervised_tokens}")
    if not abs(a.loss - b.loss) <= loss * abs(a.loss):
        found.append(f"loss: {a.loss:.6f} and {b.loss:.6f}, over {loss:.1%} apart")
    if not abs(a.grad_norm - b.grad_norm) <= grad_norm * a.grad_norm:
        found.append(f"gradient norm: {a.grad_norm:.6f} and {b.grad_norm:.6f}, over {grad_norm:.0%} apart")
    if a.gradients.keys() != b.gradients.keys():
        odd = sorted(a.gradients.keys() ^ b.gradients.keys())
        return [*found, f"weights with a gradient on one side only: {len(odd)}, such as {odd[0]}"]
    worst, name = min((cosine_of(a.gradients[name], b.gradients[name]), name) for name in a.gradients)
    if not worst >= cosine:
        found.append(f"gradient of {name}: cosine {worst:.4f}, under {cosine}")
    return found


def cosine_of(a: Any, b: Any) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else float(bool((a == b).all()))
