"""What a sweep's scores are, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MEASURES = {"rouge_l": "ROUGE-L, 0 to 1", "chrf": "chrF, 0 to 1"}


@dataclass(frozen=True)
class Unit:
    """What a sweep's scores are. text: such as "exact matches, share of the validation prompts"; percent: shown so."""

    text: str
    percent: bool

    def shown(self, value: float) -> str:
        """Return a score as text."""
        return f"{value:.0%}".replace("%", "\u00a0%") if self.percent else f"{value:.3f}"

    def difference(self, value: float) -> str:
        """Return a difference of two scores as text, in percentage points where scores are in percent."""
        return f"{100 * value:+.0f}" if self.percent else f"{value:+.3f}"


def unit_of(recipe: dict[str, Any]) -> Unit:
    """Return what the sweep's scores are."""
    objective, kind = recipe["search"].get("objective", "judge"), recipe.get("judge", {}).get("kind")
    if objective == "exact_match" or (objective == "judge" and kind == "reference"):
        return Unit("exact matches, share of the validation prompts", percent=True)
    text = _MEASURES.get(objective, f"the judge's ({recipe.get('judge', {}).get('model', kind)}), 1 to 10")
    return Unit(f"{text}, mean over the validation prompts", percent=False)
