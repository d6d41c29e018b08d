"""Where several processes train one task: they start from one state, and their weights are compared.

Each function is called by all processes at the same point. The processes' weights stay equal, since gradients are added
up before they are used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fast_ft.common.process_group import Ranks
from fast_ft.train import state


def share_state(ranks: Ranks, save: Callable[[Path], None], resume: Callable[[Path], None]) -> None:
    """Let every process go on from the first one's state, as from a checkpoint: one saves it, the others resume."""
    if ranks.size == 1:
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if ranks.first:
            save(root)
        for name in state.FILES:
            data = ranks.share_bytes((root / name).read_bytes() if ranks.first else b"")
            if not ranks.first:
                (root / name).write_bytes(data)
        if not ranks.first:
            resume(root)


def have_equal_weights(ranks: Ranks, weights: Tensor) -> bool:
    """Return whether all processes' weights are equal to the bit, as equal sums on equal cards leave them."""
    if ranks.size == 1:
        return True
    bits = int(weights.detach().float().view(torch.int32).sum(dtype=torch.int64))
    most, least = ranks.most([bits, -bits])
    return most == -least
