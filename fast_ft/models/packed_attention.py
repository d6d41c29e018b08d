"""Causal attention over rows that lie one behind the other in one flat row, with no padding between them.

    tokens:  a a a a b b c c c . .     the last ones fill the pass up to its width; they are a row of their own
    starts:  0       4   6     9   11  and 11 again for each place that no row takes

A window of w tokens lets a token attend to itself and the w - 1 before it; rows of up to w tokens do not notice it.

Linear layers do not care where a row begins. Only attention and positions do, so rows of any lengths share a pass and
nothing is spent on padding. On a card one kernel takes all rows: torch's flash attention (flash_attention.py) where the
card has it, else torch's memory-efficient attention with boundaries, which exists for every card from compute
capability 5.0 on, so for a T4. On a CPU each row is attended by itself.

Shapes: T tokens, H heads, G KV heads, D head dimension, S places for rows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fast_ft.common import out_of_memory
from fast_ft.models import flash_attention

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig

NAME = "fast_ft_rows"  #: among transformers' attention implementations
_TOLERANCE = 0.02  #: of the largest value: 16-bit rounding is a fifth of it, a wrong kernel is far outside
_CAUSAL = 1  #: the kernel's custom_mask_type: causal from the top left, row by row
_CAUSAL_LAST = 2  #: from the bottom right: a row's queries are the last of its tokens
#: Programs of the memory-efficient backward kernel, one a row and head, that fill a T4 twice. For fewer, each row's
#: keys are divided over several, which add up q's gradients in memory, one after the other. 8 SMs of an H200 took
#: 4.6 ms for 8 rows of 345 tokens and 32 heads, and 3.8 without the division.
_FILLS = 96


@dataclass(frozen=True)
class PackedRows:
    """Where rows begin: `starts` (S + 1,) int32, rising, the last one T; no row is longer than `longest` tokens."""

    starts: Tensor
    longest: int


#: The rows of the passes that are running, the innermost last; `packed_pass` alone changes it. Attention functions are
#: called by transformers and Unsloth, which pass nothing of ours on. It is one list for all threads: autograd goes
#: backward over a card's work in a thread of its own, where recomputed layers attend once more.
_running: list[PackedRows] = []


@contextlib.contextmanager
def packed_pass(config: PretrainedConfig, rows: PackedRows) -> Iterator[None]:
    """Within, the model with this config attends row by row. The backward pass belongs inside too.

    Passes may be nested: attention keeps to the innermost one's rows.
    """
    _register()
    former, config._attn_implementation = config._attn_implementation, NAME
    _running.append(rows)
    try:
        yield
    finally:
        _running.pop()
        config._attn_implementation = former


def current_rows() -> PackedRows | None:
    """Return the rows of the innermost pass that is running, or None outside of all."""
    return _running[-1] if _running else None


def attend(
    q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, rows: PackedRows, scale: float | None = None,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Return causal attention within each row: (1, T, H, D), from (1, H or G, T, D). Default scale: 1 / sqrt(D)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if q_HTD.is_cuda:
        from fast_ft.models.fused_block.attention_pass import AttentionPass

        q, k, v = (part.transpose(1, 2) for part in (q_HTD, k_GTD, v_GTD))
        how: dict[str, Any] = {"rows": rows, "window": window, "scale": scale}
        out_THD: Tensor = AttentionPass.apply(q, k, v, partial(forward, **how), partial(backward, **how))
        return out_THD
    ends, group = rows.starts.tolist(), q_HTD.shape[1] // k_GTD.shape[1]
    k_GTD, v_GTD = (part.repeat_interleave(group, dim=1) if group > 1 else part for part in (k_GTD, v_GTD))
    mixed = []
    for a, b in itertools.pairwise(ends):
        if a == b:
            continue
        q, k, v = (part[:, :, a:b] for part in (q_HTD, k_GTD, v_GTD))
        mask = window_mask(b - a, b - a, window, q.device) if window is not None and window < b - a else None
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        mixed.append(out.transpose(1, 2))
    return torch.cat(mixed, dim=1)


def window_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return (queries, keys), true where a token attends: a row's last `queries` tokens to all of its `keys` tokens."""
    import torch

    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def forward(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, rows: PackedRows, window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Attend as `attend` does, from (1, T, H or G, D), for a caller that goes backward by hand.

    Return (attention's result, (1, T, H, D); the tensors that `backward` needs as `kept`).
    """
    import torch

    if q_THD.is_cuda:
        out_THD, *kept = one_kernel(q_THD, k_TGD, v_TGD, rows, scale=scale, window=window)
        return out_THD, tuple(kept[:3])
    with torch.no_grad():
        q, k, v = (part.transpose(1, 2) for part in (q_THD, k_TGD, v_TGD))
        return attend(q, k, v, rows, scale, window), ()


def backward(
    grad_THD: Tensor, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, out_THD: Tensor, kept: tuple[Tensor, ...],
    rows: PackedRows, window: int | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, (T, H or G, D), given that of the result and `forward`'s."""
    import torch

    if not q_THD.is_cuda:
        with torch.enable_grad():
            q, k, v = (part.detach().transpose(1, 2).requires_grad_() for part in (q_THD, k_TGD, v_TGD))
            dq, dk, dv = torch.autograd.grad(attend(q, k, v, rows, scale, window), (q, k, v), grad_THD)
        return dq.transpose(1, 2)[0], dk.transpose(1, 2)[0], dv.transpose(1, 2)[0]
    hiding = _hiding(window, rows)
    if flash_attention.takes(q_THD):
        return flash_attention.backward(
            grad_THD, q_THD, k_TGD, v_TGD, out_THD, kept, rows.starts, rows.longest, scale=scale, window=hiding
        )  # fmt: skip
    (_, tokens, heads, size), kv_heads = q_THD.shape, k_TGD.shape[2]
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        grad_THD, q_THD, *_repeated(q_THD, k_TGD, v_TGD), None, out_THD, rows.starts, rows.starts, rows.longest,
        rows.longest, kept[0], 0.0, kept[1], kept[2], _CAUSAL, False, scale=scale, window_size=hiding,
        num_splits_key=1 if -(-tokens // rows.longest) * heads >= _FILLS else None,
    )  # fmt: skip
    if kv_heads < heads:
        dk, dv = (part.view(1, tokens, kv_heads, heads // kv_heads, size).sum(3) for part in (dk, dv))
    return dq[0], dk[0], dv[0]


def one_kernel(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, rows: PackedRows, *, scale: float | None = None,
    window: int | None = None, goes_backward: bool = True, keys: PackedRows | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Attend on a card, in one kernel, from (1, T, H or G, D).

    With `keys`, rows have more keys than queries, and their queries are the last of their tokens; forward only. Return
    the kernel's results: first what `attend` returns, then what the backward kernel needs.
    """
    import torch

    hiding = _hiding(window, rows)
    if flash_attention.takes(q_THD):
        return flash_attention.forward(
            q_THD, k_TGD, v_TGD, rows.starts, rows.longest, scale=scale, window=hiding,
            keys=None if keys is None else (keys.starts, keys.longest),
        )  # fmt: skip
    mask, of_keys = (_CAUSAL, rows) if keys is None else (_CAUSAL_LAST, keys)
    return torch.ops.aten._efficient_attention_forward(
        q_THD, *_repeated(q_THD, k_TGD, v_TGD), None, rows.starts, of_keys.starts, rows.longest, of_keys.longest, 0.0,
        mask, goes_backward, scale=scale, window_size=hiding,
    )  # fmt: skip


def _hiding(window: int | None, rows: PackedRows) -> int | None:
    """Return the window where it can hide a token of a row, else None."""
    return window if window is not None and window < rows.longest else None


def check(like: Tensor, heads: int, kv_heads: int, size: int) -> str | None:
    """Return why attention over packed rows cannot be relied on, forward or backward, or None.

    `like` is a tensor of the device and dtype to check, `size` a head's dimension. Rows of 1, 37 and 62 tokens, and
    of 1, 37, 31 and 31, for which keys may be divided otherwise, are compared with each row's own attention, written
    out in fp32, all of it and within a window of 20 tokens.
    """
    import torch

    cuts = [([0, 1, 38, 38, 100], 62), ([0, 1, 38, 38, 69, 100], 37)]
    kinds = [PackedRows(torch.tensor(cut, dtype=torch.int32, device=like.device), longest) for cut, longest in cuts]
    draw = torch.Generator(like.device).manual_seed(0)

    def normal(count: int) -> Tensor:
        """Return random numbers like `like`, (1, T, count, D)."""
        return torch.randn(1, 100, count, size, generator=draw, device=like.device).to(like.dtype)

    try:
        q, k, v, grad = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
        for rows, window in itertools.product(kinds, (None, 20)):
            out, kept = forward(q, k, v, rows, window)
            found = (out, torch.cat(backward(grad, q, k, v, out, kept, rows, window), dim=1))
            right = _written_out(q, k, v, grad, rows, window)
            for name, made, expected in zip(("result", "gradient"), found, right, strict=True):
                difference = ((made.float() - expected).abs().max() / expected.abs().max()).item()
                if not difference <= _TOLERANCE:  # a NaN, too
                    return f"attention's {name} differs from each row's own attention by {difference:.3g}"
    except Exception as error:  # a kernel on a card that it was not built for may fail in any way
        if out_of_memory.is_short(error):
            raise
        return f"attention over packed rows does not run here ({type(error).__name__}: {str(error)[:200]})"
    return None


def _written_out(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, grad_THD: Tensor, rows: PackedRows, window: int | None
) -> list[Tensor]:
    """Return each row's own attention in fp32, (1, T, H, D), and the gradients side by side, (T, H + 2 G, D)."""
    import torch

    with torch.enable_grad():
        leaves = [part.detach().float().requires_grad_() for part in (q_THD, k_TGD, v_TGD)]
        q_HTD, k_HTD, v_HTD = (part[0].transpose(0, 1) for part in (leaves[0], *_repeated(q_THD, *leaves[1:])))
        mixed = []
        for a, b in itertools.pairwise(rows.starts.tolist()):
            scores_HTT = q_HTD[:, a:b] @ k_HTD[:, a:b].transpose(1, 2) / q_HTD.shape[2] ** 0.5
            hidden_TT = ~window_mask(b - a, b - a, window, q_HTD.device)
            mixed.append(scores_HTT.masked_fill(hidden_TT, float("-inf")).softmax(dim=-1) @ v_HTD[:, a:b])
        # Times 1: cuBLAS warns where a thread's first work on a card is a product, and autograd's thread begins here.
        out_THD = torch.cat(mixed, dim=1).transpose(0, 1)[None] * 1.0
        grads = torch.autograd.grad(out_THD, leaves, grad_THD.float())
    return [out_THD.detach(), torch.cat(grads, dim=2)[0]]


def _repeated(q_THD: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Return keys and values with each head repeated for its queries' heads: the kernel knows no grouped heads."""
    group = q_THD.shape[2] // parts[0].shape[2]
    return tuple(part.repeat_interleave(group, dim=2) if group > 1 else part for part in parts)


def _register() -> None:
    """Make NAME known to transformers. It is given no mask function, so transformers builds no mask for it."""
    from transformers import AttentionInterface

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, _forward)


def _forward(
    module: nn.Module, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend as transformers asks it of an attention function, which it tells the layer's window.

    The mask is not read: there is none (`_register`).
    """
    rows = current_rows()
    assert rows is not None, "a model keeps this attention only within `packed_pass`"
    return attend(q_HTD, k_GTD, v_GTD, rows, scaling, sliding_window), None
