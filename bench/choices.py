"""What is tried: ways of choosing 100 rows, stages, epochs, ranks, rates and noise, each with its seeds, in order.

Everything but what a choice names is the same: 100 rows, 5 epochs, 8 rows a step, r 16, rate 2e-4 with linear decay. A
seed draws the adapter's first weights, the order of rows, noise, random rows and the tokens of answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fast_ft.recipe import schema
from fast_ft.recipe.loader import load_recipe

ROWS, EPOCHS, STEPS = 100, 5, 65  #: 13 steps of 8 rows an epoch
NEW_TOKENS = 512
SEEDS, MORE_SEEDS = (1, 2, 3), (4, 5)
_RECIPES = Path(__file__).parents[1] / "recipes"
_LONG = {"rank_by": {"response_words": 1.0}, "take": ROWS}
_GOOD = {"score": ">= 4.5", "response_words": "60..450", "ends_cleanly": True}


@dataclass(frozen=True)
class Choice:
    """A choice by name. select, curriculum, train, lora: what it changes. base: nothing is trained."""

    name: str
    select: dict[str, Any] | str = "strong"  #: a section, or the recipe that it is taken from
    curriculum: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    base: bool = False


def _stages(*ends: tuple[float, int]) -> dict[str, Any]:
    """Return stages up to these quantiles for these numbers of epochs, in as many steps as a run without stages."""
    stages = [{"name": f"s{at}", "upto": upto, "num_train_epochs": epochs} for at, (upto, epochs) in enumerate(ends)]
    return {"curriculum": {"by": "response_words", "stages": stages}, "train": {"max_steps": STEPS}}


#: The contrasts that docs/real.md names are between these; the others are looked at with fewer seeds.
MAIN = (
    Choice("base", base=True),
    Choice("strong"),
    Choice("random", {"method": "random", "take": ROWS}),
    Choice("two-stages", **_stages((0.34, 2), (1.0, EPOCHS))),
    Choice("strong-2025", "strong-2025"),
)
OTHERS = (
    Choice("longest", _LONG),
    Choice("best-scored", {"rank_by": {"score": 1.0}, "take": ROWS}),
    Choice("weighted", {"where": {"score": ">= 0"}, "rank_by": {"score": 1.0, "response_words": 1.0}, "take": ROWS}),
    Choice("stratified", {"where": _GOOD, "method": "stratified", "strata": {"response_words": 4}, "take": ROWS}),
    Choice("diversified", {**_LONG, "where": _GOOD, "diversify": {"verb": 15, "opening": 3, "topic": 1}}),
    Choice("medium", "medium"),
    Choice("three-stages", **_stages((0.34, 1), (0.67, 1), (1.0, EPOCHS))),
    Choice("1-epoch", train={"num_train_epochs": 1}),
    Choice("15-epochs", train={"num_train_epochs": 15}),
    Choice("neftune-5", train={"neftune_noise_alpha": 5.0}),
    Choice("rate-1e-3", train={"learning_rate": 1e-3}),
    Choice("rate-5e-5", train={"learning_rate": 5e-5}),
    Choice("r-4", lora={"r": 4, "lora_alpha": 8}),
    Choice("r-64", lora={"r": 64, "lora_alpha": 128}),
)


def plan() -> Iterator[tuple[Choice, int]]:
    """Yield (choice, seed), what matters most first."""
    yield from ((choice, seed) for seed in SEEDS for choice in MAIN)
    yield from ((choice, seed) for seed in SEEDS[:2] for choice in OTHERS)
    yield from ((choice, seed) for seed in MORE_SEEDS for choice in MAIN)
    yield from ((choice, seed) for seed in SEEDS[2:] for choice in OTHERS)


def recipe(choice: Choice, seed: int, model: dict[str, Any], train: str) -> schema.Recipe:
    """Return the recipe of one run over the rows of a file; `model` is its section."""
    select = _section(choice.select) if isinstance(choice.select, str) else choice.select
    section: dict[str, Any] = {
        "effective_batch_size": 8, "num_train_epochs": EPOCHS, "learning_rate": 2e-4, "warmup_steps": None,
        "warmup_ratio": 0.1, "optim": "adamw_torch", **choice.train,
    }  # fmt: skip
    return schema.Recipe.model_validate(
        {
            "seed": seed,
            "model": model,
            "lora": {"r": 16, "lora_alpha": 32, **choice.lora},
            "data": {"train": train, "overlong": "drop", "unencodable": "drop"},
            "select": select,
            "curriculum": choice.curriculum,
            "train": section,
            "generate": {
                "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 30, "max_new_tokens": NEW_TOKENS
            },
        }
    )  # fmt: skip


@cache
def _section(name: str) -> dict[str, Any]:
    return load_recipe(_RECIPES / f"{name}.yaml").select.model_dump()
