"""What did training do to the rows that it saw? Their loss before training, and after it.

Both are of the same rows, so that it does not matter which rows are easy. The log cannot say so much: the loss of a
step depends on which rows the step saw, and in a short training every step sees other ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models import adapter_check, lora_files
from fast_ft.models.loaders.base import LoadedModel

ROWS = 8  #: at most: they take one or two passes


@dataclass(frozen=True)
class AdapterEffect:
    """The mean loss of some rows before and after training, in nats per trained token; each row counts alike.

    `rows` is their number.
    """

    rows: int
    before: float
    after: float


def measure(loaded: LoadedModel, rows: Sequence[EncodedRow], pad_id: int, start: Path | None = None) -> AdapterEffect:
    """Measure a trained model's adapter on up to ROWS of these rows, evenly spread, by the same passes on both sides.

    `start` is the safetensors file of the adapter that training started from; None: a new one, with which the model
    says what the base model does. Afterwards the model evaluates, and has the weights of `start`. Where memory is
    short, long rows count with their first tokens.
    """
    count = min(ROWS, len(rows))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    loaded.model.eval()
    after = _log_probabilities(loaded, chosen, pad_id)
    if start is not None:
        lora_files.load(loaded.model, start)
    with loaded.model.disable_adapter() if start is None else contextlib.nullcontext():
        before = _log_probabilities(loaded, chosen, pad_id)
    losses = [_losses(row, *values) for row, *values in zip(chosen, before, after, strict=True)]
    return AdapterEffect(count, sum(each[0] for each in losses) / count, sum(each[1] for each in losses) / count)


def _log_probabilities(loaded: LoadedModel, rows: Sequence[EncodedRow], pad_id: int) -> list[list[float]]:
    ids, starts = [row.input_ids for row in rows], [adapter_check.first_trained(row) for row in rows]
    return adapter_check.log_probabilities_that_fit(loaded, ids, starts, pad_id, exactly=False)


def _losses(row: EncodedRow, *values: Sequence[float]) -> tuple[float, ...]:
    """Return a row's mean losses over the trained tokens whose log-probabilities are all known."""
    labels = row.labels[adapter_check.first_trained(row) :]
    known = [each for label, *each in zip(labels, *values, strict=False) if label != IGNORE_INDEX]
    return tuple(-sum(each) / len(known) for each in zip(*known, strict=True))
