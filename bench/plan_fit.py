"""Fit the plan's constants on samples from a card, and print a line for each pass: planned and measured.

    python -m bench.plan_fit SAMPLES.jsonl [...] [--write]      without a card; --write changes plan/constants.json

SAMPLES are lines of bench/plan_samples.py. What each part of a pass takes by the card's rates is counted by the plan;
fitted is by how much longer it takes, by least squares of the relative errors, with a weak pull towards what a card's
rates say alone, and no factor below 0. Memory has one fitted number, for passes with graphs and without: the holes that
the allocator's blocks leave, which no tensor explains. Memory above the plan counts more than memory below it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.least_squares import least_squares
from bench.trained_samples import Trained, context_gib, measured_gib, planned_gib, read
from fast_ft.plan import constants, cost_model, plans
from fast_ft.plan.constants import MEMORY, SECONDS
from fast_ft.plan.micro_batches import width

_BLOCKED = 0.9  #: of a pass that the host spends in launching: then the card waits for it
_ABOVE = 2.5  #: a plan may be 2.5 % too large, and 1 % too small
#: Factors of a pass's parts that are fitted, and what is expected of them: the card's rates; of unpacking 2.5 bytes
#: read and written for a weight; of flash attention a third of a large product's rate (FlashAttention-2's paper).
_CARD = {
    "products": 1.0, "flash": 3.0, "elementwise": 1.0, "lora": 1.0, "unpacking": 2.5, "head_norms": 1.0, "layer": 1e-4,
    "pass": 1e-3, "optimizer": 1.0, "step": 1e-3,
}  # fmt: skip


def fit(found: Sequence[Trained]) -> dict[str, dict[str, Any]]:
    """Return the fitted constants, as constants.json has them."""
    seconds = dict(SECONDS) | _card_constants(found) | _host_constants([each for each in found if each.alone])
    memory = dict(MEMORY)
    memory["rest_gib"] = _rest(found)
    return {"memory": memory, "seconds": {name: float(f"{value:.4g}") for name, value in seconds.items()}}


def _passes(found: Sequence[Trained]) -> list[tuple[Trained, dict[str, Any]]]:
    return [(each, one) for each in found for one in each.line["passes"]]


def _is_blocked(one: dict[str, Any]) -> bool:
    return bool(one["host_seconds"] > _BLOCKED * one["seconds"])


def parts_of(each: Trained, lengths: Sequence[int]) -> dict[str, float]:
    """Return the parts of a pass over rows of these lengths, by the card's rates alone."""
    row = sum(n * n for n in lengths) / sum(lengths)
    wide = width(sum(lengths), capture=each.captured)
    return cost_model.card_parts(each.shape, each.training, each.rates, wide, each.plan.recompute_layers, row=row)


def _card_constants(found: Sequence[Trained]) -> dict[str, float]:
    """Return the factors of the card's parts: by whole steps from graphs, and by passes that the card is longer at."""
    values, wanted = [], []
    for each in found:
        if each.captured:
            for step in each.line["steps"]:
                parts = parts_of(each, step["lengths"]) | {"optimizer": _optimizer_seconds(each), "step": 1.0}
                values.append([parts.get(name, 0.0) for name in _CARD])
                wanted.append(stepped(each, step))
            continue
        for one in each.line["passes"]:
            if not _is_blocked(one) and not each.plan.recompute_layers:
                parts = parts_of(each, one["lengths"])
                values.append([parts.get(name, 0.0) for name in _CARD])
                wanted.append(one["one_behind_another"])
    return dict(zip(_CARD, least_squares(values, wanted, expected=list(_CARD.values())), strict=True))


