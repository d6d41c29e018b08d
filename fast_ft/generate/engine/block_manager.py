"""The pages of the KV cache, 16 tokens each, handed out as sequences grow. Pure; the tensors are in kv_cache.py.

A sequence holds only the pages that it has filled, wherever they lie. So the 1,024 tokens that an answer may take cost
nothing before it takes them, and nothing is moved when a sequence ends. Tokens with which all prompts begin, the
prefix, have pages of their own, and the whole ones of these stand first in each sequence's table:

    block tables:  prefix     -> pages 1, 2       cells:  page 1: prefix 0..15      page 3: seq 0 16..31
    (28 tokens)    sequence 0 -> pages 1, 3, 5            page 2: prefix 16..27     page 4: seq 1 16..31
                   sequence 1 -> pages 1, 4                                         page 5: seq 0 32..47

A sequence goes on in the middle of the prefix's last page, so that page's tokens are copied to one of its own. Page 0
belongs to no sequence: slots without one write there.
"""

from __future__ import annotations

from fast_ft.generate.engine.sequence import Sequence
from fast_ft.plan import decode_pool

PAGE = decode_pool.PAGE  #: tokens


def pages_for(tokens: int) -> int:
    """Return the number of pages that `tokens` tokens fill."""
    return -(-tokens // PAGE)


class BlockManager:
    """Knows which of `pages` pages are free, and with which pages each sequence's table begins: `shared`."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.clear()

    def clear(self) -> None:
        """Make every page free."""
        self.free = list(range(self.pages, 0, -1))
        self.shared: list[int] = []

    def share(self, prefix: Sequence) -> None:
        """Give a prefix its pages; each sequence's table begins with the whole ones from now on."""
        self.grow(prefix, prefix.length())
        self.shared = prefix.block_table[: prefix.length() // PAGE]

    def end_sharing(self, prefix: Sequence) -> None:
        """Take a prefix's pages back. No sequence may hold pages any more."""
        self.shared = []
        self.release(prefix)

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Give a sequence the pages for `length` tokens, and return whether there were enough."""
        if not sequence.block_table:
            sequence.block_table += self.shared
        while len(sequence.block_table) < pages_for(length):
            if not self.free:
                return False
            sequence.block_table.append(self.free.pop())
        return True

    def release(self, sequence: Sequence) -> None:
        """Take all of a sequence's own pages back."""
        self.free += reversed(sequence.block_table[len(self.shared) :])
        sequence.block_table.clear()
