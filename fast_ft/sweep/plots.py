"""A sweep's plots, as SVG that is written here: a few lines and dots need no library and no script.

Each plot is drawn twice, for a wide window and for a phone; the page's style shows one of them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fast_ft.common.wording import counted
from fast_ft.report.html import paragraph
from fast_ft.sweep.score_unit import Unit

WIDE, NARROW = 1100, 310  #: pixels: of the page's sections, and of a phone
LINE_FREE = 11  #: pixels between a line and a label's middle, at least
LETTER = 6.4  #: pixels of a letter in labels of size 11, at most

_Marked = tuple[int, int | None]  #: numbers of the best trial and of the recipe itself


def parallel(trials: list[dict[str, Any]], keys: Sequence[str], best: int, own: int | None, unit: Unit) -> str:
    """Return a plot with one line for each trial from key to key; the last column is the score.

    The values stand in columns, and the lines run between the columns: no line crosses a label. best, own: numbers of
    the best trial and of the recipe itself.
    """
    hint = (
        "One line for each trial: the stronger its colour, the higher its score. Thick: the best. Dashed: the recipe "
        "itself. Hover over a line to see its trial."
    )
    return paragraph(hint, "hint") + _both(lambda width: _parallel(trials, keys, (best, own), unit, width))


def _parallel(trials: list[dict[str, Any]], keys: Sequence[str], marked: _Marked, unit: Unit, width: int) -> str:
    height, top, bottom = 360, 46, 24
    axes = [(key, *_axis([t["point"].get(key) for t in trials])) for key in keys]
    at, marks = _axis([t["value"] for t in trials])
    axes.append(("score", at, [(share, unit.shown(float(text))) for share, text in marks]))
    room = [max(40.0, *(LETTER * len(_cut(label)) + 12 for _, label in ticks)) for _, _, ticks in axes]
    names = max(7.4 * len(name) + 14 for name, _, _ in axes)
    between = max(60.0, names - min(room), (width - sum(room)) / (len(axes) - 1)) if len(axes) > 1 else 0.0
    columns: list[_Column] = []
    parts, x = [], 0.0
    for place, ((name, shares, ticks), wide) in enumerate(zip(axes, room, strict=True)):
        middle, last = x + wide / 2, place == len(axes) - 1
        anchor, where = ("start", x) if not place else ("end", x + wide) if last else ("middle", middle)
        parts.append(_text(where, 18, name, anchor=anchor, weight=600))
        kept = _apart(ticks)
        for share, label in kept:
            parts.append(_text(middle, _height(share, top, height - bottom) + 4, _cut(label), size=11, anchor="middle"))
        heights = [_height(share, top, height - bottom) for share in shares]
        columns.append(_Column(x, x + wide, heights, [_height(share, top, height - bottom) for share, _ in kept]))
        x += wide + between
    lines = []
    for number, trial in enumerate(trials):
        path = "".join(_through(column, number, last=column is columns[-1]) for column in columns)
        lines.append(f'<path class="trial" d="M{path[1:]}" {_line(trial, marked, trials)}>{_hover(trial, unit)}</path>')
    return _svg(round(x - between), height, "Each trial's values and score", [*lines, *parts])


class _Column(NamedTuple):
    """Where a key's values stand, in pixels: left, right, each trial's height, and the heights of the labels."""

    left: float
    right: float
    heights: list[float]
    labels: list[float]


def _through(column: _Column, trial: int, last: bool) -> str:
    """Return a trial's line from the column before up to this one and, where no label stands, through it."""
    y = column.heights[trial]
    end = column.left if last else column.right
    free = all(abs(y - label) > LINE_FREE for label in column.labels)
    return f"L{column.left:.0f},{y:.1f}{'L' if free else 'M'}{end:.0f},{y:.1f}"


def _height(share: float, top: float, foot: float) -> float:
    return foot - share * (foot - top)


def over_time(trials: list[dict[str, Any]], best: int, own: int | None, unit: Unit) -> str:
    """Return a plot of each trial's score over the minute at which it ended, with the best score so far.

    best, own: numbers of the best trial and of the recipe itself.
    """
    hint = (
        f"Score: {unit.text}. One dot for each trial, with its number; the line is the best score so far. The large "
        "dot is the best trial, the ring the recipe itself."
    )
    return paragraph(hint, "hint") + _both(lambda width: _over_time(trials, (best, own), unit, width))


