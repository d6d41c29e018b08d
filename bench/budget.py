"""The homework's minutes: what each of its recipes takes on a T4, beside what the homework allows.

On a T4 the minutes are those of the recipes' runs (`--only recipe`). Elsewhere they are projected with the planner's
model of time. Its one free number is set so that it predicts a published T4 run, and another published run tests it.
Where that run is missed by over 20 %, no verdict is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.hub.families import ModelShape
from fast_ft.plan import cards, cost_model, planner, plans
from fast_ft.plan.cost_model import Rates, Training
from fast_ft.plan.ways import ways
from fast_ft.recipe import loader, policy_ntu_hw5
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import now

#: The homework's own figures: minutes of training (from, to) over all attempts, and of inference, on a T4.
ALLOWED = {"simple": (10, 10), "medium": (60, 120), "strong": (180, 240)}
INFERENCE_MINUTES, SESSION_MINUTES = policy_ntu_hw5.MINUTES["generate_minutes"], policy_ntu_hw5.MINUTES["train_minutes"]
MOST_ERROR = 0.2
_START_MINUTES = 2


@dataclass(frozen=True)
class Published:
    """A run on one T4 that somebody else published: 2 rows a pass, checkpointing, r = 16, 8 rows a step."""

    what: str
    seconds: float
    rows: int
    shape: ModelShape
    source: str


_LLAMA = ModelShape.from_config(dict(policy_ntu_hw5.LLAMA_2_7B))
_TINY = ModelShape(2048, 5632, 22, 32, 4, 64, 32000, False)
_EPOCH = 52_002
#: Mean tokens of the longer of two of Alpaca's rows in its own template, which both are padded to: counted over 9,229
#: random rows with Llama 2's tokenizer.
PADDED_TOKENS = 160
FITTED = Published(
    "Llama-2-7B, one epoch of Alpaca, Unsloth", 13 * 3600 + 7 * 60, _EPOCH, _LLAMA, "Unsloth's README, December 2023"
)
#: The table does not say how many steps; 6,996 s are one epoch's length, where the 7B's 942 s beside it are not.
HELD_OUT = Published(
    "TinyLlama-1.1B, Alpaca (taken for one epoch), Unsloth", 6996, _EPOCH, _TINY, "huggingface.co/blog/unsloth-trl"
)


def calibrate() -> dict[str, Any]:
    """Return the T4's rate that predicts the fitted run, and the error that this rate makes on the held-out run."""
    bandwidth = cards.card("t4").gb_per_s
    low, high = 1.0, 65.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds_of(FITTED, middle, bandwidth) > FITTED.seconds else (low, middle)
    rate = (low + high) / 2
    predicted = seconds_of(HELD_OUT, rate, bandwidth)
    return {
        "tflops": round(rate, 2),
        "gb_per_s": bandwidth,
        "fitted": {"what": FITTED.what, "seconds": FITTED.seconds, "source": FITTED.source},
        "held_out": {
            "what": HELD_OUT.what,
            "published_seconds": HELD_OUT.seconds,
            "predicted_seconds": round(predicted),
            "error": round(predicted / HELD_OUT.seconds - 1, 3),
            "source": HELD_OUT.source,
        },
    }


def seconds_of(run: Published, tflops: float, gb_per_s: float) -> float:
    """Return the seconds that the planner's model gives a published run at this rate."""
    training = Training(
        r=16, optim="adamw_8bit", load_in_4bit=True, backend="unsloth", rows=2, longest=PADDED_TOKENS,
        typical=PADDED_TOKENS,
    )  # fmt: skip
    one = cost_model.pass_seconds(
        run.shape, training, Rates(tflops, gb_per_s), 2 * PADDED_TOKENS, run.shape.num_hidden_layers, capture=False
    )
    return math.ceil(run.rows / 8) * (4 * one + cost_model.STEP_SECONDS)


def measure(overrides: Sequence[str], results: Path) -> dict[str, Any]:
    """Return minutes and verdicts of the three recipes; `overrides` say where data and tokenizer are."""
    found = calibrate()
    trusted = abs(found["held_out"]["error"]) <= MOST_ERROR
    recipes = {}
    for name in ALLOWED:
        recipe = loader.load_recipe(f"recipes/{name}.yaml", overrides)
        done = _measured(results / f"{name}-{_backend(recipe)}.json")
        if done is None:
            done = project(recipe, prepare(recipe), found)
        recipes[name] = done | {"verdict": verdict(name, done, trusted)}
    return {"kind": "budget", "date": now(), "calibration": found, "allowed": ALLOWED, "recipes": recipes}


