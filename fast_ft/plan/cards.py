"""Cards as plans see them: a table of known ones, and the one that is here, measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fast_ft.common.errors import InputError, nearest
from fast_ft.common.gpu_rates import MeasuredRates
from fast_ft.plan.training_work import Rates

_CARDS = Path(__file__).with_name("cards.json")
_OLDEST = (7, 5)  #: compute capability that CUDA 13 and the bitsandbytes built with it have code for
#: Of a large product's measured rate, what training's products may reach on a card that is not in the table: from the
#: share of a T4, which is the least that is known, to all of it.
_REACHED = (0.6, 1.0)
#: Of the same rate, what torch's memory-efficient attention reaches: by the H200, whose instructions for products it
#: does not use, and by what FlashAttention-2's paper (arXiv 2307.08691) shows of it on an A100.
_HOPPER_ATTENTION, _ATTENTION = 0.12, 0.4
_LAUNCH_SECONDS = 9.6e-6  #: of a small kernel on the host that the host's constants are of; H200 hosts: 7 to 11 us
_BARE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb)")
_MOST_GIB = 1024


@dataclass(frozen=True)
class Card:
    """A GPU as plans see it.

    `tflops` is the range of 16-bit TFLOP/s that training's products reach on it, not the paper's; `product` is what a
    large product keeps up, `attention` what torch's memory-efficient attention does. `launch`: see cost_model.Rates.
    """

    name: str
    capability: tuple[int, int]
    memory_gib: float
    tflops: tuple[float, float]
    product: float
    attention: float
    gb_per_s: float
    source: str
    launch: float = 1.0

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
        return Rates(tflops, self.gb_per_s, self.attention, self.launch)

    def missing(self) -> list[str]:
        """Return what this card's compute capability lacks, in words."""
        lacks = []
        if self.capability < (8, 0):
            lacks += ["bfloat16 (float16 with loss scaling is used)", "FlashAttention 2 (PyTorch's attention is used)"]
        return lacks

    def here(self, name: str, memory_gib: float, measured: MeasuredRates) -> Card:
        """Return this card as it is here: its own memory, bandwidth and host, and no more than its measured rate.

        A rate above the table's is not believed, since it was measured for a second: a T4 does 42 TFLOP/s then, and
        keeps up 24.
        """
        share = min(1.0, measured.tflops / self.product)
        low, high = (round(share * each, 1) for each in self.tflops)
        source = (
            f"{self.name} of the table; measured here {measured.tflops:.0f} TFLOP/s and {measured.gb_per_s:.0f} GB/s"
        )
        return replace(
            self, name=name, memory_gib=memory_gib, tflops=(low, high), product=share * self.product,
            attention=share * self.attention, gb_per_s=measured.gb_per_s, source=source, launch=_launch(measured),
        )  # fmt: skip


def by_evidence(capability: tuple[int, int]) -> tuple[tuple[str, ...], str]:
    """Return the ways of training on cards of a compute capability, the first choice first, and the evidence for it.

    The table is a part of the program: a release that somebody reviewed changes it, never a file that was received.
    """
    entries: list[dict[str, Any]] = _content()["ways"]
    entry = next(each for each in entries if each["capability"] in (list(capability), "others"))
    return tuple(entry["order"]), entry["evidence"]


def known() -> dict[str, dict[str, Any]]:
    """Return the entries of cards.json by the cards' short names."""
    return {name: entry for name, entry in _content().items() if "product" in entry}


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_CARDS.read_text(encoding="utf-8"))
    return content


def card(name: str, key: str = "--gpu") -> Card:
    """Return a card of cards.json, or one of a bare memory size such as 8GiB. `key` says where the name was given.

    Raises:
        InputError: No such card, or one that the installed libraries have no code for.
    """
    cards, wanted = known(), name.strip().lower()
    if bare := _BARE.fullmatch(wanted):
        return _of_memory(float(bare[1]) * (1 if bare[2] == "gib" else 1e9 / 2**30), f"{key} {name!r}")
    if wanted in cards:
        return _made(cards[wanted])
    for entry in _content()["refused"]:
        if wanted in entry["short"] or re.fullmatch(entry["match"], wanted):
            raise InputError(f"{key} {name!r} is {entry['name']}: {_NO_CODE}")
    raise InputError(
        f"{key} {name!r}: unknown{nearest(wanted, cards)}. Known: {', '.join(cards)}, or a memory size such as 8GiB."
    )


_NO_CODE = (
    "the torch and bitsandbytes that requirements.txt installs are built with CUDA 13, which has no code for compute "
    "capabilities below 7.5. Take a card of 7.5 or newer: a T4, an RTX 20, or any after them."
)


def _made(entry: dict[str, Any]) -> Card:
    fields = {key: value for key, value in entry.items() if key != "match"}
    return Card(**{**fields, "capability": tuple(entry["capability"]), "tflops": tuple(entry["tflops"])})


def _of_memory(memory_gib: float, given: str) -> Card:
    """Return a card of which only the memory is known: it has the rates of the slowest card of the table."""
    if not 1 <= memory_gib <= _MOST_GIB:
        raise InputError(f"{given}: a memory size is from 1GiB to {_MOST_GIB}GiB")
    slowest = min((_made(entry) for entry in known().values()), key=lambda each: each.expected.tflops)
    source = f"no card is named, so the rates are those of the slowest one known, {slowest.name}"
    return replace(slowest, name=f"a card of {memory_gib:g} GiB", memory_gib=memory_gib, source=source)


def at_hand(name: str, capability: tuple[int, int], memory_gib: float, measured: MeasuredRates) -> Card:
    """Return the card that is here: one of the table by its driver's name, else by its measured rates alone.

    `memory_gib` is what this process may take, the CUDA context included.
    """
    if (short := short_name(name)) is not None:
        return card(short).here(name, memory_gib, measured)
    low, high = _REACHED
    source = (
        f"{measured.tflops:.0f} TFLOP/s and {measured.gb_per_s:.0f} GB/s measured here; training reaches {low:.0%} to "
        f"{high:.0%} of the product (a T4's share, to all of it)"
    )
    hopper = (9, 0) <= capability < (12, 0)
    return Card(
        name, capability, memory_gib, (round(low * measured.tflops, 1), round(high * measured.tflops, 1)),
        measured.tflops, (_HOPPER_ATTENTION if hopper else _ATTENTION) * measured.tflops, measured.gb_per_s, source,
        _launch(measured),
    )  # fmt: skip


def short_name(driver_name: str) -> str | None:
    """Return the table's short name of a card by its driver's name, such as t4 of Tesla T4; None: it is not there."""
    plain = re.sub(r"^((nvidia|tesla|geforce)\s+)*", "", driver_name.lower())
    return next((short for short, entry in known().items() if re.fullmatch(entry["match"], plain)), None)


def refuse_old(name: str, capability: tuple[int, int], built_for: list[str]) -> None:
    """Raise InputError for a card that is here and too old for the installed torch; `built_for` as sm_75, sm_80."""
    if capability < _OLDEST and not any(each.startswith(f"sm_{capability[0]}") for each in built_for):
        raise InputError(f"the GPU here is {name}, of compute capability {capability[0]}.{capability[1]}: {_NO_CODE}")


def _launch(measured: MeasuredRates) -> float:
    return round(measured.launch_seconds / _LAUNCH_SECONDS, 2)