def _over_time(trials: list[dict[str, Any]], marked: _Marked, unit: Unit, width: int) -> str:
    height, left, right, top, bottom = 320, 54, 16, 20, 48
    most, (low, high) = max((t["minutes"] for t in trials), default=1.0), _span([t["value"] for t in trials])
    foot, end = height - bottom, width - right

    def x(value: float) -> float:
        """Return a minute's place, in pixels from the left."""
        return left + value / most * (end - left)

    def y(value: float) -> float:
        """Return a score's place, in pixels from the top."""
        return _height((value - low) / (high - low), top, foot)

    parts = [_text((left + end) / 2, height - 10, "minutes since the sweep began", anchor="middle")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        line = "edge" if not share else "line"
        parts.append(f'<line x1="{left}" x2="{end}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="var(--{line})"/>')
        parts.append(_text(left - 8, y(value) + 4, unit.shown(value), anchor="end", size=11))
        parts.append(_text(x(share * most), foot + 16, f"{share * most:.1f}", anchor="middle", size=11))
    path, record = [], None
    for trial in sorted(trials, key=lambda t: t["minutes"]):
        if record is None or trial["value"] > record:
            path += [
                f"{x(trial['minutes']):.1f},{y(value):.1f}" for value in (record, trial["value"]) if value is not None
            ]
            record = trial["value"]
    if record is not None:
        path.append(f"{end},{y(record):.1f}")
    parts.append(f'<polyline points="{" ".join(path)}" fill="none" stroke="var(--edge)" stroke-width="2"/>')
    for trial in trials:
        is_best, is_own = (trial["number"] == number for number in marked)
        look = f'r="{9 if is_best else 6}" fill="var(--{"g1" if is_best else "card" if is_own else "g0"})"'
        ring = ' stroke="var(--ink)" stroke-width="2.5"' if is_own else ""
        at = x(trial["minutes"]), y(trial["value"])
        parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" {look}{ring}>{_hover(trial, unit)}</circle>')
        parts.append(_text(at[0], at[1] - 12, str(trial["number"]), size=11, anchor="middle", halo=True))
    return _svg(width, height, "Score of each trial against minutes", parts)


def importance(shares: dict[str, float], scored: int) -> str:
    """Return a bar for each key's share of importance (0 to 1)."""
    hint = (
        f"Share of each key in what sets the better half apart (Optuna's PED-ANOVA), from {counted(scored, 'trial')}."
    )
    return paragraph(hint, "hint") + _both(lambda width: _importance(shares, width))


def _importance(shares: dict[str, float], width: int) -> str:
    parts, most = [], width - 60
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    for row, (name, share) in enumerate(ordered):
        y = 52 * row
        parts.append(_text(0, y + 16, name))
        parts.append(
            f'<rect x="0" y="{y + 22}" width="{max(1.0, most * share):.1f}" height="20" rx="3" fill="var(--g0)"/>'
        )
        parts.append(_text(8 + most * share, y + 37, f"{share:.0%}"))
    return _svg(width, 52 * len(ordered), "Importance of each key", parts)


def _both(draw: Callable[[int], str]) -> str:
    return "".join(
        f'<div class="scroll chart {name}" tabindex="0">{draw(width)}</div>'
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    )


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


def _line(trial: dict[str, Any], marked: _Marked, trials: list[dict[str, Any]]) -> str:
    low, high = _span([t["value"] for t in trials])
    strength = 0.25 + 0.65 * (trial["value"] - low) / (high - low)
    best, own = marked
    if trial["number"] == best:
        return 'fill="none" stroke="var(--g1)" stroke-width="4"'
    if trial["number"] == own:
        return 'fill="none" stroke="var(--ink)" stroke-width="2" stroke-dasharray="7 4"'
    return f'fill="none" stroke="var(--g0)" stroke-width="2.5" stroke-opacity="{strength:.2f}"'


def _hover(trial: dict[str, Any], unit: Unit) -> str:
    values = ", ".join(f"{key} {shown(value)}" for key, value in trial["point"].items())
    text = f"trial {trial['number']}: {unit.shown(trial['value'])}; {values}"
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
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(label)}" font-family="inherit">{"".join(parts)}</svg>'
    )
