"""Do the Triton kernels work on this card, and say what plain torch says? Asked once in a process for each kind of use.

The checks compile what decoding will run. `ahead` lets threads do that while the base is being loaded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fast_ft.generate.engine import nf4_linear, ops_torch
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.first_half import FirstHalf, first_half
from fast_ft.generate.engine.kv_cache import dequantised, quantised
from fast_ft.generate.engine.sampler import Sampler, fits
from fast_ft.models import nf4

#: that compile side by side: a kernel takes half a second of a CPU core. Few: each keeps a cuBLAS handle on the card.
_THREADS = 3
_passed: set[tuple[Any, ...]] = set()


@dataclass(frozen=True)
class Kind:
    """What the kernels are compiled for. `steps`: how many rows a step may have; `planes`: as FusedModel's, by `way`.

    `hidden` and `inner` are the model's hidden size and its MLP's. `device` names the index of a card, as "cuda:0".
    `kv_bits`: 16, the model's dtype, or 8. `ranks`: of each product's LoRA, as InRegisters pads them; 0: none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    dtype: str
    device: str
    steps: tuple[int, ...]
    planes: bool
    way: nf4_linear.Way | None = None
    kv_bits: int = 16
    ranks: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def ordered(self) -> bool:
        """Whether the columns of few rows come in plane order."""
        return self.planes and self.way is not None and self.way.PLANES

    @property
    def products(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's products: q, k and v side by side, o, gate and up side by side, down."""
        mixed = self.heads * self.head_dim
        qkv = mixed + 2 * self.kv_heads * self.head_dim
        return [(qkv, self.hidden), (self.hidden, mixed), (2 * self.inner, self.hidden), (self.hidden, self.inner)]


def products(kind: Kind) -> None:
    """Raise where 4-bit products do not work here, or are wrong."""
    _do(_product_checks(kind))


def attention(kind: Kind, kernels: Any) -> None:
    """Raise where a layer's other kernels (the module ops_triton) do not work here, or are wrong."""
    _do(_layer_checks(kind, kernels))


def drawing(sampler: Sampler, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise where the kernel that draws a step's tokens does not work here, or draws others than the sampler."""
    _do([_draw_check(sampler, vocabulary, dtype, device)])


def _draw_check(sampler: Sampler, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Check:
    return ("draw", sampler, vocabulary, dtype, device), lambda: _compare_draws(sampler, vocabulary, dtype, device)


def ahead(kind: Kind, sampler: Sampler | None = None, vocabulary: int = 0) -> Future[None]:
    """Do all checks in threads, that of a sampler's draws included.

    What fails there fails again where the kernels are wanted, and is said there.
    """
    with contextlib.suppress(Exception):  # libraries are imported by one thread, whatever becomes of it
        import bitsandbytes  # noqa: F401

        from fast_ft.generate.engine import draw_triton, ops_triton  # noqa: F401

    if kind.planes and kind.way is None:
        kind = replace(kind, way=_first_way(kind))
        kind = replace(kind, planes=kind.way is not None)
    done: Future[None] = Future()
    threading.Thread(target=_do_all, args=(kind, sampler, vocabulary, done), name="kernels", daemon=True).start()
    return done


def _first_way(kind: Kind) -> nf4_linear.Way | None:
    """Return the fastest way for weights like these on this card, if there is one."""
    with contextlib.suppress(Exception):
        return nf4_linear.first_way(kind.products, torch.device(kind.device))
    return None


def _do_all(kind: Kind, sampler: Sampler | None, vocabulary: int, done: Future[None]) -> None:
    """Do all checks, several at a time, and tell `done` of the first failure."""
    try:
        from fast_ft.generate.engine import ops_triton

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kernels") as threads:
            checks = [*(_product_checks(kind) if kind.planes else []), *_layer_checks(kind, ops_triton)]
            if sampler is not None and fits(sampler, vocabulary):
                dtype, device = getattr(torch, kind.dtype), torch.device(kind.device)
                checks.insert(0, _draw_check(sampler, vocabulary, dtype, device))  # it takes longest to compile
            made = [threads.submit(_do, [check]) for check in checks]
        for each in made:
            each.result()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


Check = tuple[tuple[Any, ...], Callable[[], None]]  #: what is remembered once it has passed, and the check


def _product_checks(kind: Kind) -> list[Check]:
    way = kind.way
    assert way is not None
    few: list[Check] = [
        (
            (f"products of {each} rows", kind),
            lambda each=each: nf4_linear.compare_few(way, kind.dtype, kind.device, each, kind.products),  # type: ignore[misc]
        )
        for each in kind.steps
        if each <= nf4_linear.FEW
    ]
    return [*few, (("products of many rows", kind), lambda: nf4_linear.compare_many(kind.dtype, kind.device))]


def _layer_checks(kind: Kind, kernels: Any) -> list[Check]:
    return [
        (("attention", kind), lambda: _compare_attention(kind, kernels)),
        (("norms and gate", kind), lambda: _compare_between(kind, kernels)),
    ]


def _do(checks: list[Check]) -> None:
    for name, check in checks:
        if name not in _passed:
            check()
            _passed.add(name)


class _Draw:
    """Random tensors on the kind's device."""

    def __init__(self, kind: Kind) -> None:
        self.dtype, self.device = getattr(torch, kind.dtype), torch.device(kind.device)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Return normally distributed numbers in the kind's dtype."""
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32).to(self.dtype)


def _compare_draws(sampler: Sampler, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare the tokens of a step's end and the state after it; the largest logits are all different."""
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
    if not (torch.equal(state, after) and torch.equal(chunk[:, 2], expected_S) and (chunk[:, 3:] == -7).all()):
        raise RuntimeError(f"tokens {chunk[:, 2].tolist()} were drawn, not {expected_S.tolist()}")
    if not torch.equal(logits_SV, given_SV.float()):
        raise RuntimeError("the logits were not copied")


def _compare_attention(kind: Kind, kernels: Any) -> None:
    """Compare rope and cache, attention over pages and attention over prompts."""
    draw, width = _Draw(kind), kind.head_dim
    device, whole, count = draw.device, kind.heads + 2 * kind.kv_heads, 18
    frequencies = 1e4 ** -(torch.arange(0, width, 2, device=device).float() / width)
    qkv = draw.normal(count, whole * width)
    memory = draw.normal(2, (3 * count + 1) * PAGE, kind.kv_heads, width)
    held, steps = quantised(memory) if kind.kv_bits == 8 else (memory, None)
    # Lengths and table lie in one tensor, at places of odd alignment, as in a step: kernels are compiled for that.
    state = torch.zeros(count, 7 + 3, dtype=torch.int64, device=device)
    state[:, 7:] = torch.randperm(3 * count, generator=draw.generator, device=device).view(count, 3) + 1
    state[:, 1] = torch.tensor([PAGE, 0, 3 * PAGE - 1] * (count // 3), device=device)
    length, table = state[:, 1], state[:, 7:]
    cell = table.gather(1, (length // PAGE)[:, None])[:, 0] * PAGE + length % PAGE
    starts = torch.tensor([0, 1, count], dtype=torch.int32, device=device)
    # how each (row, head) is divided hangs on a step's rows, and is another kernel
    splits = sorted({kernels.splits_for(rows, kind.heads) for rows in kind.steps}) if kernels.FUSES else [None]
    found = []
    for ops in (ops_torch, kernels):
        keys, values = held.clone()
        scales = None if steps is None else steps.clone()
        cos_sin = ops.rope(length, frequencies, 1.0, draw.dtype)
        q, k, v = ops.rotate_into_cache(qkv.clone(), kind.heads, cos_sin, cell, keys, values, scales)
        mixed, halves = [], []
        for each in splits:
            for window in (None, PAGE + 3):
                first = _first(kind, kind.products[1][1], kind.ranks[1], count)
                mixed.append(
                    ops.paged_attention(
                        q,
                        keys,
                        values,
                        table,
                        length,
                        columns=3 * PAGE,
                        planes=kind.ordered,
                        window=window,
                        scales=scales,
                        first=first,
                        splits=each,
                    )
                )
                halves += [] if first is None else [first.xa_TR]
        if kind.ordered and ops is ops_torch:  # to which the order means nothing
            mixed = [nf4.to_planes(each) for each in mixed]
        if ops.PACKED:
            packed = ops.packed_attention(q, k, v, starts, count)
        else:
            packed = torch.cat([ops.causal(q[a:b], k[a:b], v[a:b]) for a, b in ((0, 1), (1, count))])
        if scales is not None:
            keys, values = dequantised(keys, scales[0], draw.dtype), dequantised(values, scales[1], draw.dtype)
        found.append([keys, values, *mixed, *halves, packed])
    _refuse_difference(kind, *found)


def _compare_between(kind: Kind, kernels: Any) -> None:
    """Compare norms, gate and rope as prefill and steps call them: over whole products, or parts to be added."""
    draw, count = _Draw(kind), 4
    x, weight = draw.normal(count, kind.hidden), draw.normal(kind.hidden) / 4
    qkv, out, gate_up, down = kind.products

    def drawn(*shapes: tuple[int, int]) -> list[tuple[bool, Tensor]]:
        """Return what each of these products may leave, and whether the next one wants plane order."""
        cuts = [(1, False), *((parts, kind.ordered) for parts in _parts(kind, shapes))]
        return [(planes, draw.normal(parts, count, shapes[0][0]) * (0.5 / parts**0.5)) for parts, planes in cuts]

    ranks_qkv, _, ranks_gate, ranks_down = kind.ranks
    deltas = [(ranks_gate, drawn(out)), (ranks_qkv, drawn(down))]
    gates, mixed = drawn(gate_up), drawn(qkv)
    found: list[list[Tensor]] = []
    for ops in (ops_torch, kernels):
        taken = _whole if ops is ops_torch else _split
        made = [_normed(ops, x, None, weight, planes=False)]
        made += _with_half(kind, kind.hidden, ranks_qkv, partial(_normed, ops, x, None, weight, planes=kind.ordered))
        for ranks, cuts in deltas:
            for planes, parts in cuts:
                made.append(_normed(ops, x, taken(parts), weight, planes=False))
                work = partial(_normed, ops, x, taken(parts), weight, planes=planes)
                made += _with_half(kind, kind.hidden, ranks, work)
        for planes, parts in gates:
            work = partial(_gated, ops, taken(parts), draw.dtype, planes=planes)
            made += _with_half(kind, kind.inner, ranks_down, work)
        for _, parts in mixed:
            made += _rotated(kind, ops, taken(parts))
        found.append(made)
    _refuse_difference(kind, *found)


def _first(kind: Kind, inputs: int, ranks: int, tokens: int) -> FirstHalf | None:
    """Return a first half for `ranks`, always of the same numbers, so small that x A is of x's size; None for 0."""
    if not ranks:
        return None
    return first_half(_Draw(kind).normal(inputs, ranks) / inputs**0.5, tokens)


def _with_half(kind: Kind, inputs: int, ranks: int, work: Callable[..., Tensor]) -> list[Tensor]:
    """Return what `work` makes, and the first half that it computes beside it, if there are ranks."""
    first = _first(kind, inputs, ranks, 4)
    made = work(first=first)
    return [made] if first is None else [made, first.xa_TR]


def _whole(parts: Tensor) -> Tensor:
    """Return the sum of a product's parts, as plain torch takes it."""
    return parts.float().sum(dim=0).to(parts.dtype)


def _split(parts: Tensor) -> Tensor:
    """Return a product's parts as the kernels take them: in fp32, if there are several."""
    return parts.float() if len(parts) > 1 else parts[0]


def _normed(
    ops: Any, x: Tensor, delta: Tensor | None, weight: Tensor, *, planes: bool, first: FirstHalf | None = None
) -> Tensor:
    made = ops.add_norm(x.clone(), delta, weight, 1e-5, planes=planes, first=first)
    return nf4.to_planes(made) if planes and ops is ops_torch else made


def _gated(ops: Any, x: Tensor, dtype: torch.dtype, *, planes: bool, first: FirstHalf | None = None) -> Tensor:
    made = ops.gated(x, dtype, planes=planes, first=first)
    return nf4.to_planes(made) if planes and ops is ops_torch else made


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


def _refuse_difference(kind: Kind, expected: list[Tensor], found: list[Tensor]) -> None:
    off = max((a.float() - b.float()).abs().max().item() for a, b in zip(expected, found, strict=True))
    # a head of normal numbers spans 6 to 8, of which an 8-bit step is 0.03
    allowed = (0.02 if kind.dtype != "bfloat16" else 0.1) + (0.04 if kind.kv_bits == 8 else 0.0)
    if not off <= allowed:  # a NaN, too
        raise RuntimeError(f"they differ from plain torch by {off}")
