"""Comparisons of kernel_checks: what the Triton kernels make of random numbers beside what plain torch makes.

Those of attention are in attention_compare.py.
"""

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
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.models import nf4


class Numbers:
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


def between(kind: Kind, kernels: Any) -> dict[str, Callable[[], None]]:
    """Return comparisons of norms, gates and rope over what products leave (the module ops_triton), by their names.

    Each compiles few kernels, so that threads may share them; an exception says what is wrong.
    """
    counts = (4, TOGETHER + 4) if max(kind.steps) > TOGETHER else (4,)
    qkv, out, gate_up, down = kind.products
    ranks_qkv, _, ranks_gate, ranks_down = kind.halves
    norms = {"the MLP": (out, ranks_gate), "attention": (down, ranks_qkv)}
    return {
        **{
            f"norms of {count} rows before {name}": partial(_norms, kind, kernels, count, *given)
            for name, given in norms.items()
            for count in counts
        },
        "norms of an embedding": partial(_norms_alone, kind, kernels, ranks_qkv, counts),
        "gates": partial(_gates, kind, kernels, gate_up, ranks_down, counts),
        "rope over parts": partial(_rope, kind, kernels, qkv),
    }


def _norms(kind: Kind, kernels: Any, count: int, before: tuple[int, int], ranks: int) -> None:
    """Compare norms over what the product `before` left, with the first half for `ranks` that come next."""
    draw = Numbers(kind)
    x, weight = draw.normal(count, kind.hidden), draw.normal(kind.hidden) / 4
    found: list[list[Tensor]] = [[], []]
    for order, parts in _left(kind, draw, before, count):
        for made, ops, taken in zip(found, (ops_torch, kernels), (_whole, _split), strict=True):
            made.append(_normed(ops, x, taken(parts), weight))
            work = partial(_normed, ops, x, taken(parts), weight, order=order)
            made += _with_half(kind, kind.hidden, ranks, count, work)
    refuse_difference(kind, "norms", *found)


def _norms_alone(kind: Kind, kernels: Any, ranks: int, counts: Sequence[int]) -> None:
    """Compare a pass's first norm, of what no product left."""
    draw = Numbers(kind)
    found: list[list[Tensor]] = [[], []]
    for count in counts:
        x, weight = draw.normal(count, kind.hidden), draw.normal(kind.hidden) / 4
        for made, ops in zip(found, (ops_torch, kernels), strict=True):
            made.append(_normed(ops, x, None, weight))
            for order in kind.orders:
                work = partial(_normed, ops, x, None, weight, order=order)
                made += _with_half(kind, kind.hidden, ranks, count, work)
    refuse_difference(kind, "norms", *found)


def _gates(kind: Kind, kernels: Any, before: tuple[int, int], ranks: int, counts: Sequence[int]) -> None:
    draw = Numbers(kind)
    found: list[list[Tensor]] = [[], []]
    for count in counts:
        for order, parts in _left(kind, draw, before, count):
            for made, ops, taken in zip(found, (ops_torch, kernels), (_whole, _split), strict=True):
                work = partial(_gated, ops, taken(parts), draw.dtype, order=order)
                made += _with_half(kind, kind.inner, ranks, count, work)
    refuse_difference(kind, "gates", *found)


def _rope(kind: Kind, kernels: Any, before: tuple[int, int]) -> None:
    found: list[list[Tensor]] = [[], []]
    for _, parts in _left(kind, Numbers(kind), before, 4):
        for made, ops, taken in zip(found, (ops_torch, kernels), (_whole, _split), strict=True):
            made += _rotated(kind, ops, taken(parts))
    refuse_difference(kind, "rope", *found)


def _left(kind: Kind, draw: Numbers, shape: tuple[int, int], count: int) -> list[tuple[nf4.Order, Tensor]]:
    """Return what a product of this (outputs, inputs) may leave, (parts, count, outputs), with the order that the next
    one wants."""
    cuts = [(1, nf4.Order.ROWS), *product(_parts(kind, [shape]), kind.orders)]
    return [(order, draw.normal(parts, count, shape[0]) * (0.5 / parts**0.5)) for parts, order in cuts]


def first_for(kind: Kind, inputs: int, ranks: int, tokens: int) -> FirstHalf | None:
    """Return a first half for `ranks`, always of the same numbers, so small that x A is of x's size; None for 0."""
    if not ranks:
        return None
    return first_half(Numbers(kind).normal(inputs, ranks) / inputs**0.5, tokens)


def _with_half(kind: Kind, inputs: int, ranks: int, tokens: int, work: Callable[..., Tensor]) -> list[Tensor]:
    """Return what `work` makes, and the first half that it computes beside it, if there are ranks."""
    first = first_for(kind, inputs, ranks, tokens)
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
    found = {way.parts_for(n, outputs, inputs, device) for n in rows for outputs, inputs in shapes}
    return sorted(found | {1} if kind.mixed else found)


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


def refuse_difference(kind: Kind, what: str, expected: list[Tensor], found: list[Tensor]) -> None:
    off = max((a.float() - b.float()).abs().max().item() for a, b in zip(expected, found, strict=True))
    # a head of normal numbers spans 6 to 8, of which an 8-bit step is 0.03
    allowed = (0.02 if kind.dtype != "bfloat16" else 0.1) + (0.04 if kind.kv_bits == 8 else 0.0)
    if not off <= allowed:  # a NaN, too
        raise RuntimeError(f"{what} differ from plain torch by {off}")
