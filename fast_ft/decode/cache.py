"""The KV cache of all rows: pages of 16 tokens, handed out as rows grow, and attention over them.

A row holds only the pages that it has filled, wherever they lie, so 1,024 tokens that an answer may take cost nothing
before it takes them, and a row that ends leaves nothing to be moved.

    table:  row 0 -> pages 3, 1      cells:  page 1        page 2        page 3
            row 1 -> page 2                  [row 0 16..31][row 1 0..15][row 0 0..15]

Page 0 belongs to no row: slots without one write there.

Shapes: S rows, T tokens, H heads, G KV heads, D head dimension, C columns, W pages in a row of the table.
"""

from __future__ import annotations

from typing import Any

from fast_ft.progress import note

PAGE = 16  #: tokens


def pages_for(tokens: int) -> int:
    """Return the pages that so many tokens fill."""
    return -(-tokens // PAGE)


class Cache:
    """Keys and values of every layer, and which pages are free."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, pages: int, dtype: Any, device: Any) -> None:
        import torch

        self.pages = pages
        shape = (layers, (pages + 1) * PAGE, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.kernel = _kernel(self.keys)
        self.clear()

    def clear(self) -> None:
        """Make every page free."""
        self.free = list(range(self.pages, 0, -1))

    def write(self, layer: int, cell_T: Any, keys_TGD: Any, values_TGD: Any) -> None:
        """Put the keys and values of T tokens into their cells."""
        self.keys[layer].index_copy_(0, cell_T, keys_TGD)
        self.values[layer].index_copy_(0, cell_T, values_TGD)

    def attend(self, layer: int, q_SHD: Any, table_SW: Any, length_S: Any, columns: int) -> Any:
        """Attention of one token of each row over its first `length_S` + 1 cells, its own included; SHD.

        `columns`, a multiple of PAGE, is at least the longest row's; only the way without a kernel needs it.
        """
        if self.kernel is not None:
            return self.kernel(q_SHD, self.keys[layer], self.values[layer], table_SW, length_S, page=PAGE)
        return gathered(q_SHD, self.keys[layer], self.values[layer], table_SW, length_S, columns)


def gathered(q_SHD: Any, keys: Any, values: Any, table_SW: Any, length_S: Any, columns: int) -> Any:
    """`Cache.attend` in plain torch: each row's cells are copied side by side. The kernel's reference."""
    import torch

    offset_P = torch.arange(PAGE, device=table_SW.device)
    cell_SC = (table_SW[:, : columns // PAGE, None] * PAGE + offset_P).flatten(1)
    hidden_SC = torch.arange(columns, device=table_SW.device) > length_S[:, None]
    # what a cell held before must not count, not even as 0 * NaN
    k_SCGD, v_SCGD = (part[cell_SC].masked_fill(hidden_SC[..., None, None], 0.0) for part in (keys, values))
    return _sdpa(q_SHD[:, None], k_SCGD, v_SCGD, mask=~hidden_SC[:, None, None])[:, 0]


def causal(q_THD: Any, keys_TGD: Any, values_TGD: Any) -> Any:
    """Attention of a row's last T tokens over all of it, each over those up to itself; THD."""
    import torch

    count, whole = len(q_THD), len(keys_TGD)
    mask = None
    if 1 < count < whole:
        mask = torch.ones(count, whole, dtype=torch.bool, device=q_THD.device).tril(whole - count)
    parts = (q_THD[None], keys_TGD[None], values_TGD[None])
    return _sdpa(*parts, mask=mask, is_causal=1 < count == whole)[0]


def _sdpa(q: Any, k: Any, v: Any, *, mask: Any, is_causal: bool = False) -> Any:
    """SDPA over (rows, tokens, heads, D). Grouped heads are repeated: not every kernel knows them."""
    from torch.nn.functional import scaled_dot_product_attention

    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal).transpose(1, 2)


def _kernel(keys: Any) -> Any:
    """Return the Triton kernel if it works here and agrees with plain torch; else None, and say why."""
    import torch

    if not keys.is_cuda:
        return None
    try:
        from fast_ft.decode.kernels import paged_attention

        kv_heads, head_dim = keys.shape[2:]
        draw = torch.Generator(keys.device).manual_seed(0)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, generator=draw, device=keys.device).to(keys.dtype)

        q, k, v = normal(3, 2 * kv_heads, head_dim), *(normal(8 * PAGE, kv_heads, head_dim) for _ in range(2))
        table = torch.tensor([[3, 1, 7], [2, 0, 0], [6, 4, 5]], device=keys.device)
        length = torch.tensor([PAGE, 0, 3 * PAGE - 1], device=keys.device)
        difference = (
            (paged_attention(q, k, v, table, length, page=PAGE) - gathered(q, k, v, table, length, 3 * PAGE))
            .abs()
            .max()
            .item()
        )
        if not difference <= 0.02:  # a NaN, too
            raise RuntimeError(f"it differs from plain torch by {difference}")
    except Exception as error:  # a compiler on a card that it does not know may fail in any way
        note(f"note: decoding without the Triton kernel, more slowly: {type(error).__name__}: {str(error)[:300]}")
        return None
    return paged_attention
