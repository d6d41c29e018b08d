"""Which tokens prefill computes in which pass. Pure; what a pass computes on the device is in prefill.py.

    pass of at most 2,048 tokens:   | prefix | prompt 0 | prompt 1      | prompt 2, its first tokens |
    the next one:                   | the rest of prompt 2 | prompt 3 |

Each prompt's tokens are those behind the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from fast_ft.generate.engine.sequence import Sequence


@dataclass(frozen=True)
class Part:
    """Tokens start to stop of some rows that share them: indices into the list of rows. The prefix is of no row."""

    rows: tuple[int, ...]
    start: int
    stop: int


def passes(rows: list[Sequence], most: int, shared: int = 0, *, fills: bool = False) -> list[list[Part]]:
    """Return which tokens are computed in which pass: the first with room for all of a row's; a longer row in several.

    Neighbouring rows that have the same fresh prompt are one. All begin behind the `shared` tokens of the prefix, which
    come first where the passes are to fill the cache with these, too.
    """

    def same(index: int) -> tuple[int, ...]:
        row = rows[index]
        return tuple(row.prompt) if not row.tokens else (-1, index)

    cut = [[Part((), 0, shared)]] if fills else []
    room = [most - shared] if fills else []
    for _, group in groupby(range(len(rows)), key=same):
        together = tuple(group)
        whole = rows[together[0]].length()
        for start in range(shared, whole, most):
            size = min(most, whole - start)
            # a part of a longer row comes after the one before it
            at = next((i for i, left in enumerate(room) if size <= left and whole - shared <= most), len(room))
            if at == len(room):
                cut.append([])
                room.append(most)
            cut[at].append(Part(together, start, start + size))
            room[at] -= size
    return cut
