"""The lines on minutes in the headers of recipes, and on the homework's memory, rendered from bench/results/."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from bench import budget, machine
from bench.figures import RESULTS
from fast_ft.recipe.loader import load_recipe

_MINUTES, _SCORE, _NEXT = "# Minutes   ", "# Score     ", "#           "
_THRIFTY_GIB = 7.2
#: Recipes that were run on a CPU: the raw result of the run.
_ON_CPU = {"quickstart": "quickstart.json", "smollm": "smollm.json", "sweep-pocket": "sweep-pocket.json"}


def recipes() -> list[Path]:
    """The recipes whose headers are rendered."""
    return [RESULTS.parents[1] / "recipes" / f"{name}.yaml" for name in (*budget.ALLOWED, *_ON_CPU)]


def rendered(path: Path) -> str:
    """Return a recipe's text with new lines from Minutes to Score; of one that was run on a CPU, with a new Minutes."""
    text = path.read_text(encoding="utf-8")
    if path.stem in _ON_CPU:
        return re.sub(rf"^{_MINUTES}.*", took(path.stem), text, count=1, flags=re.MULTILINE)
    before, rest = text.split(_MINUTES, 1)
    _, after = rest.split(_SCORE, 1)
    return before + "\n".join(lines(path)) + "\n" + _SCORE + after


def took(name: str) -> str:
    """Return the header's line on the minutes of a recipe that was run on a CPU."""
    result = json.loads((RESULTS / _ON_CPU[name]).read_text(encoding="utf-8"))
    busy = " beside other work" if result.get("load_before", 0) > result.get("cores", 1) else ""
    minutes = f"{result['wall_seconds'] / 60:.1f}"
    return f"{_MINUTES}{minutes}, measured{busy} ({machine.card_of(result)}; {result['command']})"


def lines(path: Path) -> list[str]:
    """Return the header's lines on minutes and memory of a recipe of the homework."""
    found = _minutes()
    done, errors = found["recipes"][path.stem], {part: f"{error:.0%}" for part, error in found["errors"].items()}
    plan, small = done["plan"], thrifty(path)
    train, answers = (budget.span(done[f"{part}_minutes"]) for part in ("train", "generate"))
    return [
        f"{_MINUTES}projected, never run on a T4: training {train}, answers {answers}",
        f"{_NEXT}(python -m fast_ft plan ... --gpu t4). The model behind it misses published T4 runs by up to",
        f"{_NEXT}{errors['train']} in training and {errors['generate']} in decoding",
        f"# Memory    as much as there is, for speed: on a T4 {plan['train_gib']:.1f} GiB predicted in training and",
        f"{_NEXT}{plan['generate_gib']:.1f} in decoding. budget.memory_gib={_THRIFTY_GIB} makes it fit into that: "
        f"{small['train_gib']:.1f} predicted,",
        f"{_NEXT}{small['recompute_layers']} of 32 layers computed again",
    ]


def thrifty(path: Path) -> dict[str, Any]:
    """Return the plan of a recipe for a small budget of memory."""
    recipe = load_recipe(str(path), [f"budget.memory_gib={_THRIFTY_GIB}"])
    return budget.settled(recipe, _minutes()["recipes"][path.stem]).to_json()


@cache
def _minutes() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / "t4-minutes.json").read_text(encoding="utf-8"))
    return content
