"""Where figures live: bench/results/figures.json, flat, each pointing at the JSON of its run beside it."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

from fast_ft.atomic import write_json

RESULTS = Path(__file__).parent / "results"
FIGURES = RESULTS / "figures.json"
_START, _END = "<!-- figures -->", "<!-- /figures -->"


def read() -> dict[str, dict[str, Any]]:
    """Return {name: {"value", "unit", "card", "command", "source", "date"}}."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}


def record(values: dict[str, tuple[float, str]], *, card: str, command: str, source: str) -> None:
    """Put {name: (value, unit)} into figures.json; `source` is the file in bench/results/ that they come from."""
    today = dt.datetime.now(dt.UTC).date().isoformat()
    figures = read()
    for name, (value, unit) in values.items():
        figures[name] = {
            "value": value, "unit": unit, "card": card, "command": command, "source": source, "date": today,
        }  # fmt: skip
    write_json(FIGURES, dict(sorted(figures.items())))


def table(figures: dict[str, dict[str, Any]] | None = None) -> str:
    """Return the README's table of figures, in Markdown."""
    lines = ["| figure | value | card | date |", "|---|---|---|---|"]
    for name, each in (read() if figures is None else figures).items():
        value = each["value"]
        shown = f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"
        lines.append(f"| `{name}` | {shown} {each['unit']} | {each['card']} | {each['date']} |")
    return "\n".join(lines)


def render_readme(path: Path) -> str:
    """Return the README's text with its table made anew from figures.json."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(_START)
    _, after = rest.split(_END)
    return f"{before}{_START}\n{table()}\n{_END}{after}"
