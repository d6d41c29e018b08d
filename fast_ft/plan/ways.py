"""The ways in which a recipe may be trained here: through our own blocks, Unsloth or PEFT, and which comes first.

A recipe that names a way gets that way, or an error; only where several processes train, our own blocks take Unsloth's
place. `model.backend: auto` goes by the evidence in cards.json. Which
way was taken is fixed in the manifest when the first step begins (pipeline/way.py).
"""

from __future__ import annotations

from typing import NamedTuple

from fast_ft.models.loaders.base import ALONE_ONLY
from fast_ft.plan import cards
from fast_ft.recipe import lora_kinds
from fast_ft.recipe.schema import Recipe


class Ways(NamedTuple):
    """The names of the ways, the first choice first, and a sentence on why that one is first, or ""."""

    names: tuple[str, ...]
    why: str


def ways(recipe: Recipe, capability: tuple[int, int] | None, world_size: int = 1) -> Ways:
    """Return the ways of training a recipe on a card of this compute capability; None: there is no NVIDIA GPU.

    `world_size` processes train together. Unsloth trains in one process only, whoever asked for it.
    """
    named = recipe.model.backend
    if named == "unsloth" and world_size > 1:
        return Ways(("fused", "peft"), ALONE_ONLY)
    if named != "auto":
        return Ways((named,), "")
    if capability is None:
        return Ways(("peft",), "")
    order, evidence = cards.by_evidence(capability)
    left = [name for name in order if not (name == "unsloth" and world_size > 1)]
    known = tuple(name for name in left if lora_kinds.unknown(name, recipe.lora) is None)
    if known[0] == order[0]:
        return Ways(known, evidence)
    if left[0] != order[0]:
        return Ways(known, ALONE_ONLY)
    kind = lora_kinds.unknown(order[0], recipe.lora)
    assert kind is not None, "the first in order is left out for a reason"
    return Ways(known, f"{lora_kinds.TITLES[order[0]]} cannot train {kind.name}")
