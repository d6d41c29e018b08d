"""The figures of a result of bench.decode, each computed from its raw samples, so that a test can do it again."""

from __future__ import annotations

import statistics
from typing import Any

from bench.machine import card_of, slug_of

BYTES_PER_SECOND = {"h200": 4.28e12}  #: memory's speed, measured before results held the card's own
RUNS = 2  #: of the best peer, at least
#: Ways of answering that fast_ft is compared with, by their names in a result.
PEERS = {
    "plain": "transformers' generate", "static": "transformers' generate with a static cache",
    "compiled": "transformers' generate, static cache, compiled", "unsloth": "Unsloth", "llama.cpp": "llama.cpp",
}  # fmt: skip
LIBRARIES = ("transformers' generate", "Unsloth", "llama.cpp")  #: with which these names begin
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
    }
    if peaks := [each["peak_gib"] for each in done["fixed"] if "peak_gib" in each]:
        found[f"{card}.peak_gib"] = (max(peaks), "GiB reserved, with the context")
    if (bytes_per_second := memory_speed(result)) is not None:
        share = statistics.median(floor_share(each, bytes_per_second) for each in done["fixed"])
        found[f"{card}.floor_share"] = (
            round(share, 3), "of the steps' time, for reading weights and live cache once",
        )  # fmt: skip
    if (best := best_peer(result)) is not None:
        speed, setting = best
        found[f"{card}.vs_best_peer"] = (round(fixed / speed, 2), f"times the new tokens/s of {setting}")
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


def settings_of(result: dict[str, Any]) -> dict[str, list[float]]:
    """Return {setting: tokens/s of each run} of every way of answering that was tried, ours left out."""
    found: dict[str, list[float]] = {}
    for each in result["measurements"]:
        if each["name"] in PEERS and "tokens_per_s" in each:
            found.setdefault(setting_of(each), []).append(each["tokens"] / each["seconds"])
    return found


def setting_of(each: dict[str, Any]) -> str:
    """Return a peer's setting in words."""
    at_once = f"{each.get('batch', 1)} at once"
    if each["name"] != "llama.cpp":
        return f"{PEERS[each['name']]}, {at_once}"
    unified = ", one cache for all" if each.get("unified") else ""
    return f"llama.cpp, Q4_K_M without LoRA, {each['cache']} cache{unified}, {at_once}"


def best_peer(result: dict[str, Any]) -> tuple[float, str] | None:
    """Return the fastest peer's tokens/s and setting; None unless every peer was tried, or failed, and it ran twice."""
    if set(PEERS) - {each["name"] for each in result["measurements"]}:
        return None
    speeds = {setting: (statistics.median(runs), len(runs)) for setting, runs in settings_of(result).items()}
    if not speeds:
        return None
    setting = max(speeds, key=lambda name: speeds[name])
    speed, runs = speeds[setting]
    return (speed, setting) if runs >= RUNS else None


def readme(result: dict[str, Any] | None) -> str:
    """Return the README's table of answering: ours, and each library in the best setting that was tried in its call."""
    if result is None or best_peer(result) is None:
        return "No comparison of answering with other libraries at their best is kept yet."
    ours = [each["tokens"] / each["seconds"] for each in result["measurements"] if each["name"] == "fixed"]
    lines = [
        "| answering | tokens/s | fast_ft is |",
        "|---|---|---|",
        f"| fast_ft | {statistics.median(ours):,.0f} | |",
    ]
    best: dict[str, tuple[float, str]] = {}
    for setting, runs in settings_of(result).items():
        library, speed = next(each for each in LIBRARIES if setting.startswith(each)), statistics.median(runs)
        best[library] = max(best.get(library, (0.0, "")), (speed, setting))
    for speed, setting in sorted(best.values(), reverse=True):
        lines.append(f"| {setting} | {speed:,.0f} | {statistics.median(ours) / speed:.1f} times as fast |")
    return "\n".join(lines)


def markdown(result: dict[str, Any] | None) -> str:
    """Return every other way of answering in a result, each with the rates of its runs."""
    settings = settings_of(result) if result is not None else {}
    if result is None or not settings:
        return "No rates of other ways of answering are kept yet."
    lines = ["| answering | tokens/s |", "|---|---|"]
    for setting, runs in sorted(settings.items(), key=lambda each: -statistics.median(each[1])):
        lines.append(f"| {setting} | {' and '.join(f'{speed:,.0f}' for speed in runs)} |")
    return "\n".join([*lines, "", f"{card_of(result)}, {result['date'][:10]}, new tokens over prefill and steps."])
