"""The loss that is quoted of a training: its mean over an epoch. The loss of one step hangs on which rows it saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def first_and_last(
    lines: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], batch: int
) -> tuple[float, float] | None:
    """Return the mean loss (nats per token) over the first and over the last epoch; None without a finite loss.

    lines: log.jsonl's. stages: the manifest's, {"name", "ids"} and perhaps "epoch_rows". batch: rows of a step. The
    last epoch is the last steps of the last stage, as many as an epoch of it has, wherever training ended. Both are
    the same where there was one.
    """
    if not lines:
        return None
    steps = {stage["name"]: math.ceil(stage.get("epoch_rows", len(stage["ids"])) / batch) for stage in stages}
    first = _of(lines, lines[0]["stage"])[: steps.get(lines[0]["stage"])]
    last = _of(lines, lines[-1]["stage"])[-steps.get(lines[-1]["stage"], 0) :]
    means = [_mean(first), _mean(last)]
    return (means[0], means[1]) if all(map(math.isfinite, means)) else None


def sentence(lines: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], batch: int) -> str | None:
    """Return "the mean loss per token went from 2.10 in the first epoch to 0.24 in the last", or None."""
    found = first_and_last(lines, stages, batch)
    if found is None:
        return None
    first, last = found
    if first == last:
        return f"the mean loss per token was {first:.2f} over its one epoch"
    return f"the mean loss per token went from {first:.2f} in the first epoch to {last:.2f} in the last"


def _of(lines: Sequence[Mapping[str, Any]], stage: str) -> list[float]:
    return [line["loss"] for line in lines if line["stage"] == stage]


def _mean(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan
