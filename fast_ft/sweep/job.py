"""A trial on its way: what the sweep's driver knows of it from its asking to its telling."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_ft.data.prepare import Prepared
from fast_ft.recipe.schema import Recipe
from fast_ft.sweep.search_space import Point


@dataclass
class TrialJob:
    """A trial from its asking to its telling."""

    trial: Any
    point: Point
    recipe: Recipe
    prepared: Prepared
    training: str  #: digest of what makes the adapter
    stops: list[int]  #: steps at which it is looked at
    priced: float | None = None
    trained: Path | None = None
    stage: int = 0
    tries: int = 1
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return Path(self.recipe.output_dir)


def shown(point: Point) -> str:
    """Return a point in words: lora.r 16, train.learning_rate 0.0008."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items()
    )
