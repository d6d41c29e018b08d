"""Which ways may be compared, and their figures: all from a result's raw samples, so that a test can do it again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.machine import card_slug
from fast_ft.hub.families import ModelShape
from fast_ft.plan.cost_model import train_flops

WARM_UP, MEASURED = 6, 12  #: steps that are left out, and the fewest steps that must follow
COSINE, LOSS_DROP = 0.99, 0.05
FEWEST, FIRST = 7, 3  #: steps that a slow way runs at least in a survey, and those of them that compile
STANDS = 0.05  #: by how much the median of the last steps may differ from the median before
_ENDS = 4  #: steps at either end whose mean losses make the drop


def tokens_per_s(settings: dict[str, Any], part: dict[str, Any], steps: int | None = None) -> dict[str, Any] | None:
    """Return median, quartiles and total of tokens/s after warm-up, over the first `steps` steps; None if too few."""
    samples = part["steps"][:steps]
    if len(samples) < WARM_UP + MEASURED:
        return None
    kept = list(zip(settings["tokens_per_step"], samples, strict=False))[WARM_UP:]
    rates = [tokens / step["seconds"] for tokens, step in kept]
    low, median, high = statistics.quantiles(rates, n=4)
    total = sum(tokens for tokens, _ in kept) / sum(step["seconds"] for _, step in kept)
    return {
        "median": round(median, 1), "quartiles": [round(low, 1), round(high, 1)], "total": round(total, 1),
        "steps": len(kept),
    }  # fmt: skip


def step_tokens(settings: dict[str, Any], part: dict[str, Any]) -> list[int]:
    """Return the tokens of each step's rows; of packed rows what the way itself was seen to pass through the model."""
    if part.get("packed"):
        return [step["positions"] + step["passes"] for step in part["steps"]]
    tokens: list[int] = settings["tokens_per_step"][: len(part["steps"])]
    return tokens


def last_rate(settings: dict[str, Any], part: dict[str, Any], count: int = MEASURED, end: int | None = None) -> float:
    """Return the median tokens/s of the last `count` steps, or of those before step `end`."""
    pairs = list(zip(step_tokens(settings, part), part["steps"], strict=False))[:end]
    return statistics.median(tokens / step["seconds"] for tokens, step in pairs[-count:])


def long_enough(steps: list[dict[str, Any]], seconds: float) -> bool:
    """Return whether a way's steps took so long in a survey that no more are needed."""
    return len(steps) >= FEWEST and sum(step["seconds"] for step in steps[FIRST:]) > seconds


def stands_by_epochs(settings: dict[str, Any], part: dict[str, Any]) -> bool:
    """Return whether an epoch has just ended, and the rate of its last steps is that of the epoch before."""
    epoch, done = settings["steps_per_epoch"], len(part["steps"])
    if done % epoch or done - epoch < max(MEASURED, WARM_UP):
        return False
    before = last_rate(settings, part, min(MEASURED, epoch), done - epoch)
    return abs(last_rate(settings, part, min(MEASURED, epoch)) / before - 1) <= STANDS


def stands(settings: dict[str, Any], part: dict[str, Any]) -> bool:
    """Return whether a run's last rate stands: by its epochs, or in a shorter run by its last six steps."""
    done = len(part["steps"])
    if done < WARM_UP + MEASURED:
        return False
    if done >= settings["steps_per_epoch"] + MEASURED:
        whole = done - done % settings["steps_per_epoch"]
        return stands_by_epochs(settings, part | {"steps": part["steps"][:whole]})
    half = MEASURED // 2
    return abs(last_rate(settings, part, half) / last_rate(settings, part, half, done - half) - 1) <= 2 * STANDS


