"""Figures in prose: each is written before a comment that names its source, and is checked and rendered from there.

    It answers at 4,563<!-- decode.h200.tokens_per_s --> tokens/s, in 84 %<!-- pocket.tuned_exact_match --> of cases.

GitHub shows the number alone. The number keeps as many decimals as it is written with; before "%" or "points" the
source's value is multiplied by 100. A source is a figure's name in figures.json, or a path into a raw result in
bench/results/, which may map over a list and reduce it:

    h200-plans.json/cases/r = 64/measured_gib
    pocket.json/variants/*/exact_match/mean

Two sources and plain numbers are joined by over, minus, plus or times, from left to right. Where a path leads to a line
that a script printed, the number must stand in that line.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench import (
    budget,
    calibration,
    card_table,
    choices_figures,
    compare,
    comparisons,
    figures,
    plan_checks,
    quickstart,
    smollm,
    sweep,
)
from fast_ft.common.errors import InputError

CITED = re.compile(
    r"(?P<number>\d[\d,]*(?:\.\d+)?)(?P<share>\s?%|\spoints)?(?P<comment><!-- (?P<source>[^>]+?) -->)", re.ASCII
)
#: What tells a measured number from a size: a unit, decimals, thousands, or that it is a date.
_UNITS = r"%|points|tokens/s|s|ms|us|min|minutes|seconds|hours|GiB|MiB|KiB|GB|MB|GB/s|TFLOP/s|times|nats?"
MEASURED = re.compile(
    r"(?<![\w.,/-])(?:\d{4}-\d\d-\d\d|\d[\d,]*\.\d+(?![\d.]*\.\d)|\d{1,3}(?:,\d{3})+"
    rf"|\d+(?=(?: (?:to|and|or) \d[\d,.]*)?\s?(?:{_UNITS})(?!\w)))",
    re.ASCII,
)
ANY = re.compile(r"(?<![\w.,-])\d[\d,.]*", re.ASCII)
#: A sentence, or a row's cells, with one of these words says itself that no samples are behind its numbers.
UNMEASURED = re.compile(r"by count|not measured|never measured|no samples kept|assumed|published")
_REDUCE: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean, "median": statistics.median, "min": min, "max": max, "sum": math.fsum, "len": len,
}  # fmt: skip
_JOIN: dict[str, Callable[[float, float], float]] = {
    "over": lambda a, b: a / b, "minus": lambda a, b: a - b, "plus": lambda a, b: a + b, "times": lambda a, b: a * b,
}  # fmt: skip


def render(text: str) -> str:
    """Return the text with each cited number written again from its source; InputError where there is none."""
    return CITED.sub(_rendered, text)


def _rendered(match: re.Match[str]) -> str:
    value = resolve(match["source"])
    written = match["number"]
    if isinstance(value, str):
        if float(written.replace(",", "")) not in _numbers(value):
            raise InputError(f"{written} does not stand in {match['source']}: {value}")
        return match[0]
    decimals = len(written.partition(".")[2])
    shown = f"{value * (100 if match['share'] else 1):,.{decimals}f}"
    if "," not in written and len(written.partition(".")[0]) > 3:
        shown = shown.replace(",", "")
    return f"{shown}{match['share'] or ''}{match['comment']}"


def _numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def resolve(source: str) -> float | str:
    """Return what a source says: a number, or a line that a script printed. Raises InputError."""
    first, *rest = re.split(r" (over|minus|plus|times) ", source)
    value = _term(first)
    for joint, term in zip(rest[::2], rest[1::2], strict=True):
        value = _JOIN[joint](float(value), float(_term(term)))
    return value


def _term(term: str) -> float | str:
    try:
        if re.fullmatch(r"[\d.]+", term):
            return float(term)
        name, *path = term.split("/")
        if not path:
            return float(figures.read()[name]["value"])
        return _leaf(_walk(raw(name), path))
    except (KeyError, IndexError, ValueError, OSError, TypeError) as error:
        raise InputError(f"{term}: no such figure, and nothing in a raw result ({error!r})") from error


def _walk(at: Any, path: Sequence[str]) -> Any:
    for place, step in enumerate(path):
        if step == "*":
            values = list(at.values()) if isinstance(at, dict) else at
            rest = path[place + 1 :]
            inner, reducer = rest[:-1], rest[-1]
            return _REDUCE[reducer]([_walk(each, inner) for each in values])
        if isinstance(at, list) and step in _REDUCE:
            at = _REDUCE[step](at)
        else:
            at = at[int(step)] if isinstance(at, list) else at[step]
    return at


def _leaf(found: Any) -> float | str:
    return found if isinstance(found, str) else float(found)


@cache
def raw(name: str) -> Any:
    """A raw result, with what the bench's own modules compute from its samples beside them."""
    result = json.loads((figures.RESULTS / name).read_text(encoding="utf-8"))
    _COMPUTED.get(result.get("kind", ""), lambda _: None)(result)
    return result


