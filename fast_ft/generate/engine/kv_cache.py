"""The KV cache of all rows: pages of 16 tokens, handed out as rows grow.

A row holds only the pages that it has filled, wherever they lie, so 1,024 tokens that an answer may take cost nothing
before it takes them, and a row that ends leaves nothing to be moved.

    table:  row 0 -> pages 3, 1      cells:  page 1        page 2        page 3
            row 1 -> page 2                  [row 0 16..31][row 1 0..15][row 0 0..15]

Page 0 belongs to no row: slots without one write there.
"""

from __future__ import annotations

from typing import Any

PAGE = 16  #: tokens


def pages_for(tokens: int) -> int:
    """Return the pages that so many tokens fill."""
    return -(-tokens // PAGE)


class Cache:
    """Keys and values of every layer, (layers, cells, KV heads, head dimension), and which pages are free."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, pages: int, dtype: Any, device: Any) -> None:
        import torch

        self.pages = pages
        shape = (layers, (pages + 1) * PAGE, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.clear()

    def clear(self) -> None:
        """Make every page free."""
        self.free = list(range(self.pages, 0, -1))

    def copy(self, source: Any, target: Any) -> None:
        """Copy cells, in all layers."""
        for part in (self.keys, self.values):
            for layer in part:
                layer.index_copy_(0, target, layer[source])
