"""What is said of a training that has ended: whether a budget ended it, and what it did to the rows that it saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fast_ft.common.folders import expanded
from fast_ft.models import adapter_effect, lora_files
from fast_ft.models.adapter_effect import AdapterEffect
from fast_ft.pipeline import sanity_checks
from fast_ft.recipe.schema import Recipe

if TYPE_CHECKING:  # it loads torch
    from fast_ft.train.session import TrainSession


def judge(session: TrainSession, lines: Sequence[Mapping[str, Any]], recipe: Recipe) -> tuple[list[str], str | None]:
    """Return (what is suspicious in a training that has ended; why its adapter is useless, if it is).

    lines: the training's log. First comes whether a budget ended it. The model has the weights from before training
    afterwards.
    """
    section, early = recipe.train, []
    if session.out_of_time:
        rate = "brought down early" if session.state.is_annealed else "not yet brought down"
        text = f"training ended after step {len(lines)} of {session.task.total}, its learning rate {rate}: "
        early = [f"{text}budget.train_minutes is {recipe.budget.train_minutes:g}"]
    if same := sanity_checks.equals_start(lines, lora_files.weights(session.loaded.model)):
        return [*early, same], None
    effect = _effect(session, len(lines), recipe.model.adapter)
    if effect is None:
        return early, None
    worthless = sanity_checks.rose(effect, section)
    found = worthless or sanity_checks.stands_still(effect, section, len(lines), *early)
    return [*early, *([found] if found else [])], worthless


def _effect(session: TrainSession, steps: int, adapter: str | None) -> AdapterEffect | None:
    """Measure what this number of steps did to rows that they saw; None where the `adapter` before them is gone."""
    task = session.task
    start = expanded(adapter) / "adapter_model.safetensors" if adapter is not None else None
    if start is not None and not start.is_file():
        return None
    batches = [(job, batch) for job in task.jobs for batch in job.batches][:steps]
    seen = {job.rows[index].id: job.rows[index] for job, batch in batches for index in batch}
    return adapter_effect.measure(session.loaded, list(seen.values()), task.pad_id, start)
