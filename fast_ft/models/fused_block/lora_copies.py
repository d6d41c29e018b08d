"""LoRA's matrices as products take them: in 16 bits, and side by side in a group of layers that share an input.

The matrices that are trained are fp32. They change between passes only, so all of them are cast at the beginning of a
pass, by few kernels, and not layer by layer.

Shapes: E inputs, n outputs of one layer, r rank of one layer, R ranks of all layers of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fast_ft.models.packed_attention import PackedRows


class LoraCopies:
    """Copies of all LoRA matrices of a model's blocks, in the dtype of the products."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._rows: PackedRows | None = None

    def take(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return where copies of a group's matrices A, B, A, B, ... will stand: (A side by side, RE; each B, nr).

        `weights` are parameters, and are looked at again for each pass: their memory may be another one then.
        """
        as_, bs = weights[::2], weights[1::2]
        a_RE = torch.empty(sum(map(len, as_)), as_[0].shape[1], dtype=self._dtype, device=as_[0].device)
        b_nr = [torch.empty(b.shape, dtype=self._dtype, device=b.device) for b in bs]
        for weight, copy in zip([*as_, *bs], [*a_RE.split([len(a) for a in as_]), *b_nr], strict=True):
            if weight.numel():
                self._weights.append(weight)
                self._copies.append(copy)
        return a_RE, b_nr

    def renew(self, rows: PackedRows) -> None:
        """Copy the matrices as they are now, once for each pass: `rows` are the pass's own."""
        if rows is self._rows:
            return
        self._rows = rows
        with torch.no_grad():
            torch._foreach_copy_(self._copies, [weight.detach() for weight in self._weights])
