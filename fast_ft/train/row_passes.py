"""Passes of a model on the general way: each row by itself, through the model's own forward pass and attention.

Nothing of how the model attends, turns positions or scales its logits is assumed. Rows share no pass, so nothing is
padded and no mask can be wrong; that is slower than rows side by side, and cannot be captured in a graph.

Shapes: T tokens of a micro-batch, t of one row, K places of a row, S places for rows, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.train.forward_backward import Passes
from fast_ft.train.micro_batch import MicroBatch, lay_out


class RowPasses(Passes):
    """Passes over micro-batches of a model that only its own forward pass knows. They are called as Passes are."""

    def follow(self, plan: TrainPlan) -> None:
        """Follow this plan from here on, without graphs: rows have lengths of their own."""
        super().follow(replace(plan, capture=False))

    def run(self, tokens_4T: Tensor, starts_S: Tensor) -> Tensor:
        """Run the passes row by row over a micro-batch on the device; return its loss as a call does."""
        total = torch.zeros((), device=self.device)
        for row_4t in _rows(tokens_4T, starts_S):
            loss = self._row_loss(row_4t) / self._supervised
            (loss * self._scale).backward()
            total += loss.detach()
        return total

    def loss(self, tokens_4T: Tensor, starts_S: Tensor, longest: int) -> Tensor:
        """Return the loss (0-d) of a micro-batch on the device, summed over its trained tokens, row by row."""
        total = torch.zeros((), device=self.device)
        for row_4t in _rows(tokens_4T, starts_S):
            if (row_4t[1] != IGNORE_INDEX).any():
                total += self._row_loss(row_4t)
        return total

    def blank(self, tokens: int) -> MicroBatch:
        """Return a micro-batch of this width that trains nothing: of the longest rows, which take the most memory."""
        each = min(self.shape.longest, tokens)
        rows = [EncodedRow("", [self.shape.pad_id] * each, [IGNORE_INDEX] * each)] * (tokens // each)
        return lay_out(rows, tokens=tokens, places=len(rows), pad_id=self.shape.pad_id)

    def _row_loss(self, tokens_4t: Tensor) -> Tensor:
        ids_1t, targets_1t, _, lengths_1t = tokens_4t[:, None].unbind(0)
        if self._noise is not None:
            self._noise.row_lengths_1T = lengths_1t
        kept = (targets_1t[0] != IGNORE_INDEX).nonzero()[:, 0]
        if not len(kept):  # a rehearsal's row trains nothing, and takes the memory of one that trains
            kept = torch.arange(ids_1t.shape[1], device=ids_1t.device)
        with self._autocast():
            logits_KV = logits_at(self._causal, ids_1t, kept)
            return cross_entropy(logits_KV.float(), targets_1t[0][kept], ignore_index=IGNORE_INDEX, reduction="sum")


def _rows(tokens_4T: Tensor, starts_S: Tensor) -> list[Tensor]:
    """Return the rows of a micro-batch, each 4t."""
    return [tokens_4T[:, start:stop] for start, stop in itertools.pairwise(starts_S.tolist()) if start < stop]


def logits_at(model: Any, ids_1t: Tensor, places_K: Tensor) -> Tensor:
    """Return a row's logits at some of its places, KV, by the model's own forward pass."""
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": places_K} if few else {}
    logits_KV = model(input_ids=ids_1t, use_cache=False, **kept).logits[0]
    return logits_KV if few else logits_KV[places_K]
