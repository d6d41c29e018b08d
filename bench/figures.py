"""Where figures live: bench/results/figures.json, flat, each pointing at the JSON of its run beside it."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

from bench import compare
from fast_ft.atomic import write_json

RESULTS = Path(__file__).parent / "results"
FIGURES = RESULTS / "figures.json"
Sent = list[tuple[str, dict[str, float]]]  #: card, and its figures
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


def table(figures: dict[str, dict[str, Any]] | None = None, sent: Sent | None = None) -> str:
    """Return the README's table of figures, in Markdown; its last column has what others sent from their cards."""
    lines = ["| figure | value | card | date | received |", "|---|---|---|---|---|"]
    sent = received() if sent is None else sent
    for name, each in (read() if figures is None else figures).items():
        value = each["value"]
        shown = f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"
        theirs = ", ".join(f"{values[_plain(name)]:g} ({card})" for card, values in sent if _plain(name) in values)
        lines.append(f"| `{name}` | {shown} {each['unit']} | {each['card']} | {each['date']} | {theirs} |")
    return "\n".join(lines)


def received(folder: Path = RESULTS / "received") -> Sent:
    """Return (card, {figure without its card: value}) of each file that somebody sent (`--submit-file`)."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        values = {_plain(name): value for name, (value, _) in compare.figures(result).items()}
        found.append((result["settings"]["card"], values))
    return found


def _plain(name: str) -> str:
    """train.h200.vs_notebook -> train.vs_notebook; an emulation's figures stay what they are: no card's."""
    kind, *rest = name.split(".")
    emulated = rest and rest[0].startswith("t4class")
    return f"{kind}.{rest[-1]}" if kind == "train" and not emulated else name


def render_readme(path: Path) -> str:
    """Return the README's text with its table made anew from figures.json."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(_START)
    _, after = rest.split(_END)
    return f"{before}{_START}\n{table()}\n{_END}{after}"