def _add_to_train(result: dict[str, Any]) -> None:
    settings = result["settings"]
    settings["epoch_tokens"] = sum(settings["tokens_per_step"][: settings["steps_per_epoch"]])
    for part in (part for parts in result["setups"].values() for part in parts.values()):
        part["rate"] = compare.tokens_per_s(settings, part)
        part["epochs"] = compare.epoch_seconds(settings, part)
        part["peak_gib"] = part["peak_reserved_gib"] + part["context_after_gib"]
        second = part["steps"][settings["steps_per_epoch"] : 2 * settings["steps_per_epoch"]]
        part["second_epoch_step"] = statistics.median(step["seconds"] for step in second) if second else None


def _add_to_plans(result: dict[str, Any]) -> None:
    missed = plan_checks.missed(result["cases"])
    result["missed"] = {"memory": missed[0], "seconds": missed[1]}


def _add_to_decode(result: dict[str, Any]) -> None:
    fixed = [each for each in result["measurements"] if each["name"] == "fixed"]
    result["fixed_burst_seconds"] = statistics.median(each["burst_seconds"] for each in fixed)
    widest = [each["steps_by_slots"][str(each["slots"])] for each in fixed]
    result["fixed_step_ms"] = statistics.median(1000 * seconds / steps for steps, seconds in widest)


def _add_to_cards(result: dict[str, Any]) -> None:
    result["gaps"] = sweep.gaps(result["runs"]["1"]["trials"])


def _add_to_published(result: dict[str, Any]) -> None:
    result["found"] = calibration.summary(result)


_COMPUTED: dict[str, Callable[[dict[str, Any]], None]] = {
    "train": _add_to_train, "plans": _add_to_plans, "decode": _add_to_decode, "sweep-cards": _add_to_cards,
    "published-t4": _add_to_published,
}  # fmt: skip


def unsourced(text: str, allowed: Sequence[str] = ()) -> list[str]:
    """Return the measured-looking numbers of a Markdown text that name no source, each with what is around it.

    Left out are code but its comments, addresses, `allowed` phrases, sentences that say that they are no measurement,
    sections whose heading says that no samples were kept, and what is rendered whole between a pair of comments. In a
    table with a cited number every number counts as measured, but for the head and the first column.
    """
    found = []
    for block in _blocks(text):
        plain = _without_sources(block, allowed)
        if block.startswith("|"):
            any_number = CITED.search(block) is not None
            for place, row in enumerate(plain.splitlines()):
                label, *cells = re.split(r"(?<!\\)\|", row)[1:]
                looks = ANY if any_number and place else MEASURED
                found += _matches(MEASURED, label, row) + _matches(looks, "|".join(cells), row)
        else:
            for sentence in re.split(r"(?<=[.;:?!])\s", plain):
                found += _matches(MEASURED, sentence, sentence)
    return found


def _matches(looks: re.Pattern[str], text: str, around: str) -> list[str]:
    if UNMEASURED.search(text):
        return []
    return [f"{match[0]} in: {' '.join(around.split())[:110]}" for match in looks.finditer(text)]


def _without_sources(block: str, allowed: Sequence[str]) -> str:
    block = re.sub(r" *\n(?!\|) *", " ", CITED.sub(" ", block))  # one line, or one for each row of a table
    for phrase in allowed:
        block = block.replace(phrase, re.sub(r"\d", "", phrase))
    return re.sub(r"`[^`]*`|<!--.*?-->|\]\([^)]*\)|https?://\S+|\S+\.(?:py|json|md|yaml)\b", " ", block)


def _blocks(text: str) -> list[str]:
    """Paragraphs, list items, tables and comments of code, without rendered parts and sections without samples."""
    text = re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    blocks: list[str] = []
    kept = True
    for block in re.split(r"\n\s*\n|\n(?=\* )", text):
        if block.startswith("#"):
            kept = "(no samples kept)" not in block
        if block.startswith(("    ", "```")):
            block = "\n".join(re.findall(r"\s# (.*)", block))
        if kept:
            blocks.append(block.strip())
    return blocks


def rendered(path: Path) -> str:
    """Return a document's text with every cited number, and the parts that are rendered whole, made again."""
    text = render(path.read_text(encoding="utf-8"))
    if "<!-- figures -->" in text:
        text = figures.between(text, "figures", figures.table())
    for name, table in {"minutes": _minutes, "published": _published, **comparisons.TABLES}.items():
        if f"<!-- {name} -->" in text:
            text = figures.between(text, name, table())
    if "<!-- received -->" in text:
        text = figures.between(text, "received", card_table.markdown(card_table.received()))
    if "<!-- quickstart -->" in text:
        text = figures.between(text, "quickstart", quickstart.markdown(raw("quickstart.json")))
    if "<!-- smollm -->" in text:
        text = figures.between(text, "smollm", smollm.markdown(raw("smollm.json")))
    if "<!-- choices -->" in text and (found := sorted(figures.RESULTS.glob("choices-*.json"))):
        text = figures.between(text, "choices", choices_figures.markdown(raw(found[-1].name)))
    return text


def _minutes() -> str:
    return budget.markdown(raw("t4-minutes.json"))


def _published() -> str:
    return calibration.markdown(calibration.summary())


def documents() -> list[Path]:
    """The documents whose numbers are held to their sources."""
    root = figures.RESULTS.parents[1]
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]
