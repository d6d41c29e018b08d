"""How an effective batch is cut: which process gets which rows, which rows share a pass, how wide it is. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

#: A pass's tokens are filled up to a multiple of it. 8: tensor cores want that. 128: few graphs, each for many passes,
#: and whole tiles of a matrix product.
EAGER_MULTIPLE = 8
GRAPH_MULTIPLE = 128


def share(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return row indices for each of `size` processes, of nearly equal tokens; some get none where rows are few."""
    return _dealt(lengths, size, most_rows=len(lengths), limit=math.inf) or []


def cut(lengths: Sequence[int], *, most_rows: int, most_tokens: int | None) -> list[list[int]]:
    """Return row indices in micro-batches of nearly equal tokens, as few as the limits allow.

    A micro-batch has at most `most_rows` rows and `most_tokens` tokens (None: no limit); a longer row goes alone.
    """
    if not lengths:
        return []
    limit = max(math.inf if most_tokens is None else most_tokens, max(lengths))
    least = max(math.ceil(len(lengths) / most_rows), math.ceil(sum(lengths) / limit))
    for count in range(least, len(lengths)):
        if (dealt := _dealt(lengths, count, most_rows=most_rows, limit=limit)) is not None:
            return dealt
    return [[index] for index in _longest_first(lengths)]


def _dealt(lengths: Sequence[int], count: int, *, most_rows: int, limit: float) -> list[list[int]] | None:
    """Deal rows to `count` piles, the longest first, each to the pile that has least; None where one has no room."""
    if count == 1:  # of one pile, the order does not matter; plans ask for it thousands of times
        return [list(range(len(lengths)))] if len(lengths) <= most_rows and sum(lengths) <= limit else None
    dealt: list[list[int]] = [[] for _ in range(count)]
    piles = [(0, to) for to in range(count)]  # a heap of those that take more rows, by their tokens
    for index in _longest_first(lengths):
        if not piles or piles[0][0] + lengths[index] > limit:  # then no other has room either
            return None
        tokens, to = piles[0]
        dealt[to].append(index)
        if len(dealt[to]) == most_rows:
            heapq.heappop(piles)
        else:
            heapq.heapreplace(piles, (tokens + lengths[index], to))
    return [sorted(each) for each in dealt]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def width(tokens: int, *, capture: bool) -> int:
    """Return the tokens of a pass over `tokens`, its filling included."""
    multiple = GRAPH_MULTIPLE if capture else EAGER_MULTIPLE
    return math.ceil(tokens / multiple) * multiple
