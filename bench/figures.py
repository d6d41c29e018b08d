"""Where figures live: bench/results/figures.json, flat, each pointing at the JSON of its run beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import compare, evidence, machine
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError

RESULTS = Path(__file__).parent / "results"
FIGURES = RESULTS / "figures.json"
Sent = list[tuple[str, dict[str, float]]]  #: card, and its figures


def read() -> dict[str, dict[str, Any]]:
    """Return {name: entry}; `entries` says what an entry holds."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}


def entries(values: dict[str, tuple[float, str]], result: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Return {name: {"value", "unit", "card", "command", "source", "date", "commit"}} for {name: (value, unit)}.

    All but the values are what the raw result says of itself. `source` is its file in bench/results/. Where the result
    does not say its commit, that is null; where its date is another than that of measuring, "date_is" says which;
    "lacks" says what the measurement lacks (bench/evidence.py). InputError for a result without a date.
    """
    if "date" not in result:
        raise InputError(
            f'{source} does not say when it was measured. Add "date", and "date_is" for what date that is.'
        )
    about = {
        "card": machine.card_of(result),
        "command": result["command"],
        "source": source,
        "date": result["date"][:10],
        "commit": result.get("commit"),
        **({"date_is": result["date_is"]} if "date_is" in result else {}),
        **({"lacks": found} if (found := evidence.lacks(result)) else {}),
    }
    return {name: {"value": value, "unit": unit, **about} for name, (value, unit) in values.items()}


def record(values: dict[str, tuple[float, str]], result: dict[str, Any], source: str) -> None:
    """Put figures of a result into figures.json; see `entries`."""
    write_json(FIGURES, dict(sorted((read() | entries(values, result, source)).items())))


def table(figures: dict[str, dict[str, Any]] | None = None, sent: Sent | None = None) -> str:
    """Return the table of docs/measurements.md, in Markdown; its last column has what others sent from their cards."""
    lines = ["| figure | value | card | date | commit | lacks | received |", "|---|---|---|---|---|---|---|"]
    sent = received() if sent is None else sent
    for name, each in (read() if figures is None else figures).items():
        value = each["value"]
        shown = f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"
        theirs = ", ".join(f"{values[_plain(name)]:g} ({card})" for card, values in sent if _plain(name) in values)
        date = each["date"] + (f" ({each['date_is']})" if "date_is" in each else "")
        commit = _short(each["commit"])
        lacking = ", ".join(each.get("lacks", ()))
        lines.append(
            f"| `{name}` | {shown} {each['unit']} | {each['card']} | {date} | {commit} | {lacking} | {theirs} |"
        )
    return "\n".join(lines)


def _short(commits: str | None) -> str:
    """Return the commits of a result, as short as Git shows them; its parts may have been measured at several."""
    names = [re.sub(r"^([0-9a-f]{7})[0-9a-f]*", r"\1", each) for each in str(commits).split("; ")]
    return ", ".join("not recorded" if each == "None" else each for each in names)


def measured() -> dict[str, dict[str, str]]:
    """Return for the doctor {card's short name: {kind of figure: newest date}}.

    Emulations are left out, and t4.*, which are of what others published.
    """
    found: dict[str, dict[str, str]] = {}
    for name, entry in sorted(read().items()):
        if ".t4class" not in name and not name.startswith("t4."):
            card = "cpu" if entry["card"].startswith("CPU") else machine.card_slug(entry["card"])
            kinds, kind = found.setdefault(card, {}), name.partition(".")[0]
            kinds[kind] = max(kinds.get(kind, ""), entry["date"])
    return dict(sorted(found.items()))


def received(folder: Path = RESULTS / "received") -> Sent:
    """Return (card, {figure's name without its card: value}) of each file that somebody sent (`--submit-file`)."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("kind") == "card":  # ten minutes of an owner: bench/card_table.py
            continue
        values = {_plain(name): value for name, (value, _) in compare.figures(result).items()}
        found.append((result["settings"]["card"], values))
    return found


def _plain(name: str) -> str:
    """Return train.vs_notebook of train.h200.vs_notebook; an emulation's names name no card, and stay."""
    kind, *rest = name.split(".")
    emulated = rest and rest[0].startswith("t4class")
    return f"{kind}.{rest[-1]}" if kind == "train" and not emulated else name


def between(text: str, name: str, content: str) -> str:
    """Return a Markdown text with new content between <!-- NAME --> and <!-- /NAME -->."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{content}\n{end}{after}"
