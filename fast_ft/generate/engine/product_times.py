"""How long 4-bit products take on this card: our ways, each compared first, beside bitsandbytes' own.

For the doctor and for the file that a card's owner sends. A way that nothing chooses yet is tried here all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fast_ft.generate.engine import nf4_linear
from fast_ft.models import nf4

_REPEATS = 20
_COPIES_BYTES = 96 << 20  #: of weights that are multiplied in turn, so that none waits in a card's cache


def time_products(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], dtype: str, device: str
) -> list[dict[str, Any]]:
    """Return {"outputs", "inputs", "rows", "way", "off", "us"} for each way; "failed", a reason, where it has none.

    "off" is the difference from the product with dequantised weights, over that product; both by their norms.
    """
    found = []
    for outputs, inputs in shapes:
        weights = _weights(outputs, inputs, dtype, device)
        for count in rows:
            draw = torch.Generator(device).manual_seed(count)
            x = torch.randn(count, inputs, generator=draw, device=device).to(getattr(torch, dtype))
            for name, product in _ways((outputs, inputs), count, dtype, torch.device(device)).items():
                about = {"outputs": outputs, "inputs": inputs, "rows": count, "way": name}
                try:
                    found.append(about | _timed(product(x), x, weights))
                except Exception as error:  # whatever a card or its driver refuses is what was to be found out
                    found.append(about | {"failed": f"{type(error).__name__}: {str(error)[:200]}"})
    return found


def _ways(
    shape: tuple[int, int], rows: int, dtype: str, device: torch.device
) -> dict[str, Callable[[Tensor], Callable[[_Weight], Tensor]]]:
    """Return the ways that may run on this card for that many rows: of x, its product with a weight."""
    from bitsandbytes import matmul_4bit

    from fast_ft.generate.engine import nf4_hopper, nf4_mma, nf4_turing

    ways: dict[str, Callable[[Tensor], Callable[[_Weight], Tensor]]] = {
        "bitsandbytes": lambda x: lambda w: matmul_4bit(x, w.packed, w.state)
    }
    own: list[nf4_linear.Way] = [nf4_hopper, nf4_mma]
    for way in own:
        with contextlib.suppress(ValueError):
            nf4_linear.check_shapes(way, [shape], device)
            ways[way.NAME] = partial(_in_order, way)
    if dtype == "float16" and rows <= nf4_turing.ROWS:
        ways[nf4_turing.NAME] = lambda x: lambda w: nf4_turing.product(x, w.words, w.scales)
    return ways


def _in_order(way: nf4_linear.Way, x: Tensor) -> Callable[[_Weight], Tensor]:
    ordered = nf4.arranged(x, way.order_for(len(x)))
    return lambda w: way.product(ordered, w.words, w.scales, None, None)


class _Weight:
    """Random weights as bitsandbytes has them, and as our kernels read them."""

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype, draw: torch.Generator) -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dense = torch.randn(outputs, inputs, generator=draw, device=draw.device).to(dtype)
        self.packed, self.state = quantize_4bit(dense, quant_type="nf4")
        self.dense = dequantize_4bit(self.packed, self.state)
        self.packed = self.packed.view(-1)
        self.words = self.packed.view(torch.int32).view(outputs, inputs // 8)
        absmax = self.state.absmax.float().view(-1)
        self.scales = nf4.pack_scales(absmax, dtype).view(outputs, inputs // nf4.BLOCK).T.contiguous()


def _weights(outputs: int, inputs: int, dtype: str, device: str) -> list[_Weight]:
    draw = torch.Generator(device).manual_seed(0)
    count = max(1, min(8, _COPIES_BYTES // (outputs * inputs // 2)))
    return [_Weight(outputs, inputs, getattr(torch, dtype), draw) for _ in range(count)]


def _timed(product: Callable[[Any], Tensor], x: Tensor, weights: list[_Weight]) -> dict[str, float]:
    """Return how far a product is off, and the microseconds that it takes: the least of three rounds."""
    expected = x.float() @ weights[0].dense.float().T
    made = product(weights[0]).float()
    off = ((made.sum(dim=0) if made.dim() == 3 else made) - expected).norm() / expected.norm()
    spans = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for turn in range(_REPEATS):
            product(weights[turn % len(weights)])
        end.record()
        torch.cuda.synchronize()
        spans.append(begin.elapsed_time(end) / _REPEATS * 1e3)
    return {"off": round(off.item(), 6), "us": round(min(spans), 1)}
