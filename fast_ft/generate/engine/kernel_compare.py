"""The comparisons of kernel_checks: what the Triton kernels make of random numbers beside what plain torch makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fast_ft.generate.engine import nf4_linear, ops_torch
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.first_half import TOGETHER, FirstHalf, first_half
from fast_ft.generate.engine.kernel_kind import Kind
from fast_ft.generate.engine.kv_cache import dequantised, quantised
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.models import nf4


class _Numbers:
    """Random tensors on the kind's device."""

    def __init__(self, kind: Kind) -> None:
        self.dtype, self.device = getattr(torch, kind.dtype), torch.device(kind.device)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Return normally distributed numbers in the kind's dtype."""
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32).to(self.dtype)


def draws(sampler: Sampler, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare the tokens of a step's end and the state after it."""
    names = ("the tokens", "the state after a step", "the logits")
    for name, made, expected in zip(names, *drawn(sampler, vocabulary, dtype, device), strict=True):
        if not torch.equal(made, expected):
            raise RuntimeError(f"{name} are {made.tolist()}, not {expected.tolist()}"[:300])


def drawn(
    sampler: Sampler, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Return tokens, state and logits after a step's end: what the kernel makes, and what the sampler does.

    The largest logits are all different.
    """
    from fast_ft.generate.engine.draw_triton import Draw

    count, draw = 4, torch.Generator(device).manual_seed(0)
    ranks_SV = torch.stack([torch.randperm(vocabulary, generator=draw, device=device) for _ in range(count)])
    given_SV = (-(ranks_SV.float() / 8)).clamp(min=-200).to(dtype)
    keys_S = torch.randint(0, 1 << 62, (count,), generator=draw, device=device)
    zero_S = torch.zeros_like(keys_S)
    state = torch.stack([zero_S, zero_S + 5, zero_S + 3, zero_S + 9, zero_S + 1, keys_S, zero_S], dim=1)
    chunk, logits_SV = torch.full((count, 8), -7, device=device), torch.empty_like(given_SV, dtype=torch.float32)
    expected_S = sampler.choose(given_SV.float(), keys_S, zero_S + 3)
    Draw(sampler, count, zero_S[:1] - 1)(given_SV, logits_SV, state, chunk, zero_S[:1] + 2)
    after = torch.stack([expected_S, zero_S + 6, zero_S + 4, zero_S + 9, zero_S + 1, keys_S, zero_S], dim=1)
    expected_chunk = torch.full_like(chunk, -7)
    expected_chunk[:, 2] = expected_S
    return [chunk[:, 2:], state, logits_SV], [expected_chunk[:, 2:], after, given_SV.float()]


def layer(kind: Kind, kernels: Any) -> dict[str, Callable[[], None]]:
    """Return comparisons of all that lies between a layer's products (the module ops_triton), by their names.

    Each compiles few kernels, so that threads may share them; an exception says what is wrong.
    """
    # How each (row, head) is divided hangs on a step's rows, and is another kernel.
    divided = sorted({kernels.splits_for(n, kind.heads) for n in kind.steps}) if kernels.FUSES else [None]
    counts = (4, TOGETHER + 4) if max(kind.steps) > TOGETHER else (4,)
    qkv, out, gate_up, down = kind.products
    ranks_qkv, _, ranks_gate, ranks_down = kind.halves
    norms = {"the MLP": (out, ranks_gate), "attention": (down, ranks_qkv)}
    return {
        "rope, cache and attention over prompts": partial(_prompts, kind, kernels),
        **{f"attention over pages, {n or 1} programs a head": partial(_pages, kind, kernels, n) for n in divided},
        **{
            f"norms of {count} rows before {name}": partial(_norms, kind, kernels, count, *given)
            for name, given in norms.items()
            for count in counts
        },
        "norms of an embedding": partial(_norms_alone, kind, kernels, ranks_qkv, counts),
        "gates": partial(_gates, kind, kernels, gate_up, ranks_down, counts),
        "rope over parts": partial(_rope, kind, kernels, qkv),
    }


class _Cells:
    """Rows with keys and values in a cache: three pages each, of which `length` cells and one more are filled."""

    def __init__(self, kind: Kind) -> None:
        draw = _Numbers(kind)
        device, whole, self.count = draw.device, kind.heads + 2 * kind.kv_heads, 18
        frequencies = torch.arange(0, kind.head_dim, 2, device=device).float() / kind.head_dim
        self.frequencies, self.dtype, self.heads = 1e4**-frequencies, draw.dtype, kind.heads
        self.qkv = draw.normal(self.count, whole * kind.head_dim)
        memory = draw.normal(2, (3 * self.count + 1) * PAGE, kind.kv_heads, kind.head_dim)
        self._held, self._steps = memory, None
        if kind.kv_bits == 8:  # keys and values each have a scale and a middle
            self._held, self._steps = (torch.stack(each) for each in zip(*map(quantised, memory), strict=True))
        # Lengths and table lie in one tensor, at places of odd alignment, as in a step: kernels are compiled for that.
        state = torch.zeros(self.count, 7 + 3, dtype=torch.int64, device=device)
        pages = torch.randperm(3 * self.count, generator=draw.generator, device=device) + 1
        state[:, 7:] = pages.view(self.count, 3)
        state[:, 1] = torch.tensor([PAGE, 0, 3 * PAGE - 1] * (self.count // 3), device=device)
        self.length, self.table = state[:, 1], state[:, 7:]

    def rotated(self, ops: Any) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
        """Return (q, k, v after rope; keys, values and scales of all cells, where these are), made by `ops`."""
        keys, values = self._held.clone()
        scales = None if self._steps is None else self._steps.clone()
        cos_sin = ops.rope(self.length, self.frequencies, 1.0, self.dtype)
        cell = self.table.gather(1, (self.length // PAGE)[:, None])[:, 0] * PAGE + self.length % PAGE
        made = ops.rotate_into_cache(self.qkv.clone(), self.heads, cos_sin, cell, keys, values, scales)
        return made, (keys, values, scales)


def _prompts(kind: Kind, kernels: Any) -> None:
    cells = _Cells(kind)
    found = []
    for ops in (ops_torch, kernels):
        (q, k, v), (keys, values, scales) = cells.rotated(ops)
        packed = _packed(ops, q, k, v)
        if scales is not None:
            keys, values = dequantised(keys, scales[0], cells.dtype), dequantised(values, scales[1], cells.dtype)
        found.append([keys, values, *packed])
    _refuse_difference(kind, "rope, cache and attention over prompts", *found)


def _pages(kind: Kind, kernels: Any, splits: int | None) -> None:
    cells = _Cells(kind)
    (q, _, _), (keys, values, scales) = cells.rotated(ops_torch)
    found = []
    for ops in (ops_torch, kernels):
        made = []
        for order, window in product(kind.orders, (None, PAGE + 3)):
            first = _first(kind, kind.products[1][1], kind.halves[1], cells.count)
            mixed = ops.paged_attention(
                q, keys, values, cells.table, cells.length, columns=3 * PAGE, order=order, window=window, scales=scales,
                first=first, splits=splits,
            )  # fmt: skip
            # to plain torch the order means nothing
            made.append(nf4.arranged(mixed, order) if ops is ops_torch else mixed)
            made += [] if first is None else [first.xa_TR]
        found.append(made)
    _refuse_difference(kind, "attention over pages", *found)


def _packed(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return attention over prompts of 1 token and of the others, and over the same behind a start that they share."""
    count, shared = len(q), 5
    cuts = ((0, 1), (1, count))
    behind = [torch.cat([torch.cat([part[:shared], part[a:b]]) for a, b in cuts]) for part in (k, v)]
    if not ops.PACKED:
        key_cuts = ((0, shared + 1), (shared + 1, count + 2 * shared))
        both = ((k, v, cuts), (*behind, key_cuts))
        return [
            torch.cat([ops.causal(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in zip(cuts, of_keys, strict=True)])
            for k, v, of_keys in both
        ]
    starts, key_starts = (
        torch.tensor([0, end, last], dtype=torch.int32, device=q.device)
        for end, last in ((1, count), (shared + 1, count + 2 * shared))
    )
    keys = (key_starts, count + shared)
    return [
        ops.packed_attention(q, k, v, starts, count),
        ops.packed_attention(q, *behind, starts, count, None, keys),
    ]


def _norms(kind: Kind, kernels: Any, count: int, before: tuple[int, int], ranks: int) -> None:
    """Compare norms over what the product `before` left, with the first half for `ranks` that come next."""
    draw = _Numbers(kind)
    x, weight = draw.normal(count, kind.hidden), draw.normal(kind.hidden) / 4
    found: list[list[Tensor]] = [[], []]
    for order, parts in _left(kind, draw, before, count):
        for made, ops, taken in zip(found, (ops_torch, kernels), (_whole, _split), strict=True):
            made.append(_normed(ops, x, taken(parts), weight))
            work = partial(_normed, ops, x, taken(parts), weight, order=order)
            made += _with_half(kind, kind.hidden, ranks, count, work)
    _refuse_difference(kind, "norms", *found)


def _norms_alone(kind: Kind, kernels: Any, ranks: int, counts: Sequence[int]) -> None:
    """Compare a pass's first norm, of what no product left."""
    draw = _Numbers(kind)
    found: list[list[Tensor]] = [[], []]
    for count in counts:
        x, weight = draw.normal(count, kind.hidden), draw.normal(kind.hidden) / 4
        for made, ops in zip(found, (ops_torch, kernels), strict=True):
            made.append(_normed(ops, x, None, weight))
            for order in kind.orders:
                work = partial(_normed, ops, x, None, weight, order=order)
                made += _with_half(kind, kind.hidden, ranks, count, work)
    _refuse_difference(kind, "norms", *found)


def _gates(kind: Kind, kernels: Any, before: tuple[int, int], ranks: int, counts: Sequence[int]) -> None:
    draw = _Numbers(kind)
    found: list[list[Tensor]] = [[], []]
    for count in counts:
        for order, parts in _left(kind, draw, before, count):
            for made, ops, taken in zip(found, (ops_torch, kernels), (_whole, _split), strict=True):
                work = partial(_gated, ops, taken(parts), draw.dtype, order=order)
                made += _with_half(kind, kind.inner, ranks, count, work)
    _refuse_difference(kind, "gates", *found)


def _rope(kind: Kind, kernels: Any, before: tuple[int, int]) -> None:
    found: list[list[Tensor]] = [[], []]
    for _, parts in _left(kind, _Numbers(kind), before, 4):
        for made, ops, taken in zip(found, (ops_torch, kernels), (_whole, _split), strict=True):
            made += _rotated(kind, ops, taken(parts))
    _refuse_difference(kind, "rope", *found)


def _left(kind: Kind, draw: _Numbers, shape: tuple[int, int], count: int) -> list[tuple[nf4.Order, Tensor]]:
    """Return what a product of this (outputs, inputs) may leave, (parts, count, outputs), with the order that the next
    one wants."""
    cuts = [(1, nf4.Order.ROWS), *product(_parts(kind, [shape]), kind.orders)]
    return [(order, draw.normal(parts, count, shape[0]) * (0.5 / parts**0.5)) for parts, order in cuts]


def _first(kind: Kind, inputs: int, ranks: int, tokens: int) -> FirstHalf | None:
    """Return a first half for `ranks`, always of the same numbers, so small that x A is of x's size; None for 0."""
    if not ranks:
        return None
    return first_half(_Numbers(kind).normal(inputs, ranks) / inputs**0.5, tokens)


def _with_half(kind: Kind, inputs: int, ranks: int, tokens: int, work: Callable[..., Tensor]) -> list[Tensor]:
    """Return what `work` makes, and the first half that it computes beside it, if there are ranks."""
    first = _first(kind, inputs, ranks, tokens)
    made = work(first=first)
    return [made] if first is None else [made, first.xa_TR]


def _whole(parts: Tensor) -> Tensor:
    """Return the sum of a product's parts, as plain torch takes it."""
    return parts.float().sum(dim=0).to(parts.dtype)


def _split(parts: Tensor) -> Tensor:
    """Return a product's parts as the kernels take them: in fp32, if there are several."""
    return parts.float() if len(parts) > 1 else parts[0]


def _normed(
    ops: Any, x: Tensor, delta: Tensor | None, weight: Tensor, *, order: nf4.Order = nf4.Order.ROWS,
    first: FirstHalf | None = None,
) -> Tensor:  # fmt: skip
    made = ops.add_norm(x.clone(), delta, weight, 1e-5, order=order, first=first)
    return nf4.arranged(made, order) if ops is ops_torch else made


def _gated(
    ops: Any, x: Tensor, dtype: torch.dtype, *, order: nf4.Order, first: FirstHalf | None = None
) -> Tensor:  # fmt: skip
    made = ops.gated(x, dtype, order=order, first=first)
    return nf4.arranged(made, order) if ops is ops_torch else made


def _parts(kind: Kind, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Return into how many parts steps' products of these shapes are split: none where products are whole anyway."""
    way, device = kind.way, torch.device(kind.device)
    if not kind.planes or way is None or kind.device == "cpu":
        return [1] if kind.planes else []
    rows = [each for each in kind.steps if each <= nf4_linear.FEW]
    return sorted({way.parts_for(n, outputs, inputs, device) for n in rows for outputs, inputs in shapes})


def _rotated(kind: Kind, ops: Any, qkv: Tensor) -> list[Tensor]:
    """Return q, and the cache's keys and values, after rope."""
    count, device, width = qkv.shape[-2], qkv.device, kind.head_dim
    dtype: torch.dtype = getattr(torch, kind.dtype)
    keys, values = torch.zeros(2, (count + 1) * PAGE, kind.kv_heads, width, dtype=dtype, device=device)
    place = torch.arange(count, device=device)
    frequencies = 1e4 ** -(torch.arange(0, width, 2, device=device).float() / width)
    cos_sin = ops.rope(place, frequencies, 1.0, dtype)
    q, _, _ = ops.rotate_into_cache(qkv.clone(), kind.heads, cos_sin, place + PAGE, keys, values)
    return [q, keys, values]


def _refuse_difference(kind: Kind, what: str, expected: list[Tensor], found: list[Tensor]) -> None:
    off = max((a.float() - b.float()).abs().max().item() for a, b in zip(expected, found, strict=True))
    # a head of normal numbers spans 6 to 8, of which an 8-bit step is 0.03
    allowed = (0.02 if kind.dtype != "bfloat16" else 0.1) + (0.04 if kind.kv_bits == 8 else 0.0)
    if not off <= allowed:  # a NaN, too
        raise RuntimeError(f"{what} differ from plain torch by {off}")
