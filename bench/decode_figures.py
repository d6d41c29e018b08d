"""The figures of a result of bench.decode, each computed from its raw samples, so that a test can do it again."""

from __future__ import annotations

import statistics
from typing import Any

from bench.machine import slug_of

BYTES_PER_SECOND = {"h200": 4.28e12}  #: memory's speed, measured before results held the card's own
HOLDS = 1.15  #: a graph replayed under an SM limit may reach this multiple of the launched work's rate there
PART = 2.0  #: and launched work this multiple of the SMs' share of the card's rate: fewer SMs run at a higher clock


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}.

    A ratio is of measurements of one call only. An emulation's figures carry its name.
    """
    done: dict[str, list[dict[str, Any]]] = {}
    for each in result["measurements"]:
        if "failed" not in each and not each.get("out_of_memory"):
            done.setdefault(each["name"], []).append(each)
    fixed = _rate(done.get("fixed", []))
    plain = max((each["tokens"] / each["seconds"] for each in done.get("plain", [])), default=None)
    if result["settings"]["sms"]:
        return _emulated(done, fixed, plain)
    return {} if fixed is None else _whole_card(result, done, fixed, plain)


def _whole_card(
    result: dict[str, Any], done: dict[str, list[dict[str, Any]]], fixed: float, plain: float | None
) -> dict[str, tuple[float, str]]:
    card = f"decode.{slug_of(result)}"
    found = {
        f"{card}.tokens_per_s": (round(fixed, 1), "new tokens/s, prefill and capture included"),
        f"{card}.peak_gib": (max(each["peak_gib"] for each in done["fixed"]), "GiB reserved, with the context"),
    }
    if (speed := memory_speed(result)) is not None:
        share = statistics.median(floor_share(each, speed) for each in done["fixed"])
        found[f"{card}.floor_share"] = (
            round(share, 3), "of the steps' time, for reading weights and live cache once",
        )  # fmt: skip
    if "unsloth" in done:
        found[f"{card}.vs_notebook"] = (round(fixed / _only(done["unsloth"]), 1), "times Unsloth, prompt by prompt")
    if plain is not None:
        found[f"{card}.vs_generate"] = (round(fixed / plain, 2), "times generate at its best batch size")
    if (before := _rate(done.get("before", []))) is not None:
        found[f"{card}.gain"] = (round(fixed / before, 2), "times the older checkout's rate, same call")
    if each := done.get("products"):
        found[f"{card}.products_ms"] = (each[-1]["milliseconds"], f"ms, products of a step of {each[-1]['rows']} rows")
    for measured, name, what in (
        ("long", "long_gain", "150 x 1,024 new tokens"),
        ("steady", "long_gain_steady", "steps in the middle of 1,024 new tokens"),
    ):
        kinds = {each["kv_cache"]: each["tokens"] / each["seconds"] for each in done.get(measured, [])}
        if len(kinds) == 2:
            unit = f"times the rate with a 16-bit cache, {what}"
            found[f"{card}.{name}"] = (round(kinds["8bit"] / kinds["16bit"], 2), unit)
    runs = [each for each in done.get("mixed", []) if each["refill"]]
    mixed = {(each["refill"], each["shrinks"]): each["tokens"] / each["seconds"] for each in done.get("mixed", [])
             if not each.get("draw")}  # fmt: skip
    if refilled := mixed.get((True, True)):
        rates = [each["tokens"] / each["seconds"] / fixed for each in runs]
        unit = "of our rate with equal lengths" + (f", mean of {len(rates)} draws" if len(rates) > 1 else "")
        found[f"{card}.mixed_over_fixed"] = (round(statistics.mean(rates), 3), unit)
        if still := mixed.get((False, False)):
            found[f"{card}.refill_gain"] = (round(refilled / still, 2), "times our own fixed batches, of fixed shape")
        if shrinking := mixed.get((False, True)):
            unit = "times our own fixed batches, whose steps shrink with what is left"
            found[f"{card}.refill_gain_shrinking"] = (round(refilled / shrinking, 2), unit)
    return found


def memory_speed(result: dict[str, Any]) -> float | None:
    """Return the bytes a second that the card's memory was measured at; None where nobody measured it."""
    rates = [each["gb_per_s"] for each in result["measurements"] if each["name"] == "rates"]
    return rates[-1] * 1e9 if rates else BYTES_PER_SECOND.get(slug_of(result))


def floor_share(each: dict[str, Any], speed: float) -> float:
    """Return the share of the steps' time that reading the weights and the live keys and values once a step takes.

    speed: bytes a second of the card's memory.
    """
    moved = each["steps"] * each["weight_bytes"] + each["cells_read"] * each["bytes_a_cell"]
    return float(moved / speed / each["burst_seconds"])


def limit_holds(done: dict[str, list[dict[str, Any]]]) -> bool:
    """Return whether launched work and a replayed graph both kept to the SMs of the limited stream."""
    limits = done.get("sm_limit", [])
    return bool(limits) and all(
        each["launched_tflops"] <= PART * each["whole_card_tflops"] * each["sms_got"] / each["sms_of_card"]
        and each["replayed_tflops"] <= HOLDS * each["launched_tflops"]
        for each in limits
    )


def _emulated(
    done: dict[str, list[dict[str, Any]]], fixed: float | None, plain: float | None
) -> dict[str, tuple[float, str]]:
    if fixed is None or plain is None or not limit_holds(done):
        return {}
    unit = "times generate at its best batch size; T4-class emulation, not a T4"
    return {"decode.t4class.vs_generate": (round(fixed / plain, 2), unit)}


def _rate(runs: list[dict[str, Any]]) -> float | None:
    """Return the median run's tokens/s."""
    return statistics.median(each["tokens"] / each["seconds"] for each in runs) if runs else None


def _only(runs: list[dict[str, Any]]) -> float:
    (one,) = runs
    return float(one["tokens"] / one["seconds"])
