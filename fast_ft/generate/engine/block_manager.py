"""The pages of the KV cache, 16 tokens each, handed out as sequences grow. Pure; the tensors are in kv_cache.py.

A sequence holds only the pages that it has filled, wherever they lie. So the 1,024 tokens that an answer may take cost
nothing before it takes them, and nothing is moved when a sequence ends.

    block tables:  sequence 0 -> pages 3, 1      cells:  page 1        page 2        page 3
                   sequence 1 -> page 2                  [seq 0 16..31][seq 1 0..15] [seq 0 0..15]

Page 0 belongs to no sequence: slots without one write there.
"""

from __future__ import annotations

from fast_ft.generate.engine.sequence import Sequence

PAGE = 16  #: tokens


def pages_for(tokens: int) -> int:
    """Return the number of pages that `tokens` tokens fill."""
    return -(-tokens // PAGE)


class BlockManager:
    """Knows which of `pages` pages are free."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.clear()

    def clear(self) -> None:
        """Make every page free."""
        self.free = list(range(self.pages, 0, -1))

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Give a sequence the pages for `length` tokens, and return whether there were enough."""
        while len(sequence.block_table) < pages_for(length):
            if not self.free:
                return False
            sequence.block_table.append(self.free.pop())
        return True

    def release(self, sequence: Sequence) -> None:
        """Take all of a sequence's pages back."""
        self.free += reversed(sequence.block_table)
        sequence.block_table.clear()
