"""Conditions on metrics, as `select.where` and a stage's `where` write them: parsing, and the test of one value."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from fast_ft.common.errors import InputError, nearest
from fast_ft.recipe.schema import METRICS, Condition

_FORMS = '">= 4.5", "<= 10", "> 3", "< 3", "== 2", "150..450" (both ends included), a number, true or false'
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"  # not "1." or ".5", which "1...5" would make ambiguous
_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


@dataclass(frozen=True, slots=True)
class ParsedCondition:
    """A condition as (operator, limit) comparisons; a value must pass all of them. text: for messages."""

    text: str
    comparisons: tuple[tuple[str, float | bool], ...]

    def __call__(self, value: float | bool | None) -> bool:
        """Return whether one value passes; None never does."""
        return value is not None and all(_OPERATORS[name](value, limit) for name, limit in self.comparisons)


def check_metric(name: str, where: str) -> None:
    """Raise InputError unless `name` is a metric; `where` is the recipe's key that names it."""
    if name not in METRICS:
        raise InputError(f"{where}: unknown metric {name!r}{nearest(name, METRICS)}. Metrics: {', '.join(METRICS)}.")


def parse_condition(condition: Condition, metric: str | None = None) -> ParsedCondition:
    """Return a recipe's condition, parsed; with `metric`, also check that it fits that metric. Raises InputError."""
    where = f"condition on {metric}" if metric else "condition"
    if metric:
        check_metric(metric, where)
    parsed = _parse(condition, where)
    truth = isinstance(parsed.comparisons[0][1], bool)
    if metric and truth != (metric == "ends_cleanly"):
        fits = "true or false" if metric == "ends_cleanly" else 'a number, as in ">= 4.5" or "150..450"'
        raise InputError(f"{where}: {condition!r} does not fit. Write {fits}.")
    return parsed


def _parse(condition: Condition, where: str) -> ParsedCondition:
    text = str(condition).strip()
    if isinstance(condition, bool) or text in ("true", "false"):
        truth = text in ("True", "true")
        return ParsedCondition(f"is {str(truth).lower()}", (("==", truth),))
    if match := re.fullmatch(rf"({_NUMBER})\s*\.\.\s*({_NUMBER})", text):
        low, high = float(match[1]), float(match[2])
        if low > high:
            raise InputError(f"{where}: {text!r} is empty: {low:g} is above {high:g}. Write the lower end first.")
        return ParsedCondition(text, ((">=", low), ("<=", high)))
    if match := re.fullmatch(rf"(>=|<=|==|>|<)?\s*({_NUMBER})", text):
        return ParsedCondition(text if match[1] else f"== {text}", ((match[1] or "==", float(match[2])),))
    raise InputError(f"{where}: {condition!r} is not understood. Allowed: {_FORMS}.")
