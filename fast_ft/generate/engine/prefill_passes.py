"""Which tokens prefill computes in which pass. Pure; what a pass computes on the device is in prefill.py.

    pass of at most 2,048 tokens:   | prefix | prompt 0 | prompt 1      | prompt 2, its first tokens |
    the next one:                   | the rest of prompt 2 | prompt 3 |

Each prompt's tokens are those behind the prefix. One kernel attends to a pass, over keys that lie side by side: those
of the prefix once more for each prompt. So a pass has fewer prompts where the prefix is long.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from fast_ft.generate.engine.sequence import Sequence

_PROMPTS = 64  #: in a pass, at most
#: A pass has at most this many keys of the prefix for each of its tokens. Keys and values then take no more than is
#: planned for a pass (plan/decode_pool.py): 64 prompts behind 2,048 tokens would take 2 GiB of a 7B.
_KEYS = 4


@dataclass(frozen=True)
class Part:
    """Tokens start to stop of some rows that share them: indices into the list of rows. The prefix is of no row."""

    rows: tuple[int, ...]
    start: int
    stop: int


def most_prompts(most: int, shared: int) -> int:
    """Return the prompts that a pass of at most `most` tokens may have behind a prefix of `shared` ones."""
    return min(_PROMPTS, max(1, _KEYS * most // shared)) if shared else _PROMPTS


def passes(rows: list[Sequence], most: int, shared: int = 0, *, fills: bool = False) -> list[list[Part]]:
    """Return which tokens are computed in which pass: the first with room for all of a row's; a longer row in several.

    A pass has at most `most` tokens and `most_prompts` prompts. Neighbouring rows that have the same fresh prompt are
    one. All begin behind the `shared` tokens of the prefix, which come first where the passes are to fill the cache
    with these, too.
    """

    def same(index: int) -> tuple[int, ...]:
        row = rows[index]
        return tuple(row.prompt) if not row.tokens else (-1, index)

    places = most_prompts(most, shared)
    cut = [[Part((), 0, shared)]] if fills else []
    room = [(most - shared, places)] if fills else []  #: in each pass: tokens and prompts
    for _, group in groupby(range(len(rows)), key=same):
        together = tuple(group)
        whole = rows[together[0]].length()
        for start in range(shared, whole, most):
            size = min(most, whole - start)
            # a part of a longer row comes after the one before it
            fits = whole - shared <= most
            at = next((i for i, (left, more) in enumerate(room) if fits and size <= left and more), len(room))
            if at == len(room):
                cut.append([])
                room.append((most, places))
            cut[at].append(Part(together, start, start + size))
            room[at] = (room[at][0] - size, room[at][1] - 1)
    return cut