def _host_constants(found: Sequence[Trained]) -> dict[str, float]:
    captured = [
        (each.shape.num_hidden_layers * each.rates.launch, one["host_seconds"])
        for each, one in _passes(found)
        if each.captured
    ]
    made = {"captured_host_layer": statistics.median(seconds / layers for layers, seconds in captured)}
    # where the host is longer at it, a whole step is the host's
    rows = [
        (each, stepped(each, step))
        for each in found
        if not each.captured and not each.plan.recompute_layers
        for one, step in zip(each.line["passes"], each.line["steps"], strict=True)
        if _is_blocked(one)
    ]
    if not rows:
        return made
    values = [[each.shape.num_hidden_layers * each.rates.launch] for each, _ in rows]
    (layer,) = least_squares(values, [seconds for _, seconds in rows])
    return made | {"host_layer": layer, "host_again": layer / 3}  # forward is a third of both


def _optimizer_seconds(each: Trained) -> float:
    return cost_model.OPTIMIZER_BYTES * each.shape.lora_weights(each.training.r) / (each.rates.gb_per_s * 1e9)


def stepped(each: Trained, step: dict[str, Any]) -> float:
    """Return the median of a step's rounds after the first; the fastest where others used the card and slowed it."""
    return float((statistics.median if each.alone else min)(step["seconds"][1:]))


def _rest(found: Sequence[Trained]) -> float:
    """Return the GiB that no tensor explains: those by which the worst sample is least wrong.

    A sample above its plan is as wrong as one that is `_ABOVE` times as far below it.
    """
    before = float(MEMORY["rest_gib"])
    rests = [
        (before + measured_gib(each) - planned_gib(each), measured_gib(each) + context_gib(each)) for each in found
    ]

    def worst(gib: float) -> float:
        return max(max(_ABOVE * (rest - gib), gib - rest) / whole for rest, whole in rests)

    return min((number / 1000 for number in range(1000)), key=worst)


def lines(found: Sequence[Trained]) -> list[str]:
    """Return a line for each pass, and for each training one of its time and one of its memory."""
    made = ["| sample | rows, tokens | card s | host s | pass measured | step s | measured | error |", "|---" * 8 + "|"]
    for each in found:
        passes = each.line["passes"] or [None] * len(each.line["steps"])
        sums = [0.0, 0.0]
        for one, step in zip(passes, each.line["steps"], strict=True):
            lengths = step["lengths"]
            row, wide = sum(n * n for n in lengths) / sum(lengths), width(sum(lengths), capture=each.captured)
            pass_of_it = cost_model.pass_seconds(
                each.shape, each.training, each.rates, wide, each.plan.recompute_layers, row=row, capture=each.captured
            )
            whole = plans.step_seconds(each.shape, each.training, each.plan, lengths, each.rates)
            real, alone = stepped(each, step), f"{one['one_behind_another']:.4f}" if one else ""
            sums = [sums[0] + whole, sums[1] + real]
            made.append(
                f"| {each.title} | {len(lengths)}, {wide} | {pass_of_it.card:.4f} | {pass_of_it.host:.4f} | {alone} | "
                f"{whole:.4f} | {real:.4f} | {whole / real - 1:+.1%} |"
            )
        made.append(f"| {each.title} | all | | | | {sums[0]:.4f} | {sums[1]:.4f} | {sums[0] / sums[1] - 1:+.1%} |")
    made += ["", "| sample | planned GiB | measured | error | context |", "|---" * 5 + "|"]
    for each in found:
        planned, real, context = planned_gib(each), measured_gib(each), each.line["context_gib"]
        error = (planned + context_gib(each)) / (real + context_gib(each)) - 1
        made.append(f"| {each.title} | {planned:.3f} | {real:.3f} | {error:+.2%} | {context:.3f} |")
    return made


def main() -> int:
    """Fit, and print what is planned with the fitted constants beside what was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_fit", description=__doc__)
    parser.add_argument("samples", nargs="+", type=Path)
    parser.add_argument("--keep", action="store_true", help="fit nothing: print with the constants as they are")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = read(options.samples)
    if not options.keep:
        made = fit(found)
        SECONDS.update(made["seconds"])
        MEMORY.update(made["memory"])
        content = {"source": constants.SOURCE, **made}
        print(json.dumps(content, indent=2))
        if options.write:
            constants.PATH.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
