"""What was measured on a card like the one that is here, and what never was: measured.json, written from the bench.

The bench stands beside the package, and is not installed with it. `python -m bench --readme` writes measured.json from
the bench's figures, and a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fast_ft.common.gpu import card_slug
from fast_ft.doctor.findings import Finding

FILE = Path(__file__).with_name("measured.json")
WORDS = {
    "train": "training", "decode": "answering", "recipe": "a recipe through each backend", "run": "a whole command",
    "sweep": "a sweep", "pocket": "the quickstart",
}  # fmt: skip
PAGE = "docs/t4.md in the project's repository says how an owner measures one in ten minutes"

Measured = dict[str, dict[str, str]]  #: {card's short name: {kind of figure: newest date}}


def read() -> Measured:
    """Return what measured.json holds."""
    found: Measured = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def examine(card: dict[str, str] | None, measured: Measured | None = None) -> Iterator[Finding]:
    """Yield what was measured on a card like this one (None: on CPUs), and what was measured on other cards only."""
    known = read() if measured is None else measured
    name = card_slug(card["name"]) if card else "cpu"
    here = known.get(name, {})
    cards = [each for each in known if each != "cpu"]
    on_any = {kind for each in cards for kind in known[each]} if card else set(here)
    kind_of_machine = f"a card like this one ({name})" if card else "CPUs"
    if not here:
        others = ", ".join(cards) or "none"
        text = f"nothing was ever measured on {kind_of_machine}; the project's figures are from: {others}"
        yield Finding("measured", "note", text, PAGE if card else "")
        return
    done = ", ".join(f"{WORDS.get(kind, kind)} ({date})" for kind, date in sorted(here.items()))
    never = ", ".join(WORDS.get(kind, kind) for kind in sorted(on_any - here.keys()))
    yield Finding("measured", "fine", f"on {kind_of_machine}: {done}" + (f"; never: {never}" if never else ""))
