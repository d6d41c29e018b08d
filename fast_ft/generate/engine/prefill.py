"""Prompts into the cache: several in one pass, without padding; a long one in several passes.

Linear layers see all tokens of a pass as one row; attention sees each prompt by itself, behind the prefix with which
all prompts begin. The prefix is computed once in a run. Its whole pages are in each prompt's table; the tokens of its
last page, where that is not a whole one, are copied to each prompt's own page:

    the prefix's cells:   | page 1            | page 2, its first 12 cells |
    prompt 0's cells:     | page 1, as it is  | page 3: 12 copied, then its own tokens | ...

Rows of one prompt (its candidates) are computed once, too, and copied to the cells of each.

Shapes: T tokens, E hidden, H heads, G KV heads, D head dimension, V vocabulary, K keys.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.cuda_graphs import Graphs
from fast_ft.generate.engine.first_half import FirstHalf
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache
from fast_ft.generate.engine.prefill_passes import Part, most_prompts, passes
from fast_ft.generate.engine.scheduler import Admission
from fast_ft.generate.engine.sequence import Sequence

_LONGEST = 512  #: tokens of the longest prompt for which a pass of fixed size is made; longer ones get their own
_PADDING = 256  #: tokens of padding that stand for one prompt


class Prefill:
    """Prompts' passes over one model and cache. Where they can be captured, they are.

    Such a pass has one of a few numbers of tokens, filled up with padding that goes to page 0. The first pass of an
    admission is launched as it is, so that the card has work at once. Each later one, and what is used a second time,
    is captured first, or was captured while the card computed other things. A host needs 37 ms and more to launch or to
    capture a pass, and the card as long for 1,400 tokens of a 7B on an H200.
    """

    def __init__(self, model: FusedModel, cache: KVCache, graphs: Graphs, *, most: int) -> None:
        self.model, self.cache, self.graphs, self.most = model, cache, graphs, most
        self.sizes = [most * eighths // 8 for eighths in (1, 2, 4, 5, 6, 7, 8)] if model.ops.PACKED else []
        self._sized: dict[tuple[int, int, int], _Sized] = {}
        self._shared = 0  #: tokens of the prefix that the last passes had

    def run(self, admission: Admission, logits_SV: Tensor) -> None:
        """Write keys and values of the sequences' tokens, and the logits after the last of sequence i to row i."""
        device, rows, prefix = self.model.device, admission.sequences, admission.prefix
        self._shared = prefix.length()
        cut = passes(rows, self.most, self._shared, fills=admission.fills)
        # All of the host's other work comes first, so that it launches as fast as it can.
        for index, one in enumerate([_Pass(self.model, self.cache, rows, parts, prefix) for parts in cut]):
            if self.sizes and one.packs:
                logits = self._of_size(one).run(one, is_first=not index)
            else:
                keep_P = _tensor(one.last or [0], device)
                hidden_TE = self.model.forward(*one.tensors(), one.attend, keep_P=keep_P)
                logits = self.model.logits(hidden_TE)
            if one.target:
                self.cache.copy(_tensor(one.source, device), _tensor(one.target, device))
            if one.row:
                logits_SV.index_copy_(0, _tensor(one.row, device), logits[_tensor(one.of_row, device)])

    def capture_ahead(self) -> None:
        """Capture one more of the passes that sequences which wait will likely need: those of short prompts."""
        likely = (self._sized_for(tokens, min(tokens, _LONGEST), self._shared) for tokens in self.sizes)
        if untried := next((each for each in likely if not each.is_tried), None):
            untried.capture()

    def _of_size(self, one: _Pass) -> _Sized:
        tokens = next(size for size in self.sizes if size >= len(one.ids))
        longest = min(tokens, _LONGEST) if max(one.lengths) <= _LONGEST else tokens
        return self._sized_for(tokens, longest, len(one.shared))

    def _sized_for(self, tokens: int, longest: int, shared: int) -> _Sized:
        shape = (tokens, longest, shared)
        if shape not in self._sized:
            prompts = most_prompts(self.most, shared)
            self._sized[shape] = _Sized(self.model, self.cache, self.graphs, *shape, prompts)
        return self._sized[shape]


