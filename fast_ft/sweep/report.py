"""The page of a sweep: what was found, every trial, its drawings; one HTML file that asks no network for anything."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.judge import statistics
from fast_ft.report import result
from fast_ft.report.html import bullets, page, paragraph
from fast_ft.run import artifacts
from fast_ft.sweep import plots
from fast_ft.sweep.score_unit import Unit, unit_of

ABOUT = "This page holds settings and scores, and leads to reports that hold training rows and predictions."
WARNING = f"{ABOUT} The homework forbids to share those."
ENOUGH = 20  #: scored trials from which the keys' importance is shown; of fewer it is chance
_STATES = {"finished": "", "stopped early": "stopped early", "no result": "came to nothing", "not begun": "not begun"}


def write(root: Path) -> Path:
    """Write report.html into a sweep's folder from its sweep.json, and return its path."""
    written = json.loads((root / "sweep.json").read_text(encoding="utf-8"))
    sweep = {"own": 0} | written  # an earlier version did not name the recipe itself: it was the first trial
    trials = [t for t in sweep["trials"] if t["state"] in _STATES and not t.get("repeats")]
    scored = [t for t in trials if t["value"] is not None]
    keys = list(sweep["recipe"]["search"]["space"])
    best, own, unit = sweep["best"]["number"], sweep["own"], unit_of(sweep["recipe"])
    drawn = _by_order(scored, best)
    sections = [
        ("found", "What was found", _found(root, sweep, trials, scored, unit)),
        ("trials", "Trials", _table(root, sweep, trials, keys, unit)),
        ("values", "Values and scores", plots.parallel(drawn, keys, best, own, unit)),
        ("time", "Score against minutes", plots.over_time(drawn, best, own, unit)),
    ]
    if sweep.get("importances") and len(scored) >= ENOUGH:
        sections.append(("importance", "What mattered", plots.importance(sweep["importances"], len(scored))))
    target = root / "report.html"
    title = f"Sweep of {Path(sweep['recipe_file']).stem} · fast_ft"
    warning = WARNING if sweep["recipe"].get("rules") else ""
    atomic_files.write_text(target, page(title, ABOUT, sections, {}, {}, warning))
    return target


def _found(
    root: Path, sweep: dict[str, Any], trials: list[dict[str, Any]], scored: list[dict[str, Any]], unit: Unit
) -> str:
    hours, minutes = sweep.get("hours"), sweep["seconds"] / 60
    allowed = f" of {60 * hours:.1f}" if hours else ""
    figures = [
        ("best, validation prompts", unit.shown(sweep["best"]["value"])),
    ]
    own = next((t for t in scored if t["number"] == sweep["own"]), None)
    if own is not None:
        figures.append(("the recipe itself", unit.shown(own["value"])))
    tested = _tested(root)
    if tested is not None:
        figures.insert(1, ("best, test prompts", result.shown(tested, tested.mean)))
    figures += [
        ("trials scored", str(len(scored))),
        ("stopped early", str(sum(t["state"] == "stopped early" for t in trials))),
        ("minutes used", f"{minutes:.1f}{allowed}"),
    ]
    cells = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in figures)
    held, equal = ([t["number"] for t in scored if t["proof"][where]] for where in ("in_validation", "in_test"))
    facts = [
        f"Score: {unit.text}.",
        f"On the test prompts, with the best recipe: {result.interval(tested, tested)}. {result.measure(tested)}"
        if tested is not None
        else "The best recipe's answers to the test set have no score: the recipe has no judge for them.",
        f"{sweep['ended'].capitalize()}.",
        f"Every trial answered the same {len(sweep['validation']['prompts'])} validation prompts, drawn from the "
        "training rows before any selection; sweep.json has the digests.",
        f"Trials that trained on validation prompts, by text: {_listed(held)}. Trials that trained on rows that equal "
        f"test prompts: {_listed(equal)}; the sweep takes no row out because of the test set.",
        "best.yaml is the best recipe, every value filled in; best/ has its adapter and its answers to the test set.",
    ]  # fmt: skip
    if len(scored) < ENOUGH:
        facts.append(
            f"Which keys mattered is not shown: {len(scored)} scored trials are too few to tell ({ENOUGH} are enough)."
        )
    link = ""
    if (sweep["best"].get("run")) and sweep["best"]["run"]:
        link = '<p><a href="best/report.html">Report of the best recipe</a>, <a href="best.yaml">best.yaml</a></p>'
    return f'{paragraph(sweep["best"]["sentence"], "lead")}<dl class="figures">{cells}</dl>{bullets(facts)}{link}'


def _tested(root: Path) -> artifacts.Scores | None:
    """Return the scores of the best recipe's answers to the test set; None where nothing judged them."""
    path = root / "best" / "scores.json"
    try:
        found = artifacts.read_scores(path) if path.is_file() else None
    except InputError:
        return None
    return found if found is not None and found.mean is not None else None


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _table(root: Path, sweep: dict[str, Any], trials: list[dict[str, Any]], keys: Sequence[str], unit: Unit) -> str:
    own = next((t["scores"] for t in trials if t["number"] == sweep["own"] and t["value"] is not None), None)
    seed = sweep["recipe"]["seed"]
    rows = []
    for trial in sorted(trials, key=lambda t: (t["value"] is None, -(t["value"] or 0), t["number"])):
        name = f"{trial['number']}"
        if trial["number"] == sweep["best"]["number"]:
            name += " (best)"
        elif trial["number"] == sweep["own"]:
            name += " (the recipe)"
        folder = trial.get("folder")
        cell = html.escape(name)
        if folder and (Path(folder) / "report.html").is_file():
            cell = f'<a href="{html.escape(os.path.relpath(Path(folder) / "report.html", root))}">{cell}</a>'
        said = _STATES[trial["state"]] or unit.shown(trial["value"])
        if trial["state"] == "stopped early":
            said = f"stopped at {unit.shown(trial['so_far'])}"
        difference = ""
        if own is not None and trial["value"] is not None and trial["number"] != sweep["own"]:
            found = statistics.compare(trial["scores"], own, seed, "the recipe")
            if found["low"] is not None:
                difference, low, high = (unit.difference(found[key]) for key in ("difference", "low", "high"))
                difference = f"{difference} ({low} to {high})".replace(" ", "\u00a0")
        minutes = trial.get("seconds", {}).get("all")
        priced = trial.get("priced")
        remark = trial.get("reason", "") if trial["state"] == "no result" else ""
        remark = "trained before" if trial.get("trained_in") else remark
        cells = [*(plots.shown(trial["point"].get(key)) for key in keys), said, difference,
                 "" if priced is None else f"{priced / 60:.1f}", "" if minutes is None else f"{minutes / 60:.1f}",
                 remark]  # fmt: skip
        rows.append(f'<tr><th scope="row">{cell}</th>' + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    head = [
        "trial",
        *keys,
        "score",
        f"more than the recipe{', points' if unit.percent else ''} (95 % interval)",
        "priced, min",
        "took, min",
        "",
    ]
    top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    inner = f'<table class="stick"><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{inner}</div>'


def _by_order(trials: list[dict[str, Any]], best: int) -> list[dict[str, Any]]:
    """Return the trials, low scores first and the best last: what is drawn last lies on top."""
    return sorted(trials, key=lambda t: (t["number"] == best, t["value"]))
