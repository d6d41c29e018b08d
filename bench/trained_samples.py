"""Samples of bench/plan_samples.py as the plan sees them, and the memory that they took: planned and measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fast_ft.common.gpu_rates import MeasuredRates
from fast_ft.hub.families import GIB, FamilySpec, ModelShape
from fast_ft.plan import cards, memory_model
from fast_ft.plan.constants import MEMORY
from fast_ft.plan.micro_batches import width
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.plan.training_work import Rates, Training, takes_flash

_ALONE_GIB = 1.5  #: of a card that are outside of the allocator; more is taken by other processes
_IDLE_GIB = 0.05  #: between a loaded base's tensors: the rests of pages
#: The commit whose blocks kept the second norm and its gradient through attention's backward pass: two hidden states.
_NORMS_APART = "c6b84f853089abc513164453628d4e6ef4c03dad"


@dataclass(frozen=True)
class Trained:
    """A sample as the plan sees it."""

    title: str
    line: dict[str, Any]
    shape: ModelShape
    training: Training
    rates: Rates
    plan: TrainPlan
    norms_apart: bool = False  #: see _NORMS_APART

    @property
    def alone(self) -> bool:
        """Whether no other process used the card; others' memory is outside of this one's allocator, and shows."""
        return bool(self.line["context_gib"] < _ALONE_GIB)

    @property
    def captured(self) -> bool:
        """Whether its passes were replayed from graphs."""
        return self.plan.capture


def read(paths: Iterable[Path]) -> list[Trained]:
    """Return the samples of some files; a line that says how a training failed is left out."""
    found = []
    for path in paths:
        head, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        card, apart = _card(head), head.get("commit") == _NORMS_APART
        found += [replace(_trained(line, card), norms_apart=apart) for line in lines if "error" not in line]
    return found


def _card(head: dict[str, Any]) -> cards.Card:
    measured = MeasuredRates(**head["rates"])
    capability = (9, 0) if "H" in head["environment"]["gpu"]["name"] else (8, 0)
    return cards.at_hand(head["environment"]["gpu"]["name"], capability, 80.0, measured)


def _trained(line: dict[str, Any], card: cards.Card) -> Trained:
    family = FamilySpec.from_config(line["config"])
    training = Training(
        r=line["r"], optim=line["optim"], load_in_4bit=True, backend="fused", rows=line["rows"],
        longest=line["longest"], flash=takes_flash(card.capability, family.shape.head_dim), qk_norms=family.qk_norms,
    )  # fmt: skip
    plan = TrainPlan(line["rows"], None, line["recompute"], line["capture"], backend="fused")
    return Trained(line["title"], line, family.shape, training, card.expected, plan)


def context_gib(each: Trained) -> float:
    """Return the GiB of a sample's CUDA context; the usual where others used the card."""
    return float(each.line["context_gib"] if each.alone else MEMORY["context_gib"])


def planned_gib(each: Trained) -> float:
    """Return the GiB that the plan says a sample's allocator reserves at its peak, without the CUDA context."""
    widest = max(width(sum(step["lengths"]), capture=each.captured) for step in each.line["steps"])
    about = (each.shape, each.training, widest, each.plan.recompute_layers)
    context = MEMORY["context_gib"] + (MEMORY["graphs_context_gib"] if each.captured else 0.0)
    return (
        memory_model.fixed_gib(each.shape, each.training) - context
        + memory_model.pass_gib(*about, capture=each.captured)
        + _held_more(each, memory_model.pass_moments(*about), widest)
    )  # fmt: skip


def _held_more(each: Trained, moments: dict[str, float], tokens: int) -> float:
    """Return the GiB that a sample of the blocks of `_NORMS_APART` held more at its peak than it would now."""
    if not each.norms_apart:
        return 0.0
    more = 4 * each.shape.hidden_size * tokens
    then = [held + more * (name in ("last layer", "computed again")) for name, held in moments.items()]
    return (max(then) - max(moments.values())) / GIB


def measured_gib(each: Trained) -> float:
    """Return the GiB that a sample's allocator reserved at its peak, as if its base had been loaded.

    What trainings before it had left is taken off, and what making a random base left idle, but for the usual.
    """
    base = each.line["base"]
    idle = max(0.0, base["reserved"] - base["allocated"] - _IDLE_GIB)
    return float(each.line["trained"]["most_reserved"] - each.line["reserved_before_gib"] - idle)
