"""How 4-bit weights are multiplied in steps of each number of rows: timed on this card at the start, or as planned.

Weights that are decoded in registers are read once; dequantised ones are written and read back, but multiplied by the
card's own library. Which is faster hangs on the card's memory and its processors, so both are timed. What was chosen is
written into the plan, and obeyed when the run is resumed or done again: the two round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fast_ft.generate.engine import nf4_linear
from fast_ft.generate.engine.cuda_graphs import Graphs
from fast_ft.plan.decode_pool import read_products, write_products

if TYPE_CHECKING:
    from fast_ft.generate.engine.fused_model import FusedModel

DEQUANTISED = "dequantised"
_TIMED = 12  #: products, three layers' in most models: more than a card's cache holds
#: Dequantised weights are chosen where the kernel takes this multiple of their time: near 1, noise would choose.
_CLEARLY = 1.1


def choose(model: FusedModel, rows: Sequence[int], planned: str) -> str:
    """Settle how the model multiplies in steps of these rows, and return it as the plan has it, "64:nf4_mma 32:...".

    What is `planned` for a number of rows is obeyed where it works here, and what is planned for others is returned
    too: an engine that is made later, for fewer rows, obeys both. "" where there is nothing to choose.
    """
    way = model.way_name
    if way is None:
        return ""
    asked = read_products(planned)
    known = {count: name for count, name in asked.items() if name in (way, DEQUANTISED)}
    for count in sorted(set(rows) - known.keys(), reverse=True):
        # the kernel takes less time for fewer rows, and dequantising as much
        is_kernels = any(name == way for more, name in known.items() if more > count)
        known[count] = way if is_kernels else _faster(model, count, way)
    model.dequantised_at = frozenset(count for count in rows if known[count] == DEQUANTISED)
    return write_products(asked | known)


def _faster(model: FusedModel, rows: int, way: str) -> str:
    if rows > nf4_linear.FEW:
        return DEQUANTISED
    few, dequantised = (_milliseconds(model, rows, few=few) for few in (True, False))
    return DEQUANTISED if few > _CLEARLY * dequantised else way


def _milliseconds(model: FusedModel, rows: int, *, few: bool) -> float:
    """Return the ms of the first products that can be decoded in registers, the least of three replays of a graph."""
    all_products = (part for layer in model.layers for part in (layer[1], layer[2], layer[4], layer[5]))
    products = [part for part in all_products if isinstance(part, nf4_linear.InRegisters)][:_TIMED]
    x = {product.inputs: torch.randn(rows, product.inputs, device=model.device).to(model.dtype) for product in products}

    def work() -> None:
        for product in products:
            product(x[product.inputs], few, product.first(rows) if few else None)

    with torch.inference_mode():
        work()
        captured = Graphs(works=True).capture(work)
        return min(_timed(captured[0].replay if captured else work) for _ in range(3))


def _timed(work: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
