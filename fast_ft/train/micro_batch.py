"""A micro-batch on the host: rows one behind the other, with their targets and positions.

Shapes: T tokens of a pass, S places for rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow


@dataclass(frozen=True)
class MicroBatchShape:
    """What every micro-batch of a training has in common.

    It has room for `places` rows; no row is longer than `longest` tokens; `pad_id` fills it up to its width.
    """

    places: int
    longest: int
    pad_id: int


@dataclass(frozen=True)
class MicroBatch:
    """Some rows on the host, one behind the other.

    `tokens_4T` (int64) holds ids, targets, positions and the length of each token's row; `starts_S` (S + 1, int32) is
    as in packed_attention.Rows.
    """

    tokens_4T: Tensor
    starts_S: Tensor

    def pinned(self) -> MicroBatch:
        """Return it in memory from which the card copies while the host goes on."""
        return MicroBatch(self.tokens_4T.pin_memory(), self.starts_S.pin_memory())

    def to(self, device: str) -> tuple[Tensor, Tensor]:
        """Return both tensors on a device."""
        return self.tokens_4T.to(device, non_blocking=True), self.starts_S.to(device, non_blocking=True)


def lay_out(rows: Sequence[EncodedRow], *, tokens: int, places: int, pad_id: int) -> MicroBatch:
    """Return the rows one behind the other, `tokens` in all, with `places` for rows; padding is one row more.

    The target of a token is the label of the next token of its row; the target of a row's last token is IGNORE_INDEX.
    """
    assert len(rows) <= places, "a micro-batch has at most the effective batch's rows"
    lengths = [len(row.input_ids) for row in rows]
    padding = tokens - sum(lengths)
    ids = [token for row in rows for token in row.input_ids] + [pad_id] * padding
    targets = [label for row in rows for label in [*row.labels[1:], IGNORE_INDEX]] + [IGNORE_INDEX] * padding
    each = [*lengths, padding]
    positions = [position for length in each for position in range(length)]
    own = [length for length in each for _ in range(length)]
    starts = [0, *itertools.accumulate(lengths)]
    starts += [tokens] * (places + 2 - len(starts))
    return MicroBatch(torch.tensor([ids, targets, positions, own]), torch.tensor(starts, dtype=torch.int32))


def blank(tokens: int, *, places: int, longest: int, pad_id: int) -> MicroBatch:
    """Return a micro-batch that trains nothing: rows of at most `longest` tokens, all targets masked."""
    each = min(longest, -(-tokens // places))
    rows = [EncodedRow("", [pad_id] * each, [IGNORE_INDEX] * each) for _ in range(tokens // each)]
    return lay_out(rows, tokens=tokens, places=places, pad_id=pad_id)
