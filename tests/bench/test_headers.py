"""The homework's minutes: what the recipes' headers say is what the plan says, computed again from token counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import budget, calibration, figures, headers
from bench.figures import RESULTS
from fast_ft.recipe.loader import load_recipe

FOUND: dict[str, Any] = json.loads((RESULTS / "t4-minutes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [path for path in headers.recipes() if path.stem in FOUND["recipes"]])
def test_a_header_says_what_the_plan_says(path: Path) -> None:
    """After a change of the model or of a recipe: python -m bench --only budget, then python -m bench --readme."""
    recipe, done = load_recipe(str(path)), FOUND["recipes"][path.stem]
    minutes = budget.again(recipe, done)
    assert minutes == {key: done[key] for key in minutes}
    assert budget.settled(recipe, done).to_json() == done["plan"]
    assert path.read_text(encoding="utf-8") == headers.rendered(path)
    assert len(done["step_lengths"]) == done["steps"] and sum(map(sum, done["step_lengths"])) == done["tokens"]


SCORES = {
    "quickstart": {
        "exact match {:.0%} on the 100 prompts": "pocket.tuned_exact_match",
        "the base model {:.0%};": "pocket.base_exact_match",
        "; {:.0%} on 300 more": "pocket.fresh_exact_match",
    },
    "smollm": {
        "{:.0f} of 24 answers": "smollm.cpu.tuned_in_manner", "the base model {:.0f} (": "smollm.cpu.base_in_manner",
    },
    "sweep-pocket": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_a_header_says_what_was_measured_on_a_cpu(name: str) -> None:
    """After another measurement python -m bench --readme writes the minutes. The scores are typed, and compared."""
    (path,) = (path for path in headers.recipes() if path.stem == name)
    text = path.read_text(encoding="utf-8")
    assert text == headers.rendered(path) and f"\n{headers.took(name)}\n" in text
    for says, figure in SCORES[name].items():
        value = figures.read()[figure]["value"] * (24 if name == "smollm" else 1)
        assert says.format(value).replace("%", " %") in text, figure


def test_a_header_follows_the_figures(tmp_path: Any) -> None:
    path = headers.recipes()[0]
    other = tmp_path / path.name
    other.write_text(path.read_text(encoding="utf-8").replace("training ", "training 100 or "), encoding="utf-8")
    assert headers.rendered(other) == path.read_text(encoding="utf-8")
    shown = "\n".join(headers.lines(path))
    assert "projected, never run on a T4" in shown and "misses published T4 runs by up to" in shown


def test_the_command_names_no_file_of_a_machine() -> None:
    given = "python -m bench --only budget model.tokenizer=/home/me/llama data.train=/tmp/rows data.test=p.json"
    assert budget.command_of(given) == (
        "python -m bench --only budget model.tokenizer=TOKENIZER data.train=ROWS data.test=PROMPTS"
    )
    assert budget.command_of(FOUND["command"]) == FOUND["command"]


def test_verdicts_are_those_of_the_minutes_and_the_published_runs() -> None:
    errors = calibration.summary()
    assert FOUND["errors"] == {"train": errors["seconds_error"]["worst"], "generate": errors["decode_error"]}
    assert FOUND["tflops"] == errors["tflops"]
    assert errors["seconds_error"]["median"] <= budget.MOST_ERROR["median"]
    for name, done in FOUND["recipes"].items():
        for part, allowed in (("train", budget.ALLOWED[name][1]), ("generate", budget.INFERENCE_MINUTES)):
            trusted = FOUND["errors"][part] <= budget.MOST_ERROR["worst" if part == "train" else "decode"]
            said = budget.verdict(done["how"], done[f"{part}_minutes"], allowed, FOUND["errors"][part], trusted)
            assert done[f"{part}_verdict"] == said and ("projected" in said or not trusted)