class _Pass:
    """What one pass computes. `cell` is where a token's keys and values go; `last` are the last tokens of prompts.

    Row `row[i]` goes on from prompt `of_row[i]` of those. `source` are cells, `target` those of rows that they are
    copied to. `shared` are the prefix's cells, and `is_behind` tells which parts come right behind it. `packs`: no part
    has other tokens before it.
    """

    def __init__(
        self, model: FusedModel, cache: KVCache, rows: list[Sequence], parts: list[Part], prefix: Sequence
    ) -> None:
        self.model, self.cache = model, cache
        self.lengths = [part.stop - part.start for part in parts]
        shared = prefix.length()
        self.shared = _cells(prefix, shared)
        not_whole = slice(shared // PAGE * PAGE, shared)  # the cells of its last page, unless that is a whole one
        self.is_behind = [0 < part.start == shared for part in parts]
        self.packs = all(behind or not part.start for part, behind in zip(parts, self.is_behind, strict=True))
        self.before: list[list[int] | None] = []  #: the cells of all tokens up to a part's, where some lie before it
        self.ids: list[int] = []
        self.position: list[int] = []
        self.cell: list[int] = []
        self.source: list[int] = []
        self.target: list[int] = []
        self.last: list[int] = []
        self.row: list[int] = []
        self.of_row: list[int] = []
        for part, behind in zip(parts, self.is_behind, strict=True):
            owners = [rows[index] for index in part.rows] or [prefix]
            context = [*owners[0].prompt, *owners[0].tokens]
            first, *others = (_cells(owner, part.stop) for owner in owners)
            if behind:
                self.source += self.shared[not_whole] * len(owners)
                self.target += [cell for cells in (first, *others) for cell in cells[not_whole]]
                first[:shared] = self.shared  # until they are copied
            self.ids += context[part.start : part.stop]
            self.position += range(part.start, part.stop)
            self.cell += first[part.start :]
            self.before.append(first if part.start else None)
            for other in others:
                self.source += first[part.start :]
                self.target += other[part.start :]
            if part.rows and part.stop == len(context):
                self.of_row += [len(self.last)] * len(part.rows)
                self.row += part.rows
                self.last.append(len(self.ids) - 1)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return ids and positions, on the device; the cells come along."""
        ids_T, position_T, self.cell_T = (
            _tensor(each, self.model.device) for each in (self.ids, self.position, self.cell)
        )
        self.before_T = [cells and _tensor(cells, self.model.device) for cells in self.before]
        return ids_T, position_T

    def attend(self, layer: int, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], _: FirstHalf | None) -> Tensor:
        """Return what attention gives, TE; keys and values go to the cache."""
        ops, cells = self.model.ops, self.cache.layer(layer)
        q_THD, k_TGD, v_TGD = ops.rotate_into_cache(qkv, self.model.heads, cos_sin, self.cell_T, *cells)
        mixed, at = [], 0
        for length, before in zip(self.lengths, self.before_T, strict=True):
            here = slice(at, at + length)
            k, v = (k_TGD[here], v_TGD[here]) if before is None else self.cache.read(layer, before)
            mixed.append(ops.causal(q_THD[here], k, v, self.model.windows[layer]))
            at += length
        return torch.cat(mixed)


class _Sized:
    """Passes of one size, whose parts are the prefix and whole prompts; one kernel attends to all of them."""

    def __init__(
        self, model: FusedModel, cache: KVCache, graphs: Graphs, tokens: int, longest: int, shared: int, prompts: int
    ) -> None:
        def zeros(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=model.device)

        self.model, self.cache, self.graphs, self.tokens, self.longest = model, cache, graphs, tokens, longest
        self.ids_T, self.position_T, self.cell_T = (zeros(tokens) for _ in range(3))
        self.last_P = zeros(prompts)
        self.starts = zeros(1 + prompts + tokens // _PADDING + 2, torch.int32)  # the prefix's, too
        # Keys are those of the prefix and then the pass's; each prompt's, one after the other, are at:
        self.shared_T, self.key_K = zeros(shared), zeros(tokens + prompts * shared if shared else 0)
        self.key_starts = zeros(len(self.starts), torch.int32) if shared else self.starts
        self.captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self.is_tried = self.is_used = False  #: whether it was to be captured, whether it has run

    def run(self, one: _Pass, *, is_first: bool) -> Tensor:
        """Return logits after the prompts' last tokens, one row each, and some more; is_first: the card has no work."""
        padding = self.tokens - len(one.ids)
        lengths = [*one.lengths, *(min(_PADDING, padding - at) for at in range(0, padding, _PADDING))]
        starts = [0, *accumulate(lengths)]
        given = [
            (self.ids_T, one.ids), (self.position_T, one.position), (self.cell_T, one.cell), (self.last_P, one.last),
            (self.starts, starts + [self.tokens] * (len(self.starts) - len(starts))),
        ]  # fmt: skip
        if shared := len(one.shared):
            behind = [*one.is_behind, *[False] * (len(lengths) - len(one.lengths))]
            at_K, key_starts = list[int](), [0]
            for start, length, is_behind in zip(starts[:-1], lengths, behind, strict=True):
                at_K += [*range(shared * is_behind), *range(shared + start, shared + start + length)]
                key_starts.append(len(at_K))
            given += [
                (self.shared_T, one.shared), (self.key_K, at_K),
                (self.key_starts, key_starts + key_starts[-1:] * (len(self.starts) - len(starts))),
            ]  # fmt: skip
        for to, some in given:
            values = some + [0] * (len(to) - len(some))
            to.copy_(_on_host(values, to.device, to.dtype), non_blocking=True)
        if not self.is_tried and (self.is_used or not is_first):
            self.capture()
        self.is_used = True
        if self.captured is None:
            return self._logits()
        graph, logits = self.captured
        graph.replay()
        return logits

    def capture(self) -> None:
        """Capture the pass, once; where that does not succeed, it is launched each time."""
        self.is_tried = True
        self.captured = self.graphs.capture_ahead(self._logits)

    def _logits(self) -> Tensor:
        return self.model.logits(self.model.forward(self.ids_T, self.position_T, self._attend, keep_P=self.last_P))

    def _attend(self, layer: int, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], _: FirstHalf | None) -> Tensor:
        ops, cells = self.model.ops, self.cache.layer(layer)
        q_THD, k_TGD, v_TGD = ops.rotate_into_cache(qkv, self.model.heads, cos_sin, self.cell_T, *cells)
        if not len(self.shared_T):
            return ops.packed_attention(q_THD, k_TGD, v_TGD, self.starts, self.longest, self.model.windows[layer])
        shared = self.cache.read(layer, self.shared_T)  # which this pass or one before has written
        k_KGD, v_KGD = (torch.cat(parts)[self.key_K] for parts in zip(shared, (k_TGD, v_TGD), strict=True))
        return ops.packed_attention(
            q_THD, k_KGD, v_KGD, self.starts, self.longest, None, (self.key_starts, self.longest + len(self.shared_T))
        )


def _cells(row: Sequence, length: int) -> list[int]:
    return [page * PAGE + offset for page in row.block_table for offset in range(PAGE)][:length]


def _tensor(values: list[int], device: torch.device) -> Tensor:
    return _on_host(values, device, torch.int64).to(device, non_blocking=True)


def _on_host(values: list[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return values in memory from which a card copies without making the host wait for what runs there."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
