"""What did training do to the rows that it saw? Their loss with the adapter, and without it.

Both are of the same rows, so that it does not matter which rows are easy. The log cannot say so much: the loss of a
step depends on which rows the step saw, and in a short training every step sees other ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models import adapter_check
from fast_ft.models.loaders.base import LoadedModel

ROWS = 8  #: at most: a card takes them in one or two passes


@dataclass(frozen=True)
class AdapterEffect:
    """The mean loss of some rows, in nats per trained token, each row counting alike: without the adapter and with it.

    `rows` is their number.
    """

    rows: int
    without: float
    tuned: float


def measure(loaded: LoadedModel, rows: Sequence[EncodedRow], pad_id: int) -> AdapterEffect:
    """Measure a trained model's adapter on up to ROWS of these rows, evenly spread. The model evaluates afterwards.

    Where memory is short, long rows count with their first tokens.
    """
    count = min(ROWS, len(rows))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    loaded.model.eval()
    tuned = _log_probabilities(loaded, chosen, pad_id)
    with loaded.model.disable_adapter():
        plain = _log_probabilities(loaded, chosen, pad_id)
    losses = [_losses(row, *values) for row, *values in zip(chosen, plain, tuned, strict=True)]
    return AdapterEffect(count, sum(each[0] for each in losses) / count, sum(each[1] for each in losses) / count)


def _log_probabilities(loaded: LoadedModel, rows: Sequence[EncodedRow], pad_id: int) -> list[list[float]]:
    ids, starts = [row.input_ids for row in rows], [adapter_check.first_trained(row) for row in rows]
    return adapter_check.log_probabilities_that_fit(loaded, ids, starts, pad_id)


def _losses(row: EncodedRow, plain: Sequence[float], tuned: Sequence[float]) -> tuple[float, float]:
    """Return a row's mean losses over the trained tokens of which both log-probabilities are known."""
    labels = row.labels[adapter_check.first_trained(row) :]
    pairs = [pair for label, *pair in zip(labels, plain, tuned, strict=False) if label != IGNORE_INDEX]
    without, with_it = (-sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return without, with_it
