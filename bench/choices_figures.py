"""What choices are worth, from the samples of python -m bench.real --train: figures, intervals over seeds, the table.

An interval is Student's t over seeds, 95 %. A contrast is paired: the two runs of a seed share the adapter's first
weights and, where they train on the same rows, nothing else need differ but what is compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

#: Student's t, 97.5 %, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
#: Contrasts that docs/real.md names, by figure: (choice, what it is compared with, what that asks).
CONTRASTS = {
    "tuned_minus_base": ("strong", "base", "tuning on strong.yaml's rows"),
    "selected_minus_random": ("strong", "random", "strong.yaml's rows in place of random ones"),
    "curriculum_minus_flat": ("two-stages", "strong", "two stages in place of one, as many steps"),
    "new_minus_2025": ("strong", "strong-2025", "strong.yaml's rows in place of strong-2025.yaml's"),
}
#: Column of the table -> measure of a sample.
MEASURES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "nats": lambda each: nats(each),
    "nats, long rows": lambda each: nats(each, "long"),
    "ended": lambda each: statistics.fmean(float(answer["ended"]) for answer in each["answers"]),
    "words": lambda each: statistics.fmean(answer["words"] for answer in each["answers"]),
    "length missed": lambda each: _mean(answer["missed"] for answer in each["answers"]),
    "distinct": lambda each: _mean(answer["distinct"] for answer in each["answers"]),
}


def nats(sample: dict[str, Any], group: str | None = None) -> float:
    """Return the nats per response token of held-out rows: of one group, or of all."""
    parts = [sample["nats"][group]] if group else list(sample["nats"].values())
    return float(sum(total for total, _ in parts) / sum(count for _, count in parts))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high); low and high are NaN with one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = _T[min(len(values) - 1, max(_T))] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def of(runs: Sequence[dict[str, Any]], choice: str, measure: str) -> dict[int, float]:
    """Return {seed: value} of a choice's runs."""
    found = {each["seed"]: MEASURES[measure](each) for each in runs if each["choice"] == choice}
    return {seed: value for seed, value in found.items() if value is not None}


def contrast(runs: Sequence[dict[str, Any]], one: str, other: str, measure: str) -> list[float]:
    """Return one choice's value less another's, for each seed that both have."""
    ours, theirs = of(runs, one, measure), of(runs, other, measure)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def headline(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}; the unit holds the interval."""
    runs = result["runs"]
    parts: dict[str, tuple[list[float], str]] = {
        "base": (
            list(of(runs, "base", "nats").values()),
            "nats per response token of held-out rows, SmolLM2 untrained",
        ),
        "tuned": (list(of(runs, "strong", "nats").values()), "the same after 5 epochs on strong.yaml's rows"),
    }
    for name, (one, other, what) in CONTRASTS.items():
        parts[name] = (contrast(runs, one, other, "nats"), f"nats: {what}; below 0 is a lower loss")
    return {
        f"real.{name}_nats": (round(interval(values)[0], 5), f"{unit}; {_range(values)}")
        for name, (values, unit) in parts.items()
        if len(values) > 1
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of docs/real.md: the contrasts in each measure, then the mean of each choice."""
    runs = result["runs"]
    lines = ["| contrast | seeds | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for one, other, what in CONTRASTS.values():
        cells = [contrast(runs, one, other, measure) for measure in MEASURES]
        if all(cells):
            lines.append(f"| {what} | {len(cells[0])} | " + " | ".join(map(_change, cells)) + " |")
    lines += ["", "| choice | seeds | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for choice in dict.fromkeys(each["choice"] for each in runs):
        cells = [list(of(runs, choice, measure).values()) for measure in MEASURES]
        shown = [f"{statistics.fmean(cell):.3f}" if cell else "-" for cell in cells]
        lines.append(f"| {choice} | {len(cells[0])} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _change(values: list[float]) -> str:
    """Return a difference and its interval; bold where the interval is off zero."""
    mean, low, high = interval(values)
    text = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def _range(values: list[float]) -> str:
    _, low, high = interval(values)
    return f"95 % over {len(values)} seeds: {low:.5f} to {high:.5f}"


def _mean(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None
