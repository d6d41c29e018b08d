"""Where several processes train one task: they start from one state, agree on when to stop, and are compared.

Each function is called by all processes at the same point. Each process's weights stay equal to the others', since
gradients are added up before they are used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fast_ft.common.process_group import Ranks
from fast_ft.train import state


@dataclass(frozen=True)
class Agreement:
    """What all processes do next.

    They stop where one was asked to (`interrupted`) or a budget is used up (`time_is_up`). The learning rate goes down
    from `anneal_from` to `stop_at`; see state.TrainState.
    """

    interrupted: bool = False
    time_is_up: bool = False
    anneal_from: int = 0
    stop_at: int | None = None


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


def agree(ranks: Ranks, here: Agreement) -> Agreement:
    """Return what all processes do, from what each would do by its own clock and signals."""
    said = ranks.most([here.interrupted, here.time_is_up, here.anneal_from, here.stop_at or 0])
    return Agreement(bool(said[0]), bool(said[1]), said[2], said[3] or None)


def have_equal_weights(ranks: Ranks, weights: Tensor) -> bool:
    """Return whether all processes' weights are equal to the bit, as equal sums on equal cards leave them."""
    if ranks.size == 1:
        return True
    bits = int(weights.detach().float().view(torch.int32).sum(dtype=torch.int64))
    most, least = ranks.most([bits, -bits])
    return most == -least