def ratio(settings: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return {"ratio", "refused"}: our median tokens/s over theirs in the same steps, or why they are not compared."""
    steps = min(len(ours["steps"]), len(theirs["steps"]))
    refused = disagreements(ours, theirs)
    mine, other = (tokens_per_s(settings, each, steps) for each in (ours, theirs))
    if mine is None or other is None:
        refused.append(f"{steps} steps in common; {WARM_UP} to warm up and {MEASURED} to measure are needed")
    found: dict[str, Any] = {
        "refused": refused, "steps": steps, "one_run": ours["run"] == theirs["run"],
        "cosine": cosine(ours, theirs), "loss_drops": [loss_drop(each, steps) for each in (ours, theirs)],
        "ratio": None, "ratio_of_totals": None,
    }  # fmt: skip
    if not refused and mine is not None and other is not None:
        found["ratio"] = round(mine["median"] / other["median"], 3)
        found["ratio_of_totals"] = round(mine["total"] / other["total"], 3)
    return found


def disagreements(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Say where two ways did not do the same work: trained tokens, first gradients, the loss's fall."""
    if any(each.get("out_of_memory") for each in (a, b)):
        return ["out of memory"]
    found = [
        f"{each['way']} was to run without padding, and did not"
        for each in (a, b)
        if each.get("padding_free") and not all(step["flat"] for step in each["steps"])
    ]
    steps = min(len(a["steps"]), len(b["steps"]))
    pairs = list(zip(a["steps"], b["steps"], strict=False))
    if odd := [number for number, (x, y) in enumerate(pairs, 1) if x["digest"] != y["digest"]]:
        found.append(f"trained token ids differ from step {odd[0]} on")
    similar = cosine(a, b)
    if similar is None:
        found.append(f"no gradients of one step: {a['gradient'].get('step')} and {b['gradient'].get('step')}")
    elif similar < COSINE:
        found.append(f"the first step's gradients: cosine {similar:.4f}, under {COSINE}")
    drops = [loss_drop(each, steps) for each in (a, b)]
    if drops[0] is None or drops[1] is None:
        found.append("a loss is no number")
    elif not abs(drops[0] - drops[1]) <= LOSS_DROP * abs(drops[1]):
        found.append(f"the loss fell by {drops[0]:.4f} and {drops[1]:.4f}, over {LOSS_DROP:.0%} apart")
    return found


def cosine(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """Return the cosine between the first finite gradients of the adapter, by their sketches; None if of two steps."""
    x, y = a["gradient"], b["gradient"]
    if not x or not y or x["step"] != y["step"]:
        return None
    length = math.hypot(*x["sketch"]) * math.hypot(*y["sketch"])
    return round(sum(p * q for p, q in zip(x["sketch"], y["sketch"], strict=True)) / length, 6) if length else None


def loss_drop(part: dict[str, Any], steps: int) -> float | None:
    """Return by how much the loss fell: the mean of the first steps less that of the last."""
    losses = [step.get("loss") for step in part["steps"][:steps]]
    ends = losses[:_ENDS] + losses[-_ENDS:]
    if any(loss is None for loss in ends):
        return None
    return round(statistics.fmean(losses[:_ENDS]) - statistics.fmean(losses[-_ENDS:]), 6)


def epoch_seconds(settings: dict[str, Any], part: dict[str, Any]) -> list[float]:
    """Return the seconds of each whole epoch, from its first step's start to its last step's end."""
    size, steps = settings["steps_per_epoch"], part["steps"]
    return [
        round(sum(step["seconds"] for step in steps[start : start + size]), 4)
        for start in range(0, len(steps) - size + 1, size)
    ]


def seconds_to_first_step(part: dict[str, Any]) -> float:
    """Return the seconds from the end of the libraries' import to the end of the first optimizer step."""
    return round(part["stamps"]["first_step_end"] - part["stamps"]["imported"], 2)


def ceiling(settings: dict[str, Any], part: dict[str, Any]) -> dict[str, float] | None:
    """Return the roofline without recomputation: tokens/s at the measured rate of a large product."""
    if not part.get("rates"):
        return None
    flops = train_flops(ModelShape.from_config(settings["config"]), 1)
    return {"gflop_per_token": round(flops / 1e9, 2), "tokens_per_s": round(part["rates"]["tflops"] * 1e12 / flops, 1)}


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure's name: (value, unit)} of everything in a result; a refused ratio makes no figure.

    None compares with another library: single runs of some settings do not say how fast it can be. See
    bench/peer_figures.py.
    """
    settings, found = result["settings"], {}
    card = card_slug(settings["card"])
    for name, parts in result["setups"].items():
        ours = parts.get("fast_ft")
        if ours is None or ours.get("out_of_memory"):
            continue
        whole = name == "whole"
        prefix = f"train.{card}" if whole else f"train.{name}"
        emulated = "" if whole else "; T4-class emulation, not a T4"
        if "fast_ft-unsloth" in parts:
            value = ratio(settings, parts["fast_ft-unsloth"], ours)["ratio"]
            if value is not None:
                unit = (
                    f"the tokens/s of Unsloth's layers over those of {ours.get('backend', 'fused')}, both in our passes"
                )
                found[f"{prefix}.unsloth_share"] = (value, f"{unit}{emulated}")
        speed, top = tokens_per_s(settings, ours), ceiling(settings, ours)
        if speed is not None and top is not None:
            share = round(speed["median"] / top["tokens_per_s"], 3)
            found[f"{prefix}.ceiling_share"] = (share, f"of the ceiling without recomputation{emulated}")
        if whole:
            found |= _whole_run(settings, parts, prefix)
    return found


def _whole_run(settings: dict[str, Any], parts: dict[str, Any], prefix: str) -> dict[str, tuple[float, str]]:
    found: dict[str, tuple[float, str]] = {}
    ours = parts["fast_ft"]
    epochs = epoch_seconds(settings, ours)
    if len(epochs) >= 3:
        found[f"{prefix}.first_over_third_epoch"] = (round(epochs[0] / epochs[2], 3), "first epoch's time / third's")
    if settings["prequantised"]:
        seconds = seconds_to_first_step(ours)
        found[f"{prefix}.seconds_to_first_step"] = (seconds, "s, end of import to end of first step")
    return found


def ordered(ways: Sequence[str]) -> list[str]:
    """Return ways in the order of the table: ours, then the others by name, the yardstick last."""
    return sorted(ways, key=lambda way: (way != "fast_ft", way == "trl-peft", way))
