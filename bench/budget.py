"""The homework's minutes: what each of its recipes takes on a T4, beside what the homework allows.

On a T4 the minutes are those of the recipes' runs (`--only recipe`). Elsewhere they are projected with the planner's
model of time, from the rates that published T4 runs give (bench/calibration.py). A verdict is given only where that
model predicts the published runs within the errors below, and the word "projected" and the error stand beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import calibration
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.hub.families import ModelShape
from fast_ft.plan import cards, decode_time, planner, plans
from fast_ft.plan.decode_pool import Answers
from fast_ft.plan.plans import Machine
from fast_ft.plan.run_plan import RunPlan
from fast_ft.plan.training_work import Training
from fast_ft.plan.ways import ways
from fast_ft.recipe import loader, policy_ntu_hw5
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import now

#: The homework's own figures: minutes of training (from, to) over all attempts, and of inference, on a T4.
ALLOWED = {"simple": (10, 10), "medium": (60, 120), "strong": (180, 240), "strong-flat": (180, 240)}
INFERENCE_MINUTES, SESSION_MINUTES = policy_ntu_hw5.MINUTES["generate_minutes"], policy_ntu_hw5.MINUTES["train_minutes"]
#: The largest errors on published runs with which a verdict is given: of seconds, median and worst, and of decoding.
MOST_ERROR = {"median": 0.08, "worst": 0.2, "decode": 0.25}
_START_MINUTES = 2


def command_of(words: str) -> str:
    """Return the command with names in the place of this machine's files."""
    for key, name in (("model.tokenizer", "TOKENIZER"), ("data.train", "ROWS"), ("data.test", "PROMPTS")):
        words = re.sub(rf"{re.escape(key)}=\S+", f"{key}={name}", words)
    return words


def measure(overrides: Sequence[str], results: Path) -> dict[str, Any]:
    """Return minutes and verdicts of the recipes; `overrides` say where data and tokenizer are."""
    found = calibration.summary()
    errors = {"train": found["seconds_error"]["worst"], "generate": found["decode_error"]}
    trusted = {
        "train": errors["train"] <= MOST_ERROR["worst"] and found["seconds_error"]["median"] <= MOST_ERROR["median"],
        "generate": errors["generate"] <= MOST_ERROR["decode"],
    }
    recipes = {}
    for name in ALLOWED:
        recipe = loader.load_recipe(f"recipes/{name}.yaml", overrides)
        done = _measured(results / f"{name}-{_backend(recipe)}.json")
        done = project(recipe, prepare(recipe)) if done is None else done
        allowed = {"train": ALLOWED[name][1], "generate": INFERENCE_MINUTES}
        recipes[name] = done | {
            f"{part}_verdict": verdict(done["how"], done[f"{part}_minutes"], allowed[part], errors[part], trusted[part])
            for part in allowed
        }
    return {
        "kind": "budget", "date": now(), "errors": errors, "tflops": found["tflops"], "allowed": ALLOWED,
        "recipes": recipes,
    }  # fmt: skip


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