def _backend(recipe: Recipe) -> str:
    """Return what trains a recipe on a T4."""
    return ways(recipe, cards.card("t4").capability).names[0]


def _measured(path: Path) -> dict[str, Any] | None:
    """Return a recipe's minutes if it ran on a T4."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if "T4" not in (result["environment"]["gpu"] or {"name": ""})["name"]:
        return None
    train, answers = (round(result[part]["seconds"] / 60, 1) for part in ("train", "generate"))
    return {"how": "measured", "train_minutes": [train, train], "generate_minutes": [answers, answers]}


def project(recipe: Recipe, prepared: PreparedData, calibration: dict[str, Any]) -> dict[str, Any]:
    """Return the projected minutes, from what large products reach on a T4 down to what the published run reached.

    The slow end is widened by the error on the held-out run.
    """
    card = cards.card("t4")
    family = planner.base_family(recipe)
    shape, backend = family.shape, _backend(recipe)
    settled = planner.settle(recipe, prepared, family, backend=backend, card=card)
    work, steps = planner.training(recipe, prepared, backend=backend), planner.step_lengths(recipe, prepared)

    def _minutes(tflops: float) -> float:
        rates = Rates(tflops, card.gb_per_s)
        return sum(plans.step_seconds(shape, work, settled.train, step, rates) for step in steps) / 60

    slowest = _minutes(calibration["tflops"]) * (1 + abs(calibration["held_out"]["error"]))
    return {
        "how": "projected",
        "steps": len(steps),
        "tokens": sum(map(sum, steps)),
        "train_minutes": [round(_minutes(card.tflops[1]), 1), round(slowest, 1)],
        "generate_minutes": planner.answer_minutes(
            recipe, prepared, settled.decode.slots, shape, replace(card, tflops=(calibration["tflops"], card.tflops[1]))
        ),
        "plan": settled.to_json(),
    }


def verdict(name: str, done: dict[str, Any], trusted: bool) -> str:
    """Return whether training keeps to the homework's minutes."""
    low, high = done["train_minutes"]
    allowed, word = ALLOWED[name][1], done["how"]
    if word == "projected" and not trusted:
        return f"no verdict: the projection missed a published run by over {MOST_ERROR:.0%}"
    if high <= allowed:
        return f"keeps to {allowed} min ({word})"
    return f"misses {allowed} min ({word})" if low > allowed else f"unsure ({word})"


def attempts(done: dict[str, Any]) -> list[int]:
    """Return how many trainings fit into four hours, at the slow end and at the quick one."""
    low, high = done["train_minutes"]
    return [int(SESSION_MINUTES // (end + _START_MINUTES)) for end in (high, low)]


def markdown(found: dict[str, Any]) -> str:
    """Return the table of minutes in Markdown, and where they come from."""
    held, rate = found["calibration"]["held_out"], found["calibration"]["tflops"]
    quick = cards.card("t4").tflops[1]
    lines = [
        "| recipe | training, min | homework | answers, min | homework | attempts in 4 h | verdict on training |",
        "|---" * 7 + "|",
    ]
    for name, done in found["recipes"].items():
        low, high = ALLOWED[name]
        allowed = f"{high}" if low == high else f"{low} to {high}"
        few, many = attempts(done)
        lines.append(
            f"| {name} | {_span(done['train_minutes'])} {done['how']} | {allowed} | {_span(done['generate_minutes'])} "
            f"{done['how']} | {INFERENCE_MINUTES:g} | {_span([few, many])} | {done['verdict']} |"
        )
    lines += [
        "",
        f"Projected minutes are no measurement. At {rate:.1f} TFLOP/s the planner's model gives {FITTED.what}, its "
        f"published time ({FITTED.source}). {held['what']}, held out, it then puts at {held['predicted_seconds']:,} s; "
        f"published are {held['published_seconds']:,.0f} s ({held['error']:+.0%}, {held['source']}). Slow ends are "
        f"widened by that error; quick ends take the {quick:g} TFLOP/s that large products reach on a T4. Minutes of "
        "answers could be held against no published run, so there is no verdict on them. Each attempt is counted with "
        f"{_START_MINUTES} minutes to start, assumed.",
    ]
    return "\n".join(lines)


def _span(ends: Sequence[float] | None) -> str:
    if ends is None:
        return "-"
    low, high = ends
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
