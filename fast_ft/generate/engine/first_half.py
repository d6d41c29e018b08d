"""LoRA's first half, x A: the kernel that makes x computes it too, so that it costs no launch of its own.

Such a kernel is divided over a row's columns. Each program multiplies its columns with their rows of A; the one that
comes last adds up what all of them left, always in the same order.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

#: Rows up to which it is part of a norm. Timed on an H200, 48 ranks: a norm of 62 rows takes 13.4 us with it, 9.1 with
#: a launch for it behind, and 3.3 without it; one of 16 rows 7.3, 7.5 and 3.2.
TOGETHER = 16
MOST_ROWS = 4096  #: counters for as many rows, or rows times heads


class FirstHalf(NamedTuple):
    """A and where x A goes: `a_ER` has its inputs in the model's order and a multiple of 16 ranks, `xa_TR` is made."""

    a_ER: Tensor
    xa_TR: Tensor


def first_half(a_ER: Tensor, tokens: int) -> FirstHalf:
    """Return A with an empty product for that many rows."""
    return FirstHalf(a_ER, a_ER.new_empty(tokens, a_ER.shape[1]))


@cache
def counters(device: torch.device, kind: str) -> Tensor:
    """Return counters of programs, which are zero before and after each launch. `kind`: whose, where a kernel has two.

    A stream runs its launches one after another, so all of them share these.
    """
    return torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
