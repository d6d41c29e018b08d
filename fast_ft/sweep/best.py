"""What a sweep found: the sentence about its best trial, and that trial's recipe as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fast_ft.recipe.loader import resolved
from fast_ft.recipe.schema import Recipe


def verdict(best: dict[str, Any], own: dict[str, Any] | None, against: dict[str, Any] | None, tried: int) -> str:
    """Return what the sweep found, in a sentence.

    best, own: records of the best trial and of the recipe itself. against: their difference, as statistics.compare
    gives it; None where the recipe itself is best. tried: how many trials have a score.
    """
    name = f"trial {best['number']} ({best['value']:.3f} on the validation prompts)"
    if own is None:
        return f"Best of {tried}: {name}; the recipe itself was not scored, so there is nothing to compare it with."
    if against is None:
        return f"Best of {tried}: the recipe itself ({best['value']:.3f} on the validation prompts)."
    said = f"Best of {tried}: {name}, the recipe itself {own['value']:.3f}"
    if against["low"] is None:
        return f"{said}; too few prompts have a score in both to tell a difference from noise."
    between = f"paired 95 % interval of the difference {against['low']:+.3f} to {against['high']:+.3f}"
    if against["low"] <= 0 <= against["high"]:
        return f"{said} ({between}): no difference shown."
    return (
        f"{said} ({between}). The best of {tried} was chosen on these same prompts, which flatters it a little: "
        "fresh prompts tell more."
    )


def best_text(recipe: Recipe, root: Path, sentence: str) -> str:
    """Return the best recipe as YAML, every value filled in."""
    head = (
        f"# The best recipe of the sweep in {root}, every value filled in. It trains the same adapter again:\n"
        f"#   python -m fast_ft {root / 'best.yaml'}\n# {sentence}\n"
        "# data.exclude holds digests of the sweep's validation prompts, which no trial trained on.\n"
    )
    return head + yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True, width=120)
