"""LoRA's matrices as products take them: in 16 bits, and those of layers that share an input as one.

The matrices that are trained are fp32. They change between passes only, so all of them are cast at the beginning of a
pass, by few kernels, and not layer by layer.

    A of q      B of q    0     0
    A of k        0    B of k   0       with zeros between, one product does what three would
    A of v        0       0   B of v

Shapes: E inputs, N outputs of all layers of a group, R their ranks, n outputs and r rank of one layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fast_ft.models.packed_attention import PackedRows


_JOINT = 64  #: the largest sum of ranks of which B's are one matrix


class LoraCopies:
    """Copies of all LoRA matrices of a model's blocks, in the dtype of the products."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._rows: PackedRows | None = None

    def take(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return where copies of a group's matrices A, B, A, B, ... will stand: A, RE, and B: one, NR, or each, nr.

        It is one where ranks are small: the zeros between take memory. `weights` are parameters, and are looked at
        again for each pass: their memory may be another one then.
        """
        as_, bs = weights[::2], weights[1::2]
        ranks = [len(a) for a in as_]
        like = {"dtype": self._dtype, "device": as_[0].device}
        a_RE = torch.empty(sum(ranks), as_[0].shape[1], **like)
        if sum(ranks) <= _JOINT:
            whole_NR = torch.zeros(sum(len(b) for b in bs), sum(ranks), **like)
            parts = zip(whole_NR.split([len(b) for b in bs]), ranks, itertools.accumulate(ranks), strict=True)
            taken, b_nr = [whole_NR], [part_nR[:, end - rank : end] for part_nR, rank, end in parts]
        else:
            taken = b_nr = [torch.empty(b.shape, **like) for b in bs]
        for weight, copy in zip([*as_, *bs], [*a_RE.split(ranks), *b_nr], strict=True):
            if weight.numel():
                self._weights.append(weight)
                self._copies.append(copy)
        return a_RE, taken

    def renew(self, rows: PackedRows) -> None:
        """Copy the matrices as they are now, once for each pass: `rows` are the pass's own."""
        if rows is self._rows:
            return
        self._rows = rows
        if self._copies:
            torch._foreach_copy_(self._copies, [weight.detach() for weight in self._weights])
