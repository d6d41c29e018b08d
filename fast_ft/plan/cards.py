"""Cards as plans see them: a table of known ones, and the one that is here, measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.common.errors import InputError, nearest
from fast_ft.plan.cost_model import Rates

_CARDS = Path(__file__).with_name("cards.json")
_WAYS = "ways"  #: the key of cards.json that is no card: see `by_evidence`
#: Shares of a large matrix product's measured rate that training's products reach, as on an H200.
_REACHED = (0.93, 1.03)

#: Of a product's rate, measured on an H200: its products use instructions that torch's memory-efficient attention does
#: not. Nothing is known of other cards, whose rates are those of whole runs.
_HOPPER_ATTENTION = 0.137


@dataclass(frozen=True)
class Card:
    """A GPU as plans see it. `tflops` is the range of 16-bit TFLOP/s that training reaches on it, not the paper's."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    tflops: tuple[float, float]
    gb_per_s: float
    source: str

    @property
    def rates(self) -> tuple[Rates, Rates]:
        """The lower and the upper end of what training may reach."""
        low, high = self.tflops
        return self._rates(low), self._rates(high)

    @property
    def expected(self) -> Rates:
        """What plans are settled with: the middle."""
        return self._rates(sum(self.tflops) / 2)

    def _rates(self, tflops: float) -> Rates:
        return Rates(tflops, self.gb_per_s, _HOPPER_ATTENTION if self.capability >= (9, 0) else 1.0)

    def missing(self) -> list[str]:
        """Return what this card's compute capability lacks, in words."""
        lacks = []
        if self.capability < (8, 0):
            lacks += ["bfloat16 (float16 with loss scaling is used)", "FlashAttention 2 (PyTorch's attention is used)"]
        return lacks


def known() -> dict[str, dict[str, Any]]:
    """Return the entries of cards.json by the cards' short names."""
    return {name: entry for name, entry in _content().items() if name != _WAYS}


def by_evidence(capability: tuple[int, int]) -> tuple[tuple[str, ...], str]:
    """Return the ways of training on cards of a compute capability, the first choice first, and the evidence for it.

    The table is a part of the program: a release that somebody reviewed changes it, never a file that was received.
    """
    entries: list[dict[str, Any]] = _content()[_WAYS]
    entry = next(each for each in entries if each["capability"] in (list(capability), "others"))
    return tuple(entry["order"]), entry["evidence"]


def _content() -> dict[str, Any]:
    return json.loads(_CARDS.read_text(encoding="utf-8"))


def card(name: str) -> Card:
    """Return a card of cards.json; InputError where the name is not in it."""
    cards = known()
    if name.lower() not in cards:
        raise InputError(f"--gpu {name!r}: unknown{nearest(name.lower(), cards)}. Known: {', '.join(cards)}.")
    entry = cards[name.lower()]
    return Card(**{**entry, "capability": tuple(entry["capability"]), "tflops": tuple(entry["tflops"])})


def like(name: str, memory_gib: float, tflops: float) -> Card:
    """Return a card for a GPU that is here: free memory and measured matmul rate, of which training reaches a part.

    Bandwidth is that of the known card with the nearest rate: it decides little.
    """
    cards = [card(key) for key in known()]
    nearest_card = min(cards, key=lambda each: abs(math.log(each.tflops[1] / tflops)))
    low, high = _REACHED
    source = f"{tflops:.0f} TFLOP/s measured here, of which training reaches {low:.0%} to {high:.0%} (as on an H200)"
    reached = (low * tflops, high * tflops)
    return Card(name, _capability(), memory_gib, reached, nearest_card.gb_per_s, source)


def _capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()
