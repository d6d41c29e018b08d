"""Causal attention over rows that lie one behind the other in one flat row, with no padding between them.

    tokens:  a a a a b b c c c . .     the last ones fill the pass up to its width; they are a row of their own
    starts:  0       4   6     9   11  and 11 again for each place that no row takes

Linear layers do not care where a row begins. Only attention and positions do, so rows of any lengths share a pass and
nothing is spent on padding. On a card one kernel takes all rows (torch's memory-efficient attention with boundaries:
it exists for every card from compute capability 5.0 on, so for a T4); on a CPU each row is attended by itself.

Shapes: T tokens, H heads, G KV heads, D head dimension, S places for rows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NAME = "fast_ft_rows"  #: among transformers' attention implementations
_CAUSAL = 1  #: the kernel's custom_mask_type: causal from the top left, row by row


@dataclass(frozen=True)
class Rows:
    """Where rows begin: `starts` (S + 1,) int32, rising, the last one T; no row is longer than `longest` tokens."""

    starts: Any
    longest: int


_current: Rows | None = None


@contextlib.contextmanager
def over(config: Any, rows: Rows) -> Iterator[None]:
    """Within, the model with this config attends row by row; its backward pass belongs inside too."""
    global _current
    before = config._attn_implementation
    _register()
    config._attn_implementation, _current = NAME, rows
    try:
        yield
    finally:
        config._attn_implementation, _current = before, None


def current() -> Rows | None:
    """Return the rows of the pass that is running."""
    return _current


def attend(q_HTD: Any, k_GTD: Any, v_GTD: Any, rows: Rows, scale: float | None = None) -> Any:
    """Return what each token gets from its row's tokens up to itself: (1, T, H, D), from (1, H or G, T, D)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    group = q_HTD.shape[1] // k_GTD.shape[1]
    if group > 1:  # the kernel knows no grouped heads
        k_GTD, v_GTD = k_GTD.repeat_interleave(group, dim=1), v_GTD.repeat_interleave(group, dim=1)
    if q_HTD.is_cuda:
        q_THD, k_THD, v_THD = (part.transpose(1, 2) for part in (q_HTD, k_GTD, v_GTD))
        return torch.ops.aten._efficient_attention_forward(
            q_THD, k_THD, v_THD, None, rows.starts, rows.starts, rows.longest, rows.longest,
            0.0, _CAUSAL, torch.is_grad_enabled(), scale=scale,
        )[0]  # fmt: skip
    ends = rows.starts.tolist()
    mixed = [
        scaled_dot_product_attention(
            q_HTD[:, :, a:b], k_GTD[:, :, a:b], v_GTD[:, :, a:b], is_causal=True, scale=scale
        ).transpose(1, 2)
        for a, b in itertools.pairwise(ends)
        if a < b
    ]
    return torch.cat(mixed, dim=1)


def _register() -> None:
    """Make NAME known to transformers. It gets no mask function, so transformers builds no mask for it."""
    from transformers import AttentionInterface

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, _forward)


def _forward(
    module: Any, q: Any, k: Any, v: Any, attention_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Any, None]:
    """transformers' signature of an attention function."""
    assert _current is not None, "a model keeps this attention only within `over`"
    return attend(q, k, v, _current, scaling), None
