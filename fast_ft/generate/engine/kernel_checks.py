"""Do the Triton kernels work on this card, and say what plain torch says? Asked once in a process for each kind of use.

The checks compile what decoding will run. `ahead` lets a thread do that while the base is being loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fast_ft.generate.engine import nf4_linear, ops_torch
from fast_ft.generate.engine.kv_cache import PAGE
from fast_ft.models import nf4

_passed: set[tuple[str, Kind]] = set()


@dataclass(frozen=True)
class Kind:
    """For which the kernels are compiled. `steps`: how many rows a step may have; `planes`: as Fused's."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    steps: tuple[int, ...]
    planes: bool


def products(kind: Kind) -> None:
    """Raise where 4-bit products of few rows do not work here, or are wrong."""
    _once("products", kind, lambda: nf4_linear.compare_planes(kind.dtype, kind.device, kind.steps))


def attention(kind: Kind, kernels: Any) -> None:
    """Raise where a layer's kernels (the module decode.kernels) do not work here, or are wrong."""
    _once("attention", kind, lambda: _compare(kind, kernels))


def ahead(kind: Kind) -> Future[None]:
    """Do both checks in a thread. What fails there fails again where the kernels are wanted, and is said there."""

    def both() -> None:
        from fast_ft.generate.engine import ops_triton

        if kind.planes:
            products(kind)
        attention(kind, ops_triton)

    with contextlib.suppress(Exception):  # libraries are imported by one thread, whatever becomes of it
        import bitsandbytes  # noqa: F401

        from fast_ft.generate.engine import nf4_triton, ops_triton  # noqa: F401
    thread = ThreadPoolExecutor(1, thread_name_prefix="kernels")
    done = thread.submit(both)
    thread.shutdown(wait=False)
    return done


def _once(name: str, kind: Kind, check: Callable[[], None]) -> None:
    if (name, kind) not in _passed:
        check()
        _passed.add((name, kind))


def _compare(kind: Kind, kernels: Any) -> None:
    import torch

    dtype, device, width = getattr(torch, kind.dtype), torch.device(kind.device), kind.head_dim
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw, device=device, dtype=torch.float32).to(dtype)

    whole, count = kind.heads + 2 * kind.kv_heads, 18
    frequencies = 1e4 ** -(torch.arange(0, width, 2, device=device).float() / width)
    qkv, weight = normal(count, whole * width), normal(whole * width)
    memory = normal(2, (3 * count + 1) * PAGE, kind.kv_heads, width)
    table = torch.randperm(3 * count, generator=draw, device=device).view(count, 3) + 1
    length = torch.tensor([PAGE, 0, 3 * PAGE - 1] * (count // 3), device=device)
    cell = table.gather(1, (length // PAGE)[:, None])[:, 0] * PAGE + length % PAGE
    starts = torch.tensor([0, 1, count], dtype=torch.int32, device=device)
    # steps of few rows have an attention kernel of their own
    sizes = [count, 3] if not kind.planes or min(kind.steps) <= 16 else [count]
    found = []
    for ops in (ops_torch, kernels):
        keys, values = memory.clone()
        x = ops.add_norm(qkv.clone(), qkv, weight, 1e-5)
        cos_sin = ops.rope(length, frequencies, 1.0, dtype)
        q, k, v = ops.rotate_into_cache(x, kind.heads, cos_sin, cell, keys, values)
        mixed = [
            ops.paged_attention(q[:n], keys, values, table[:n], length[:n], columns=3 * PAGE, planes=kind.planes)
            for n in sizes
        ]
        if kind.planes and ops is ops_torch:  # to which the order means nothing
            mixed = [nf4.to_planes(each) for each in mixed]
        if ops.PACKED:
            packed = ops.packed_attention(q, k, v, starts, count)
        else:
            packed = torch.cat([ops.causal(q[a:b], k[a:b], v[a:b]) for a, b in ((0, 1), (1, count))])
        found.append([keys, values, *mixed, packed, ops.gated(packed, dtype)])
    off = max((a.float() - b.float()).abs().max().item() for a, b in zip(*found, strict=True))
    if not off <= (0.02 if kind.dtype != "bfloat16" else 0.1):  # a NaN, too
        raise RuntimeError(f"they differ from plain torch by {off}")
