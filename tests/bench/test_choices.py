"""What choices are worth: figures from samples, which runs are tried, and one run of it on a CPU."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench import choices, choices_figures, choices_measure, choices_run, figures
from bench.__main__ import figures_of
from bench.figures import RESULTS
from fast_ft.data.examples import Example
from tests.helpers.parts import POCKET

KEPT = sorted(RESULTS.glob("choices-*.json"))


def sample(choice: str, seed: int, nats: float, **answer: Any) -> dict[str, Any]:
    counted = {"id": "r1", "tokens": 9, "words": 8, "ended": True, "missed": 0.5, "distinct": 1.0, **answer}
    return {"choice": choice, "seed": seed, "nats": {"usual": [nats * 30, 30], "long": [nats * 10, 10]},
            "answers": [counted, counted | {"ended": False, "missed": None}]}  # fmt: skip


RUNS = [
    *(sample("base", seed, 2.0) for seed in (1, 2, 3)),
    *(sample("strong", seed, nats) for seed, nats in ((1, 1.5), (2, 1.6), (3, 1.7))),
    *(sample("random", seed, nats) for seed, nats in ((1, 1.6), (3, 1.9), (4, 9.0))),
]


def test_a_contrast_is_paired_by_seed_with_students_interval() -> None:
    found = choices_figures.headline({"runs": RUNS})
    assert found["real.base_nats"] == (2.0, "nats per response token of held-out rows, SmolLM2 untrained; "
                                       "95 % over 3 seeds: 2.00000 to 2.00000")  # fmt: skip
    value, unit = found["real.selected_minus_random_nats"]
    half = 12.706 * statistics.stdev([-0.1, -0.2]) / math.sqrt(2)
    assert value == pytest.approx(-0.15) and f"over 2 seeds: {-0.15 - half:.5f} to {-0.15 + half:.5f}" in unit
    assert found["real.tuned_minus_base_nats"][0] == pytest.approx(-0.4)
    assert "real.curriculum_minus_flat_nats" not in found, "nobody ran it"
    assert figures_of({"kind": "choices", "runs": RUNS}) == found
    mean, low, high = choices_figures.interval([3.0])
    assert mean == 3.0 and math.isnan(low) and math.isnan(high)


def test_the_table_marks_what_is_off_zero() -> None:
    shown = choices_figures.markdown({"runs": RUNS})
    line = next(line for line in shown.splitlines() if line.startswith("| tuning on strong.yaml's rows | 3 |"))
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert cells[0].startswith("**-0.400 (") and cells[2] == "+0.000 (+0.000 to +0.000)"
    assert "| base | 3 | 2.000 | 2.000 | 0.500 | 8.000 | 0.500 | 1.000 |" in shown


def test_a_result_has_a_line_for_each_run() -> None:
    result = {"kind": "choices", "environment": {"gpu": None}, "runs": RUNS}
    text = choices_measure.text_of(result)
    assert json.loads(text) == result and len(text.splitlines()) == len(RUNS) + 8


@pytest.mark.skipif(not KEPT, reason="choices were not measured yet")
def test_the_figures_are_those_of_the_samples_and_hold_no_text() -> None:
    result = json.loads(KEPT[-1].read_text(encoding="utf-8"))
    kept = figures.read()
    for name, (value, unit) in choices_figures.headline(result).items():
        assert (kept[name]["value"], kept[name]["unit"]) == (value, unit)
    for run in result["runs"]:
        assert set(run) == {"choice", "seed", "steps", "losses", "rows", "nats", "answers", "commit", "at", "seconds"}
        assert all(set(each) == {"id", "tokens", "words", "ended", "missed", "distinct"} for each in run["answers"])


def test_every_choice_is_a_recipe_of_the_same_steps_or_says_otherwise() -> None:
    from fast_ft.recipe.lint import lint

    names = [choice.name for choice in (*choices.MAIN, *choices.OTHERS)]
    assert len(names) == len(set(names))
    model = {"name_or_path": "m", "template": "tokenizer", "load_in_4bit": False}
    recipes = {c.name: choices.recipe(c, 1, model, "rows") for c in (*choices.MAIN, *choices.OTHERS)}
    assert all(lint(recipe)[0] == [] for recipe in recipes.values())
    assert recipes["two-stages"].select == recipes["strong"].select != recipes["strong-2025"].select
    for one, other, _ in choices_figures.CONTRASTS.values():
        assert {one, other} <= {choice.name for choice in choices.MAIN}
    seeds = [seed for choice, seed in choices.plan() if choice.name == "strong"]
    assert seeds == [1, 2, 3, 4, 5] and len(list(choices.plan())) == 5 * 5 + 3 * len(choices.OTHERS)
    first = [(choice.name, seed) for choice, seed in choices.plan()][:5]
    assert first == [(choice.name, 1) for choice in choices.MAIN]


def test_samples_of_several_calls_are_one_list_without_torn_lines_or_repetitions(tmp_path: Path) -> None:
    lines = [json.dumps(sample(name, seed, 1.0)) for name, seed in (("longest", 1), ("strong", 1), ("strong", 1))]
    (tmp_path / "2-0.jsonl").write_text(lines[0] + "\n" + lines[1][:40], encoding="utf-8")
    (tmp_path / "1-0.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    found = choices_run.samples(tmp_path)
    assert [(each["choice"], each["seed"]) for each in found] == [("strong", 1), ("longest", 1)]
    assert choices_run.finished(tmp_path) == {"strong-1", "longest-1"}
    (tmp_path / "claims").mkdir()
    assert [choices_run.claimed(tmp_path / "claims", "strong-2") for _ in range(2)] == [True, False]


def test_an_answer_is_counted_without_its_text() -> None:
    row = Example.exchange("r7", "Write 10 words about rain.", "Rain falls.")
    found = choices_run.counted(row, "drip drop drip drop drip drop", 7, True)
    assert found == {"id": "r7", "tokens": 7, "words": 6, "ended": True, "missed": 0.4, "distinct": 0.5}
    assert choices_run.counted(row, "", 1, True)["distinct"] is None


def test_a_run_trains_measures_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "NEW_TOKENS", 8)
    monkeypatch.setattr(choices_run, "OTHERS", 2)
    order = choices_run.Order(
        str(POCKET), str(POCKET.parent / "train.json"), str(POCKET.parent / "references.json"),
        str(tmp_path / "s.jsonl"), str(tmp_path), 0.0, template="llama-2",
    )  # fmt: skip
    worker = choices_run.Worker(order)
    worker.rows["usual"] = worker.rows["usual"][:8]
    assert worker.rows["long"] == [] and len(worker.prompts) == 2
    worker.rows.pop("long")
    tried = choices.Choice("tried", {"method": "random", "take": 16}, train={"max_steps": 2, "learning_rate": 5e-3})
    before, after = (worker.run(choice, 1) for choice in (choices.Choice("base", base=True), tried))
    assert (before["steps"], after["steps"]) == (0, 2) and len(after["rows"]) == 16 and before["rows"] == []
    assert choices_figures.nats(after) < choices_figures.nats(before)
    assert {answer["id"] for answer in after["answers"]} == {each.id for each in worker.prompts}
    assert after["seconds"].keys() >= {"rows", "train", "held_out", "answers"}
    texts = [each.prompt for each in worker.prompts]
    assert not any(text in json.dumps(after) for text in texts)
