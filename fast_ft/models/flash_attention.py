"""torch's flash attention over packed rows: cards of compute capability 8.0 and newer, 16-bit numbers.

It is built into torch (Dao, FlashAttention-2, arXiv 2307.08691) and takes the same boundaries of rows as the
memory-efficient kernel, which every card has. A T4 (7.5) has no flash attention. torch's own switch is respected:
torch.backends.cuda.enable_flash_sdp(False) turns it off here, too, and an emulation of a T4 does that.

Shapes: T tokens, H heads, G KV heads, D head dimension, S places for rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_OLDEST = (8, 0)  #: compute capability
_WIDEST = 128  #: head dimension


def takes(q_THD: Tensor) -> bool:
    """Return whether flash attention takes heads like these, (1, T, H, D), on the card that they are on."""
    import torch

    return (
        q_THD.is_cuda
        and q_THD.dtype in (torch.float16, torch.bfloat16)
        and q_THD.shape[-1] % 8 == 0
        and q_THD.shape[-1] <= _WIDEST
        and torch.cuda.get_device_capability(q_THD.device) >= _OLDEST
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()
    )


def forward(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    starts: Tensor,
    longest: int,
    *,
    scale: float | None,
    window: int | None,
    keys: tuple[Tensor, int] | None = None,
) -> tuple[Any, ...]:
    """Attend within each row, from (1, T, H or G, D); `starts` and `longest` are as in PackedRows.

    `keys` are those of the keys where rows have more of them than queries, which are then the last. Return first the
    result, (1, T, H, D), then the three tensors that `backward` needs as `kept`.
    """
    import torch

    key_starts, most_keys = keys or (starts, longest)
    out_THD, *kept = torch.ops.aten._flash_attention_forward(
        q_THD[0], k_TGD[0], v_TGD[0], starts, key_starts, longest, most_keys, 0.0, True, False, scale=scale,
        **_sizes(window),
    )  # fmt: skip
    return (out_THD[None], *kept[:3])


def backward(
    grad_THD: Tensor, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, out_THD: Tensor, kept: tuple[Tensor, ...],
    starts: Tensor, longest: int, *, scale: float | None, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, (T, H or G, D)."""
    import torch

    logsumexp_HT, random_state, unused = kept
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad_THD[0], q_THD[0], k_TGD[0], v_TGD[0], out_THD[0], logsumexp_HT, starts, starts, longest, longest, 0.0,
        True, random_state, unused, scale=scale, **_sizes(window),
    )  # fmt: skip
    return made


def _sizes(window: int | None) -> dict[str, int]:
    """Return the window as the operator counts it: the tokens on either side of a token's own."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
