"""Prompts into the cache: several in one pass, without padding; a long one in several passes.

    pass of at most 2,048 tokens:   | prompt 0 | prompt 1      | prompt 2, its first tokens |
    the next one:                   | the rest of prompt 2 | prompt 3 |

Linear layers see all tokens of a pass as one row; attention sees each prompt by itself. Rows of one prompt (its
candidates) are computed once and written to the cells of each.

Shapes: T tokens, G KV heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from fast_ft.decode.cache import PAGE, Cache, causal
from fast_ft.decode.fused import Fused


@dataclass(eq=False)
class Row:
    """One answer to make: at most `limit` tokens after `prompt`, drawn by `key`. `known`: its length, in a replay."""

    prompt: Sequence[int]
    limit: int
    key: int = 0
    known: int | None = None
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    def length(self, more: int = 0) -> int:
        """Tokens of prompt and answer, `more` answer tokens further on, up to the limit."""
        return len(self.prompt) + min(len(self.tokens) + more, self.limit)


@dataclass(frozen=True)
class Part:
    """Tokens start to stop of some rows that share them: indices into the list of rows."""

    rows: tuple[int, ...]
    start: int
    stop: int


def passes(rows: Sequence[Row], most: int) -> list[list[Part]]:
    """Return which tokens are computed in which pass. Neighbouring rows that have the same fresh prompt are one."""

    def same(index: int) -> tuple[int, ...]:
        row = rows[index]
        return tuple(row.prompt) if not row.tokens else (-1, index)

    cut: list[list[Part]] = [[]]
    room = most
    for _, group in groupby(range(len(rows)), key=same):
        together = tuple(group)
        whole = rows[together[0]].length()
        if room < min(whole, most):
            cut.append([])
            room = most
        for start in range(0, whole, most):
            if start:
                cut.append([])
                room = most
            stop = min(start + most, whole)
            cut[-1].append(Part(together, start, stop))
            room -= stop - start
    return [parts for parts in cut if parts]


def prefill(fused: Fused, cache: Cache, rows: Sequence[Row], logits_SV: Any, *, most: int) -> None:
    """Write keys and values of the rows' tokens, and the logits after the last one of row i to `logits_SV[i]`."""
    # All of the host's work comes first: copying an index to a card waits for what runs there.
    for one in [_Pass(fused, cache, rows, parts) for parts in passes(rows, most)]:
        hidden_TE = fused.forward(one.ids_T, one.position_T, one.attend)
        if len(one.row_S):
            logits_SV.index_copy_(0, one.row_S, fused.logits(hidden_TE[one.last_S]))


class _Pass:
    """The tensors of one pass. Token `source_T[i]` goes to cell `target_T[i]`; `last_S` are the last ones of rows."""

    def __init__(self, fused: Fused, cache: Cache, rows: Sequence[Row], parts: Sequence[Part]) -> None:
        import torch

        self.cache = cache
        self.spans: list[tuple[slice, Any]] = []  #: where a part's tokens stand; the cells of all up to them, or None
        ids: list[int] = []
        source: list[int] = []
        position: list[int] = []
        target, last, ended = [], [], []
        for part in parts:
            context = [*rows[part.rows[0]].prompt, *rows[part.rows[0]].tokens]
            here = range(len(ids), len(ids) + part.stop - part.start)
            before = _cells(rows[part.rows[0]], part.stop).to(fused.device) if part.start else None
            self.spans.append((slice(here.start, here.stop), before))
            ids += context[part.start : part.stop]
            position += range(part.start, part.stop)
            for index in part.rows:
                source += here
                target.append(_cells(rows[index], part.stop)[part.start :])
                if part.stop == len(context):
                    last.append(here[-1])
                    ended.append(index)
        listed = (ids, position, source, last, ended)
        self.ids_T, self.position_T, self.source_T, self.last_S, self.row_S = (
            torch.tensor(each, dtype=torch.int64, device=fused.device) for each in listed
        )
        self.target_T = torch.cat(target).to(fused.device)

    def attend(self, layer: int, q_THD: Any, k_TGD: Any, v_TGD: Any) -> Any:
        import torch

        self.cache.write(layer, self.target_T, k_TGD[self.source_T], v_TGD[self.source_T])
        mixed = []
        for here, before in self.spans:
            k, v = k_TGD[here], v_TGD[here]
            if before is not None:
                k, v = self.cache.keys[layer][before], self.cache.values[layer][before]
            mixed.append(causal(q_THD[here], k, v))
        return torch.cat(mixed)


def _cells(row: Row, length: int) -> Any:
    import torch

    return (torch.tensor(row.pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length]
