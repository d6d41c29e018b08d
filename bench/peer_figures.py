"""What a result of bench.best_peer says: every rate, the best peer and why, and the figures, or why there are none."""

from __future__ import annotations

import statistics
from typing import Any

from bench import compare, emulation, ours
from bench.machine import slug_of
from bench.peer_table import PEERS

RUNS = 2  #: of each way, at least
NOTEBOOK = "unsloth-notebook"
#: One setting of each kind, by what promised most: until these are surveyed, rates say nothing of peers at their best.
KINDS = ("unsloth-budget", "unsloth-budget-kept", "unsloth-packed-4096", "trl-liger")
NAMES = {"fast_ft": "vs_best_peer", "fast_ft-unsloth": "unsloth_layers_vs_best_peer"}
TITLES = {"fast_ft": "fast_ft, own blocks", "fast_ft-unsloth": "fast_ft, Unsloth's layers"}


def rate(settings: dict[str, Any], part: dict[str, Any]) -> float | None:
    """Return the tokens/s of a part's last steps, or None where it has none. A survey's part has its own settings."""
    if part.get("out_of_memory") or part.get("failed") or len(part.get("steps", ())) < compare.FEWEST:
        return None
    count = min(compare.MEASURED, len(part["steps"]) // 2)
    return round(compare.last_rate(settings | part.get("settings", {}), part, count), 1)


def rivals(settings: dict[str, Any], survey: dict[str, Any]) -> dict[str, float]:
    """Return {way: tokens/s} of the surveyed peers that did the same work as fast_ft, the fastest first.

    A way that packs has other batches: it trains on as much, and is a rival by its own count of tokens.
    """
    found = {}
    for way in PEERS:
        part = survey.get(way, {})
        speed = rate(settings, part)
        if speed is not None and (part.get("packed") or not part.get("refused")):
            found[way] = speed
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def best_two(settings: dict[str, Any], survey: dict[str, Any]) -> list[str]:
    """Return the two fastest peers of a survey."""
    return list(rivals(settings, survey))[:2]


def contenders(settings: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    """Return the peers whose final runs count: the survey's two fastest, and whoever had a faster run than these."""
    best = best_two(settings, parts["survey"])
    fastest = max((_rates(settings, parts, way)[-1:] for way in best), default=[])
    return [*best, *(way for way in PEERS if best and way not in best and _rates(settings, parts, way)[-1:] > fastest)]


def runs_of(parts: dict[str, Any], way: str) -> list[dict[str, Any]]:
    """Return the final runs of a way."""
    return [part for part in parts["finals"] if part["way"] == way]


def problems(result: dict[str, Any], name: str, mine: str = "fast_ft") -> list[str]:
    """Say why a set-up's comparison of one of our ways with the best peer makes no figure."""
    settings, parts = result["settings"], result["setups"][name]
    best = contenders(settings, parts)
    if not best:
        return ["no best peer: no peer was surveyed"]
    left_out = {way for way, peer in PEERS.items() if name != "whole" and peer.not_emulated}
    found = [f"{way} was not surveyed" for way in PEERS if way not in parts["survey"] and way not in left_out]
    for way in (mine, *best):
        runs = [part for part in runs_of(parts, way) if rate(settings, part) is not None]
        if len(runs) < RUNS:
            found.append(f"{way}: {len(runs)} runs, {RUNS} are needed")
        found += [  # a way that waits for the host may not stand to the schedule's end, which is long enough
            f"{way}: the rate of its last steps does not stand"
            for part in runs
            if len(part["steps"]) < settings["schedule_steps"] and not compare.stands(settings, part)
        ]
    first = runs_of(parts, mine)[:1]
    for part in [part for part in parts["finals"] if part["way"] in (mine, *best)]:
        if part.get("failed"):
            found.append(f"{part['way']}: {part['failed']}")
            continue
        if not part.get("commit") or "+" in part["commit"]:
            found.append(f"{part['way']}: measured from no commit")
        if first and not first[0].get("failed") and not part.get("packed"):
            against = part["refused"] if "refused" in part else compare.disagreements(first[0], part)
            found += [f"{part['way']}: {each}" for each in against]
    return list(dict.fromkeys(found))


def final_rate(settings: dict[str, Any], parts: dict[str, Any], way: str) -> float | None:
    """Return the mean of a way's final runs, tokens/s."""
    rates = _rates(settings, parts, way)
    return round(statistics.fmean(rates), 1) if rates else None


def _rates(settings: dict[str, Any], parts: dict[str, Any], way: str) -> list[float]:
    """Return the tokens/s of a way's final runs, the slowest first."""
    return sorted(speed for part in runs_of(parts, way) if (speed := rate(settings, part)) is not None)


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}; a comparison with a problem makes none."""
    settings, card = result["settings"], slug_of(result)
    found: dict[str, tuple[float, str]] = {}
    for name, parts in result["setups"].items():
        speeds = {way: final_rate(settings, parts, way) or 0.0 for way in contenders(settings, parts)}
        best = max(speeds, key=lambda way: speeds[way], default="")
        prefix = f"train.{card}" if name == "whole" else f"train.{name}"
        emulated = "" if name == "whole" else f"; {emulation.LABEL}"
        for way, figure in NAMES.items():
            speed = final_rate(settings, parts, way)
            if problems(result, name, way) or speed is None:
                continue
            runs, theirs = (len(_rates(settings, parts, each)) for each in (way, best))
            over = f"{best} ({PEERS[best].about})"
            unit = f"times the tokens/s of {over}, means of {runs} and {theirs} runs{emulated}"
            found[f"{prefix}.{figure}"] = (round(speed / speeds[best], 3), unit)
            first = next(part for part in runs_of(parts, way) if rate(settings, part) is not None)
            if way == "fast_ft" and (top := compare.ceiling(settings, first)) is not None:
                share = round(speed / top["tokens_per_s"], 3)
                found[f"{prefix}.ceiling_share"] = (share, f"of the ceiling without recomputation{emulated}")
            if name == "whole":
                key = "tokens_per_s" if way == "fast_ft" else "unsloth_layers_tokens_per_s"
                found[f"{prefix}.{key}"] = (speed, f"tokens/s of training, {TITLES[way]}, mean of {runs} runs")
    return found


def survey_line(settings: dict[str, Any], part: dict[str, Any]) -> str:
    """Return a part in one line."""
    speed, steps = rate(settings, part), len(part.get("steps", ()))
    if speed is None:
        why = "out of memory" if part.get("out_of_memory") else part.get("failed") or f"{steps} steps only"
        return f"{part['way']}: {why}"
    peak = part["peak_reserved_gib"] + part["context_after_gib"]
    refused = f"; not the same work: {'; '.join(part['refused'])}" if part.get("refused") else ""
    wall = f", {part['stamps']['saved']:.0f} s" if "saved" in part["stamps"] else ""
    return f"{part['way']}: {speed:,.0f} tokens/s in the last of {steps} steps, {peak:.1f} GiB{wall}{refused}"


def markdown(result: dict[str, Any]) -> str:
    """Return each set-up's rates, the settings of every way, and what stands against a figure."""
    settings, lines = result["settings"], []
    for name, parts in result["setups"].items():
        title = "The whole card" if name == "whole" else emulation.LABEL
        lines += [
            f"## {title}, {settings['card']}",
            "",
            "| way | tokens/s, survey | tokens/s, final runs | GiB | settings |",
            "|---|---|---|---|---|",
        ]
        ways = sorted(
            {*parts["survey"], *(part["way"] for part in parts["finals"])}, key=lambda way: _place(settings, parts, way)
        )
        lines += [_row(settings, parts, way) for way in ways]
        against = dict.fromkeys(each for way in ours.WAYS for each in problems(result, name, way))
        lines += ["", *(f"No figure: {each}." for each in against), ""]
    return "\n".join(lines).rstrip() + "\n"


def _place(settings: dict[str, Any], parts: dict[str, Any], way: str) -> tuple[bool, float, str]:
    speed = final_rate(settings, parts, way) or rate(settings, parts["survey"].get(way, {})) or 0.0
    return way not in ours.WAYS, -speed, way


def _row(settings: dict[str, Any], parts: dict[str, Any], way: str) -> str:
    part = parts["survey"].get(way, {})
    speed = rate(settings, part)
    finals = runs_of(parts, way)
    shown = (
        f"{speed:,.0f}"
        if speed is not None
        else "out of memory"
        if part.get("out_of_memory")
        else "failed"
        if part
        else ""
    )
    if part.get("refused"):
        shown += f" (not the same work: {'; '.join(part['refused'])})"
    rates = " and ".join(f"{each:,.0f}" for one in finals if (each := rate(settings, one)) is not None)
    held = [each for each in (part, *finals) if rate(settings, each) is not None]
    peak = max((each["peak_reserved_gib"] + each["context_after_gib"] for each in held), default=0.0)
    about = PEERS[way].about if way in PEERS else TITLES[way]
    return f"| {way} | {shown} | {rates} | {f'{peak:.1f}' if peak else ''} | {about} |"


def readme(result: dict[str, Any] | None) -> str:
    """Return the README's table of training: fast_ft both ways, the best peers, and the notebook's settings."""
    setups = result["setups"] if result is not None else {}
    if result is None or not set(KINDS) <= set(setups.get("whole", {"survey": ()})["survey"]):
        return "No comparison with other libraries at their best is kept yet."
    settings = result["settings"]
    names = {"whole": "whole card", "t4class": emulation.LABEL}
    columns = [name for name in names if name in setups]
    heads = " | ".join(f"tokens/s, {names[name]} | own blocks are" for name in columns)
    lines = [f"| training | {heads} |", "|---" * (1 + 2 * len(columns)) + "|"]
    best = [min(peers, key=lambda way: _place(settings, setups[name], way))
            for name in columns if (peers := contenders(settings, setups[name]))]  # fmt: skip
    for way in dict.fromkeys((*ours.WAYS, *best, NOTEBOOK)):
        cells = [cell for name in columns for cell in _cells(settings, setups[name], way)]
        if any(cells):
            lines.append(f"| {TITLES[way] if way in TITLES else PEERS[way].about} | {' | '.join(cells)} |")
    against = {name: problems(result, name) for name in columns}
    untried = max(sum(each.endswith("was not surveyed") for each in found) for found in against.values())
    about = f"{settings['card']}, {result['date'][:10]}, the median of a run's last steps. "
    if any(against.values()):
        about += (
            f"These are no figures yet: {untried} of {len(PEERS)} settings were not tried, or runs were not repeated. "
            "[Which](docs/measurements.md#peers-at-their-best)."
        )
    else:
        about += f"The mean of {RUNS} runs or more. [All settings](docs/measurements.md#peers-at-their-best)."
    return "\n".join([*lines, "", about])


def _cells(settings: dict[str, Any], parts: dict[str, Any], way: str) -> list[str]:
    """Return a way's tokens/s, and how many times that our own blocks reach: of final runs, or of the survey's."""
    speed, mine, once = final_rate(settings, parts, way), final_rate(settings, parts, "fast_ft"), ""
    if speed is None or mine is None:
        speed, mine = (rate(settings, parts["survey"].get(each, {})) for each in (way, "fast_ft"))
        once = " (one short run)"
    if speed is None:
        return ["", ""]
    return [f"{speed:,.0f}{once}", f"{mine / speed:.2f} times as fast" if mine and way != "fast_ft" else ""]
