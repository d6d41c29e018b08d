"""A sweep's three plots, as SVG that is written here: a few lines and dots need no library and no script."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from fast_ft.common.wording import counted
from fast_ft.report.html import paragraph


def parallel(trials: list[dict[str, Any]], keys: Sequence[str], best: int) -> str:
    """Return a plot with one line for each trial over one axis for each key; the last axis is the score."""
    width, height, top, bottom = 180 * (len(keys) + 1), 360, 46, 40
    columns: list[tuple[str, list[Any]]] = [(key, [t["point"].get(key) for t in trials]) for key in keys]
    columns.append(("score", [t["value"] for t in trials]))
    places, parts = [], []
    for index, (name, values) in enumerate(columns):
        x = 90 + 180 * index
        at, ticks = _axis(values)
        places.append([(x, top + (1 - share) * (height - top - bottom)) for share in at])
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}" stroke="var(--edge)"/>')
        parts.append(_text(x, 18, name, anchor="middle", weight=600))
        for share, label in _apart(ticks):
            parts.append(_text(x + 6, top + (1 - share) * (height - top - bottom) + 4, _cut(label), size=11, halo=True))
    lines = []
    for number, trial in enumerate(trials):
        points = " ".join(f"{column[number][0]:.0f},{column[number][1]:.1f}" for column in places)
        lines.append(f'<polyline points="{points}" {_line(trial, best, trials)}>{_hover(trial)}</polyline>')
    hint = (
        "One line for each trial: the stronger its colour, the higher its score. Thick and orange: the best. Dashed: "
        "the recipe itself. Hover over a line to see its trial."
    )
    return paragraph(hint, "hint") + _svg(width, height, "Each trial's values and score", [*lines, *parts])


def over_time(trials: list[dict[str, Any]], best: int) -> str:
    """Return a plot of each trial's score over the minute at which it ended, with the best score so far."""
    width, height, left, right, top, bottom = 860, 320, 60, 20, 20, 48
    minutes = [t["minutes"] for t in trials]
    most, (low, high) = max(minutes, default=1.0), _span([t["value"] for t in trials])

    def x(value: float) -> float:
        """Return a minute's place, in pixels from the left."""
        return left + value / most * (width - left - right)

    def y(value: float) -> float:
        """Return a score's place, in pixels from the top."""
        return height - bottom - (value - low) / (high - low) * (height - top - bottom)

    foot, end = height - bottom, width - right
    parts = [
        f'<line x1="{left}" x2="{left}" y1="{top}" y2="{foot}" stroke="var(--edge)"/>',
        f'<line x1="{left}" x2="{end}" y1="{foot}" y2="{foot}" stroke="var(--edge)"/>',
        _text((left + end) / 2, height - 10, "minutes since the sweep began", anchor="middle"),
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        parts.append(_text(left - 8, y(value) + 4, f"{value:.2f}", anchor="end", size=11))
        parts.append(_text(x(share * most), height - bottom + 16, f"{share * most:.1f}", anchor="middle", size=11))
    path, record = [], None
    for trial in sorted(trials, key=lambda t: t["minutes"]):
        if record is None or trial["value"] > record:
            if record is not None:
                path.append(f"{x(trial['minutes']):.1f},{y(record):.1f}")
            record = trial["value"]
            path.append(f"{x(trial['minutes']):.1f},{y(record):.1f}")
    if record is not None:
        path.append(f"{x(most):.1f},{y(record):.1f}")
    parts.append(
        f'<polyline points="{" ".join(path)}" fill="none" stroke="var(--g1)" stroke-width="2" stroke-opacity=".6"/>'
    )
    for trial in trials:
        colour = "var(--g1)" if trial["number"] == best else "var(--ink)" if trial["number"] == 0 else "var(--g0)"
        parts.append(f'<circle cx="{x(trial["minutes"]):.1f}" cy="{y(trial["value"]):.1f}" r="6" fill="{colour}">'
                     f"{_hover(trial)}</circle>")  # fmt: skip
        at = x(trial["minutes"]) - 9, y(trial["value"]) - 8
        parts.append(_text(*at, str(trial["number"]), size=11, anchor="end"))
    hint = (
        "One dot for each trial, with its number; the line is the best score so far. Orange: the best trial. Black: "
        "the recipe itself."
    )
    return paragraph(hint, "hint") + _svg(width, height, "Score of each trial against minutes", parts)


def importance(shares: dict[str, float] | None, scored: int) -> str:
    """Return a bar for each key's share of importance (0 to 1); a sentence where it is not known."""
    if shares is None:
        return paragraph("Too few trials to say: four with different scores are needed.")
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    parts = []
    for row, (name, share) in enumerate(ordered):
        y = 10 + 34 * row
        parts.append(_text(250, y + 17, name, anchor="end"))
        parts.append(f'<rect x="260" y="{y}" width="{max(1.0, 500 * share):.1f}" height="24" rx="3" fill="var(--g0)"/>')
        parts.append(_text(268 + 500 * share, y + 17, f"{share:.0%}"))
    hint = f"Share of each key in what sets the better half apart (Optuna's PED-ANOVA), from {counted(scored, 'trial')}"
    hint += ": so few point at best." if scored < 30 else "."
    return paragraph(hint, "hint") + _svg(860, 20 + 34 * len(ordered), "Importance of each key", parts)


def _axis(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return each value's place from 0 to 1, and labelled ticks: numbers by size, other values evenly."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) == len(values) and values:
        low, high = _span(numbers)
        there = sorted({float(n) for n in numbers})
        marks = there if len(there) <= 6 else [low, (low + high) / 2, high]
        return [(v - low) / (high - low) for v in values], [((m - low) / (high - low), f"{m:.4g}") for m in marks]
    names = sorted({str(value) for value in values}, key=_order)
    share = {name: index / max(1, len(names) - 1) if len(names) > 1 else 0.5 for index, name in enumerate(names)}
    return [share[str(value)] for value in values], [(share[name], shown(name)) for name in names]


def _apart(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return the ticks, highest first, less those whose label would lie over another's."""
    kept: list[tuple[float, str]] = []
    for share, label in sorted(ticks, reverse=True):
        if not kept or kept[-1][0] - share > 0.05:
            kept.append((share, label))
    return kept


def _order(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _line(trial: dict[str, Any], best: int, trials: list[dict[str, Any]]) -> str:
    low, high = _span([t["value"] for t in trials])
    strength = 0.25 + 0.65 * (trial["value"] - low) / (high - low)
    if trial["number"] == best:
        return 'fill="none" stroke="var(--g1)" stroke-width="4"'
    if trial["number"] == 0:
        return 'fill="none" stroke="var(--ink)" stroke-width="2" stroke-dasharray="7 4"'
    return f'fill="none" stroke="var(--g0)" stroke-width="2.5" stroke-opacity="{strength:.2f}"'


def _hover(trial: dict[str, Any]) -> str:
    values = ", ".join(f"{key} {shown(value)}" for key, value in trial["point"].items())
    text = f"trial {trial['number']}: {trial['value']:.3f}; {values}"
    return f"<title>{html.escape(text)}</title>"


def shown(value: object) -> str:
    """Return a value of a point as text: a number in four digits, a list's value out of its JSON text."""
    if isinstance(value, str):  # JSON text, of a list's value
        try:
            value = json.loads(value)
        except ValueError:
            return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(json.dumps(item))}" for key, item in value.items()) or "{}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= 22 else text[:20] + "…"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: int = 400, halo: bool = False
) -> str:
    around = ' paint-order="stroke" stroke="var(--card)" stroke-width="4"' if halo else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="var(--ink)"{around}>{html.escape(text)}</text>'
    )


def _svg(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(label)}" font-family="inherit">{"".join(parts)}</svg></div>'
    )
