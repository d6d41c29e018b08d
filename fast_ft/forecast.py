"""How long training will take on a card: arithmetic, bytes and launches, projected from the plan.

A projection, not a measurement. A pass over a micro-batch does 4 operations for each base weight and token (6 with
recomputation: the frozen base needs no weight gradients), turns the 4-bit weights to 16 bits once forward and once
backward, and takes Python some time to launch. On the H200 that it was fitted on, captured passes of 1,024 and 2,048
tokens took 73 and 126 ms; this gives 61 to 76 and 115 to 144.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.errors import InputError, nearest
from fast_ft.passes import EAGER_MULTIPLE, GRAPH_MULTIPLE, cut
from fast_ft.plan import LAUNCH_SECONDS, ModelShape, Plan

_CARDS = Path(__file__).with_name("cards.json")
_STEP_SECONDS = 0.05  #: optimizer, clipping and log of one step


@dataclass(frozen=True)
class Card:
    """A GPU as plans see it. `tflops` is the range of 16-bit TFLOP/s that training reaches on it, not the paper's."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    tflops: tuple[float, float]
    gb_per_s: float
    source: str

    def missing(self) -> list[str]:
        """Return what this card's compute capability lacks, in words."""
        lacks = []
        if self.capability < (8, 0):
            lacks += ["bfloat16 (float16 with loss scaling is used)", "FlashAttention 2 (PyTorch's attention is used)"]
        return lacks


def card(name: str) -> Card:
    """Return a card of cards.json; InputError where the name is not in it."""
    cards: dict[str, dict[str, Any]] = json.loads(_CARDS.read_text(encoding="utf-8"))
    if name.lower() not in cards:
        raise InputError(f"--gpu {name!r}: unknown{nearest(name.lower(), cards)}. Known: {', '.join(cards)}.")
    entry = cards[name.lower()]
    return Card(**{**entry, "capability": tuple(entry["capability"]), "tflops": tuple(entry["tflops"])})


def like(name: str, memory_gib: float, tflops: float) -> Card:
    """Return a card for a GPU that is here: free memory and measured matmul rate, of which training reaches a part.

    Bandwidth is that of the known card with the nearest rate: it decides little.
    """
    cards = [card(key) for key in json.loads(_CARDS.read_text(encoding="utf-8"))]
    nearest_card = min(cards, key=lambda each: abs(math.log(each.tflops[1] / tflops)))
    source = f"{tflops:.0f} TFLOP/s measured here, of which training reaches 54 to 67 % (as on an H200)"
    reached = (0.54 * tflops, 0.67 * tflops)
    return Card(name, _capability(), memory_gib, reached, nearest_card.gb_per_s, source)


def _capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()


def step_seconds(
    shape: ModelShape, plan: Plan, lengths: Sequence[int], tflops: float, gb_per_s: float, *, load_in_4bit: bool
) -> float:
    """Return the projected seconds of one optimizer step over rows of these token counts."""
    multiple = GRAPH_MULTIPLE if plan.capture else EAGER_MULTIPLE
    pieces = cut(lengths, most_rows=plan.micro_batch, most_tokens=plan.most_tokens, multiple=multiple)
    passes = 3 if plan.checkpointing else 2
    launch = LAUNCH_SECONDS * (shape.num_hidden_layers / 32) * passes / 2
    # read half a byte, write two: what a weight costs when it is turned to 16 bits
    unpack = passes * shape.linear_weights * 2.5 / (gb_per_s * 1e9) if load_in_4bit else 0.0
    total = _STEP_SECONDS
    for piece in pieces:
        width = max(lengths[i] for i in piece)
        width += -width % multiple
        rows = plan.micro_batch if plan.capture else len(piece)
        attention = 4.0 * shape.num_hidden_layers * shape.hidden_size * width
        flops = rows * width * passes * (2.0 * shape.linear_weights + attention)
        flops += rows * width * 4.0 * shape.vocab_size * shape.hidden_size
        seconds = flops / (tflops * 1e12) + unpack
        total += seconds if plan.capture else max(seconds, launch)
    return total
