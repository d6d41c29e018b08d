"""The model of a T4 against published runs: nothing is fitted but one rate, and no run predicts itself."""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import replace
from typing import Any

import pytest

from bench import budget, calibration, figures, sm75
from fast_ft.plan import cards

CONTENT: dict[str, Any] = json.loads(calibration.PUBLISHED.read_text(encoding="utf-8"))
RUNS = calibration.runs()


def test_each_run_fits_one_rate_and_predicts_all_the_others() -> None:
    folds = calibration.leave_one_out(RUNS)
    assert [fold["fitted"] for fold in folds] == [run.what for run in RUNS]
    for fold, fitted in zip(folds, RUNS, strict=True):
        assert calibration.seconds_of(fitted, calibration.rate_of(fitted)) == pytest.approx(fitted.seconds, rel=1e-6)
        assert set(fold["errors"]) == {run.what for run in RUNS} - {fitted.what}
    errors = [abs(each) for fold in folds for each in fold["errors"].values()]
    found = calibration.summary()["seconds_error"]
    assert found == {"median": pytest.approx(statistics.median(errors), abs=1e-4), "worst": max(errors)}


def test_a_held_out_run_changes_no_rate() -> None:
    other = [replace(run, seconds=run.seconds * (2 if run.what == "Gemma-7B" else 1)) for run in RUNS]
    before, after = (
        {fold["fitted"]: fold for fold in calibration.leave_one_out(each) if fold["fitted"] != "Gemma-7B"}
        for each in (RUNS, other)
    )
    for name, fold in before.items():
        assert fold["tflops"] == after[name]["tflops"]
        assert fold["errors"]["Gemma-7B"] > after[name]["errors"]["Gemma-7B"] + 0.3
        rest = {key: error for key, error in fold["errors"].items() if key != "Gemma-7B"}
        assert rest == {key: after[name]["errors"][key] for key in rest}


def test_published_peaks_shape_no_prediction() -> None:
    other = copy.deepcopy(CONTENT)
    for each in other["runs"]:
        each["peak_gib"] *= 1.5
        each["reserved_before_gib"] = 1.0
    made = [[calibration.peak_gib(run) for run in calibration.runs(content)] for content in (CONTENT, other)]
    assert made[0] == made[1]


def test_decodings_batch_8_shapes_no_prediction() -> None:
    for each in CONTENT["decoding"]:
        other = each | {"tokens_per_s": each["tokens_per_s"] | {"8": 1.0}}
        assert calibration.decoded(other)["predicted"] == calibration.decoded(each)["predicted"]


def test_the_tables_t4_has_the_rates_that_the_runs_give() -> None:
    low, high = calibration.summary()["tflops"]
    assert cards.card("t4").tflops == (round(low, 1), round(high, 1))


def test_every_run_says_where_it_is_from_and_what_is_derived() -> None:
    for each in CONTENT["runs"]:
        assert each["source"] and each["unsloth"], each["what"]
    for each in CONTENT["decoding"]:
        assert each["source"]
    notes = " ".join(CONTENT["notes"])
    for word in ("derived", "assumed", "longest of 480", "Unsloth version", "Left out"):
        assert word in notes
    pairs = [(each["seconds"], each["peak_gib"]) for each in CONTENT["runs"]]
    assert len(set(pairs)) == len(pairs), "outputs are copied between notebooks: each pair counts once"


def test_the_figures_are_those_of_the_file() -> None:
    kept = {name: each["value"] for name, each in figures.read().items() if each["source"] == "published-t4.json"}
    assert kept == {name: value for name, (value, _) in calibration.figures(CONTENT).items()}


def test_the_doctor_does_not_take_published_runs_for_ours() -> None:
    assert "t4" not in figures.measured()


def test_kernels_make_a_figure_only_where_all_ran_and_nothing_failed() -> None:
    result = {"on_a_t4": ["a", "b"], "executed": ["a", "b", "c"], "failed": 0}
    assert sm75.figures(result)["t4.kernels_executed"][0] == 2.0
    assert sm75.figures(result | {"executed": ["a"]}) == sm75.figures(result | {"failed": 1}) == {}


def test_verdicts_carry_the_word_projected_and_the_error() -> None:
    def verdict(
        minutes: list[float] | None, allowed: float = 10, how: str = "projected", *, trusted: bool = True
    ) -> str:
        return budget.verdict(how, minutes, allowed, 0.2, trusted)

    assert verdict([1.0, 8.0]) == "keeps to 10 min (projected, 20% off at worst)"
    assert verdict([1.0, 8.5]) == "unsure (projected, 20% off at worst)", "8.5 and a fifth more are over 10"
    assert verdict([13.0, 20.0]) == "misses 10 min (projected, 20% off at worst)"
    assert verdict([12.0, 20.0]) == "unsure (projected, 20% off at worst)"
    assert verdict([1.0, 2.0], trusted=False) == "no verdict: the projection misses published runs by up to 20%"
    assert verdict([9.0, 9.9], how="measured") == "keeps to 10 min (measured)"
    assert verdict(None) == "nothing to answer"
