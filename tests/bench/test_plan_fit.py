"""The plan's constants from samples: what made the samples is found again, and the file in use holds to the samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import plan_fit, plan_samples, trained_samples
from bench.least_squares import least_squares
from fast_ft.plan import cost_model
from fast_ft.plan.constants import SECONDS

HEAD = {
    "rates": {"tflops": 670.0, "gb_per_s": 4000.0, "launch_seconds": 9e-6},
    "environment": {"gpu": {"name": "NVIDIA H200"}},
}


def made(factors: dict[str, float]) -> list[trained_samples.Trained]:
    """The samples as they would be if each part took `factors` times what the card's rates say, and no host waited."""
    found = []
    for title, sample in plan_samples.SAMPLES.items():
        if not sample.capture:
            continue
        line: dict[str, Any] = {
            "title": title, "config": sample.config, "r": sample.r, "optim": "adamw_8bit", "rows": 8,
            "longest": max(map(max, sample.steps)), "recompute": sample.recompute, "capture": True, "passes": [],
            "steps": [],
            "trained": {"most_reserved": 0.0}, "base": {"reserved": 1.0, "allocated": 1.0},
            "reserved_before_gib": 0.0, "context_gib": 0.8,
        }  # fmt: skip
        each = trained_samples._trained(line, trained_samples._card(HEAD))
        for lengths in sample.steps:
            parts = plan_fit.parts_of(each, lengths)
            seconds = sum(factors[name] * value for name, value in parts.items())
            line["passes"].append({"host_seconds": 1e-3, "seconds": seconds, "one_behind_another": seconds})
            line["steps"].append({"lengths": list(lengths), "seconds": [9.0, seconds + 2e-3, seconds + 2e-3]})
        line["trained"]["most_reserved"] = trained_samples.planned_gib(each) + 0.05
        found.append(each)
    return found


FACTORS = {
    "products": 1.2, "flash": 4.0, "elementwise": 1.3, "lora": 0.9, "unpacking": 2.7, "head_norms": 2.0,
    "layer": 1.2e-4, "pass": 1e-3,
}  # fmt: skip


def test_the_factors_that_made_the_samples_predict_them_again() -> None:
    samples = made(FACTORS)
    found = plan_fit.fit(samples)
    seconds = found["seconds"]
    assert seconds["products"] == pytest.approx(FACTORS["products"], rel=0.05)
    assert seconds["unpacking"] == pytest.approx(FACTORS["unpacking"], rel=0.15)
    for each in samples:
        for step in each.line["steps"]:
            parts = plan_fit.parts_of(each, step["lengths"]) | {"step": 1.0}
            whole = sum(seconds[name] * value for name, value in parts.items())
            assert whole == pytest.approx(step["seconds"][1], rel=0.02)
    assert found["memory"]["rest_gib"] == pytest.approx(plan_fit.MEMORY["rest_gib"] + 0.05, abs=2e-3)


def test_memory_above_the_plan_weighs_more_than_memory_below_it() -> None:
    """Of samples alike but for 0.07 GiB more and 0.07 less, the fit lies by 2.5 times as near to the former."""
    (each, *_) = made(FACTORS)
    planned = trained_samples.planned_gib(each)
    both = [replace(each, line=each.line | {"trained": {"most_reserved": planned + more}}) for more in (-0.07, 0.07)]
    before = plan_fit.MEMORY["rest_gib"]
    assert plan_fit.fit(both)["memory"]["rest_gib"] == pytest.approx(before + 0.03, abs=2e-3)


def test_what_the_blocks_of_the_samples_commit_held_more_is_not_taken_for_the_rest(tmp_path: Path) -> None:
    """Two hidden states more where a layer goes backward: only where that was the peak."""
    sample = plan_samples.SAMPLES["llama 7B, 8 layers, all again, no graphs"]
    line = {
        "title": "all again", "config": sample.config, "r": 16, "optim": "adamw_8bit", "rows": 16, "longest": 1024,
        "recompute": 8, "capture": False, "steps": [{"lengths": [512] * 16, "seconds": []}],
    }  # fmt: skip
    planned = []
    for commit in ("c6b84f853089abc513164453628d4e6ef4c03dad", "0" * 40):
        (tmp_path / commit).write_text(json.dumps(HEAD | {"commit": commit}) + "\n" + json.dumps(line))
        (each,) = trained_samples.read([tmp_path / commit])
        planned.append(trained_samples.planned_gib(each) * 2**30)
    assert planned[0] - planned[1] == pytest.approx(4 * 4096 * 8192)


def test_the_constants_in_use_are_those_of_the_samples_memory() -> None:
    found = trained_samples.read([Path("bench/results/plan-samples-h200.jsonl")])
    assert plan_fit.fit(found)["memory"] == plan_fit.MEMORY


def test_no_factor_is_below_nothing() -> None:
    values = [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]
    assert least_squares(values, [3.0, 5.0, 7.0]) == pytest.approx([1.0, 2.0], rel=1e-4)
    assert least_squares(values, [5.0, 4.0, 3.0])[1] == 0.0


def test_a_training_that_failed_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(HEAD) + "\n" + json.dumps({"title": "x", "error": "OutOfMemoryError"}) + "\n")
    assert trained_samples.read([path]) == []


def test_every_part_of_a_pass_has_a_constant() -> None:
    (each, *_) = made(FACTORS)
    row = {"row": 300.0}
    plain = replace(each.training, flash=False)
    for training in (each.training, plain):
        parts = cost_model.card_parts(each.shape, training, each.rates, 2048, 0, **row)
        assert set(parts) <= set(SECONDS)


def test_a_card_that_others_used_counts_by_its_fastest_round() -> None:
    samples = made(FACTORS)
    before = plan_fit.fit(samples)["seconds"]
    slow = samples[0].line
    for step in slow["steps"]:
        step["seconds"] = [9.0, 5.0, step["seconds"][1], 5.0]
    slow["context_gib"] = 11.0
    found = plan_fit.fit(samples)["seconds"]
    assert found["products"] == before["products"]


def test_the_file_in_use_has_every_constant_that_is_fitted() -> None:
    found = plan_fit.fit(made(FACTORS))
    assert set(found["seconds"]) == set(SECONDS) and set(found["memory"]) == set(plan_fit.MEMORY)