def project(recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """Return the minutes that `plan --gpu t4` projects, quick end first, and the token counts that they follow from."""
    content = planner.describe(recipe, prepared, "t4")
    asked = planner.answers(recipe, prepared, planner.base_family(recipe))
    return {
        "how": "projected",
        "steps": sum(stage["steps"] for stage in content["stages"]),
        "tokens": sum(stage["tokens"] for stage in content["stages"]),
        "train_minutes": content["projected_minutes"],
        "generate_minutes": content["answer_minutes"],
        "plan": content["plan"],
        "step_lengths": planner.step_lengths(recipe, prepared),
        "prompt_lengths": list(asked.prompt_tokens),
        "shared_tokens": asked.shared_tokens,
    }


def again(recipe: Recipe, done: dict[str, Any]) -> dict[str, list[float]]:
    """Compute a projection's minutes again, from its token counts alone: no rows, no tokenizer, no card."""
    card, shape, plan = cards.card("t4"), _shape(recipe), settled(recipe, done)
    training, answers = _work(recipe, done)
    assert plan.decode is not None, "the homework's recipes have prompts"
    ends = [
        sum(plans.step_seconds(shape, training, plan.train, step, rates) for step in done["step_lengths"]) / 60
        for rates in reversed(card.rates)
    ]
    return {
        "train_minutes": [round(end, 1) for end in ends],
        "generate_minutes": decode_time.answer_minutes(
            shape, card.rates, answers, plan.decode.slots, load_in_4bit=recipe.model.load_in_4bit
        ),
    }


def settled(recipe: Recipe, done: dict[str, Any]) -> RunPlan:
    """Return the plan of a recipe on a T4 from a projection's token counts."""
    card, budget_gib = cards.card("t4"), recipe.budget.memory_gib
    memory = card.memory_gib if budget_gib == "auto" else min(card.memory_gib, float(budget_gib))
    training, answers = _work(recipe, done)
    machine = Machine(memory, card.expected)
    wanted = planner.wanted(recipe, planner.base_family(recipe))
    return plans.settle(_shape(recipe), training, done["step_lengths"], answers, wanted, machine)


def _shape(recipe: Recipe) -> ModelShape:
    return planner.base_family(recipe).shape


def _work(recipe: Recipe, done: dict[str, Any]) -> tuple[Training, Answers]:
    """Return what a projection's token counts ask of training and of answering."""
    longest = max(max(step) for step in done["step_lengths"])
    training = Training(
        recipe.lora.r, recipe.train.optim, recipe.model.load_in_4bit, _backend(recipe),
        recipe.train.effective_batch_size, longest, draws=recipe.lora.lora_dropout > 0,
    )  # fmt: skip
    answers = Answers(
        done["prompt_lengths"], recipe.generate.max_new_tokens, recipe.generate.num_return_sequences,
        shared_tokens=done["shared_tokens"],
    )  # fmt: skip
    return training, answers


def verdict(how: str, minutes: Sequence[float] | None, allowed: float, error: float, trusted: bool) -> str:
    """Return whether a range of minutes keeps to what is allowed, both of its ends widened by the model's error."""
    if minutes is None:
        return "nothing to answer"
    low, high = minutes
    if how == "projected":
        if not trusted:
            return f"no verdict: the projection misses published runs by up to {error:.0%}"
        low, high, how = low * (1 - error), high * (1 + error), f"projected, {error:.0%} off at worst"
    if high <= allowed:
        return f"keeps to {allowed:g} min ({how})"
    return f"misses {allowed:g} min ({how})" if low > allowed else f"unsure ({how})"


def attempts(done: dict[str, Any]) -> list[int]:
    """Return how many trainings fit into four hours, at the slow end and at the quick one."""
    low, high = done["train_minutes"]
    return [int(SESSION_MINUTES // (end + _START_MINUTES)) for end in (high, low)]


def markdown(found: dict[str, Any]) -> str:
    """Return the table of minutes in Markdown, and where they come from."""
    lines = [
        "| recipe | training, min | homework | verdict | answers, min | homework | verdict | attempts in 4 h |",
        "|---" * 8 + "|",
    ]
    for name, done in found["recipes"].items():
        low, high = ALLOWED[name]
        allowed = f"{high}" if low == high else f"{low} to {high}"
        lines.append(
            f"| {name} | {span(done['train_minutes'])} | {allowed} | {done['train_verdict']} | "
            f"{span(done['generate_minutes'])} | {INFERENCE_MINUTES:g} | {done['generate_verdict']} | "
            f"{span(attempts(done))} |"
        )
    slow, quick = found["tflops"]
    lines += [
        "",
        f"Projected minutes are no measurement. Training's are from the {quick:g} to the {slow:g} TFLOP/s that "
        "published T4 runs give one by one; each of them predicts the others' seconds within "
        f"{found['errors']['train']:.0%}. "
        "Answers are from mean length at the quick end to full length at the slow one. Each attempt is counted with "
        f"{_START_MINUTES} minutes to start, assumed.",
    ]
    return "\n".join(lines)


def span(ends: Sequence[float] | None) -> str:
    """Return a range in words."""
    if ends is None:
        return "-"
    low, high = ends
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
