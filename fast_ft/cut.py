"""How an effective batch is cut into micro-batches: which rows share a pass, and how wide the pass is. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: A pass's tokens are filled up to a multiple of it. 8: tensor cores want that. 128: few graphs, each for many passes,
#: and whole tiles of a matrix product.
EAGER_MULTIPLE = 8
GRAPH_MULTIPLE = 128


def cut(lengths: Sequence[int], *, most_rows: int, most_tokens: int | None) -> list[list[int]]:
    """Return row indices in micro-batches of nearly equal tokens, as few as the limits allow.

    A micro-batch has at most `most_rows` rows and `most_tokens` tokens (None: no limit); a longer row goes alone. The
    longest rows are dealt first, each to the micro-batch that has least.
    """
    limit = max(math.inf if most_tokens is None else most_tokens, max(lengths))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    least = max(math.ceil(len(lengths) / most_rows), math.ceil(sum(lengths) / limit))
    for count in range(least, len(lengths)):
        dealt: list[list[int]] = [[] for _ in range(count)]
        totals = [0] * count
        for index in order:
            open_to = [k for k in range(count) if len(dealt[k]) < most_rows and totals[k] + lengths[index] <= limit]
            if not open_to:
                break
            to = min(open_to, key=totals.__getitem__)
            dealt[to].append(index)
            totals[to] += lengths[index]
        else:
            return [sorted(each) for each in dealt]
    return [[index] for index in order]


def width(tokens: int, *, capture: bool) -> int:
    """Return the tokens of a pass over so many, its filling included."""
    multiple = GRAPH_MULTIPLE if capture else EAGER_MULTIPLE
    return math.ceil(tokens / multiple) * multiple
