"""One axis of a sweep's space: a recipe's key with the values that trials give it.

A value is kept in Optuna as a number where the key has a range, and as its JSON text where it has a list of values:
Optuna's categories know no lists or mappings, and take 1, 1.0 and true for the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from fast_ft.common.errors import InputError
from fast_ft.recipe.schema import Range

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Axis:
    """A key with its values: `choices` as JSON texts, or a range of numbers."""

    key: str
    choices: tuple[str, ...] = ()
    range: Range | None = None

    def distribution(self) -> BaseDistribution:
        """Return the axis as Optuna's distribution."""
        from optuna import distributions as optuna

        if self.range is None:
            return optuna.CategoricalDistribution(self.choices)
        low, high, log, step = self.range.low, self.range.high, self.range.log, self.range.step
        if self.whole:
            return optuna.IntDistribution(int(low), int(high), log=log, step=int(step or 1))
        return optuna.FloatDistribution(low, high, log=log, step=step)

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return self.range is not None and _whole_ends(self.range)

    def values(self) -> list[Any]:
        """Return the values of a list, or the two ends of a range."""
        if self.range is None:
            return [json.loads(each) for each in self.choices]
        return [self.range.low, self.range.high]

    @property
    def count(self) -> int:
        """How many values a grid tries along the axis. Raises InputError for a range without a step."""
        if self.range is None:
            return len(self.choices)
        if self.range.step is None and not self.whole:
            raise InputError(
                f"search.space.{self.key}: a grid needs values, and this range has no step: give it one, or a list"
            )
        low, high, step = (Decimal(str(value)) for value in (self.range.low, self.range.high, self.range.step or 1))
        return int((high - low) / step) + 1

    def grid(self) -> list[Any]:
        """Return every value of the axis."""
        return list(self.choices) if self.range is None else [_step(self.range, n) for n in range(self.count)]


def text(value: object) -> str:
    """Return a value as JSON text. Equal values, such as 32 and 32.0, have equal texts."""
    return json.dumps(_whole(value), ensure_ascii=False, sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _step(values: Range, number: int) -> int | float:
    """Return low + number * step as it is written: 0.3, not 0.30000000000000004."""
    exact = Decimal(str(values.low)) + number * Decimal(str(values.step or 1))
    return int(exact) if _whole_ends(values) else float(exact)


def _whole_ends(values: Range) -> bool:
    return isinstance(values.low, int) and isinstance(values.high, int)


def on_step(values: Range, value: float) -> float:
    """Return a value that the sampler drew by adding up steps as it is written; any other one as it is."""
    if values.step is None:
        return value
    written = _step(values, round((value - values.low) / values.step))
    return written if math.isclose(value, written, rel_tol=1e-9, abs_tol=1e-9 * values.step) else value


def check_range(key: str, values: Range) -> None:
    """Raise InputError for a range that holds nothing, or whose numbers do not go together."""
    if not values.low < values.high:
        raise InputError(f"search.space.{key}: low {values.low:g} is not below high {values.high:g}")
    if _whole_ends(values) and not float(values.step or 1).is_integer():
        raise InputError(f"search.space.{key}: step {values.step:g} between whole numbers: write low {values.low}.0")
    if values.log and (values.low <= 0 or values.step is not None):
        raise InputError(f"search.space.{key}: log needs a low above 0 and no step")
