"""bench.whole_run: a small recipe's whole command twice, bench.decode with its pool; and figures from given samples."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from bench import decode, figures, recipe_run, whole_run
from bench.__main__ import figures_of
from fast_ft.cli import main as fast_ft
from fast_ft.common.errors import InputError
from tests.helpers.parts import write_recipe

Started = list[tuple[str, list[str], dict[str, str]]]


def start_here(started: Started) -> Any:
    """Return what runs a module as recipe_run.start does, but in this process, where libraries are imported already."""

    def start(module: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        started.append((module, list(words), dict(environment)))
        with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if module == "fast_ft":
                assert fast_ft.main(words) == 0
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", [module, *words])
                    assert decode.main() == 0

    return start


@pytest.fixture(scope="module", params=["here", pytest.param("in processes of its own", marks=pytest.mark.soak)])
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path, train_file: Path,
    test_file: Path,
) -> Iterator[tuple[Path, dict[str, Any], Started]]:  # fmt: skip
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, tiny, train_file, test_file, {"model.dtype": "float32"})
    started: Started = []
    arguments = [str(recipe), "generate.max_new_tokens=5", "--results", str(folder / "any-h200.json")]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "here":
            patch.setattr(recipe_run, "start", start_here(started))
        assert whole_run.main([*arguments, "--keep", str(folder / "kept")]) == 0
    yield folder, json.loads((folder / "any-h200.json").read_text()), started


def test_a_small_recipe_is_measured_whole_and_its_pool_is_stepped(real: tuple[Path, dict[str, Any], Started]) -> None:
    folder, result, started = real
    for name in ("cold", "warm"):
        run = result["runs"][name]
        assert len(json.loads((folder / "kept" / name / "pred.json").read_text())) == 5
        assert 0 < run["pred_seconds"] <= run["wall_seconds"] + 1
        assert len(run["steps"]) == run["train"]["steps"] == 6 and run["generate"]["answers"] == 5
        assert run["plan"]["generation_batch"] == run["generate"]["batch_size"] == 3 and run["out_of_memory"] == []
    assert result["runs"]["cold"]["digests"] == result["runs"]["warm"]["digests"], "the same work twice"
    (*_, measured) = result["decode"]["measurements"]
    assert (measured["slots"], measured["tokens"]) == (3, 5 * 5), "bench.decode has the run's pool, prompts and limit"
    found = figures_of(result)
    assert found["run.cpu.seconds"][0] == result["runs"]["warm"]["pred_seconds"]
    assert not any("h200" in name for name in found), "the file's name says nothing about the card"
    if started:
        environments = [environment for _, _, environment in started]
        assert environments[0] == environments[1] == environments[2] and set(environments[0]) == set(whole_run.CACHES)


def test_a_real_run_says_where_its_seconds_went(real: tuple[Path, dict[str, Any], Started]) -> None:
    _, result, _ = real
    assert whole_run.problems(result) == []
    answering = result["runs"]["warm"]["generate"]
    assert 0 < whole_run.fixed_seconds(result["runs"]["warm"]) < answering["seconds"]
    (*_, measured) = result["decode"]["measurements"]
    assert (measured["cells"], measured["steps"]) == (answering["cache_tokens"], answering["decoding_steps"])
    assert {f"run.cpu.{name}" for name in (
        "seconds", "seconds_cold", "decode_fixed_seconds_warm", "decode_fixed_seconds_cold", "decode_bench_over_run",
    )} == set(figures_of(result))  # fmt: skip


def test_kernels_that_were_compiled_before_are_not_taken_for_cold_ones(
    real: tuple[Path, dict[str, Any], Started], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = real
    again = [str(folder / "small.yaml"), "--results", str(folder / "b.json"), "--keep", str(folder / "kept")]
    assert whole_run.main(again) == 2
    assert "kernels were compiled there already" in capsys.readouterr().err and not (folder / "b.json").exists()


def run(fixed: float, pred: float) -> dict[str, Any]:
    seconds = {"loading": 14.0, "prefill": 2.0, "steps": 4.0, "checks": 0.75, "captures": 0.25, "other": fixed - 1}
    return {
        "pred_seconds": pred, "wall_seconds": pred + 1, "out_of_memory": [],
        "plan": {"generation_batch": 56, "cache_tokens": 16001, "dequantise": False},
        "generate": {
            "seconds": 20 + fixed, "batch_size": 56, "answers": 150, "seconds_by": seconds, "decoding_steps": 400,
            "cache_tokens": 16000,
        },
    }  # fmt: skip


@pytest.fixture
def samples() -> dict[str, Any]:
    fixed = [
        {"name": "fixed", "steps": 390, "burst_seconds": seconds + 0.5, "capture_seconds": 0.5}
        for seconds in (4.0, 3.75, 3.0)
    ]
    return {
        "kind": "run", "recipe": "strong", "command": "python -m bench.whole_run recipes/strong.yaml",
        "date": "2026-01-31T12:00:00+00:00", "commit": "0123abc",
        "environment": {"gpu": {"name": "NVIDIA H100 80GB HBM3"}},
        "runs": {"cold": run(7.5, 140.0), "warm": run(1.25, 110.5)},
        "decode": {"date": "2026-01-31T12:03:00+00:00", "measurements": [{"name": "rates", "gb_per_s": 1}, *fixed]},
    }  # fmt: skip


def test_figures_are_what_the_samples_say_and_carry_the_card(
    samples: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures.json")
    (tmp_path / "run-strong.json").write_text(json.dumps(samples))
    assert bench.main(["--adopt", str(tmp_path / "run-strong.json")]) == 0
    assert {name: entry["value"] for name, entry in figures.read().items()} == {
        "run.h100.seconds": 110.5,
        "run.h100.seconds_cold": 140.0,
        "run.h100.decode_fixed_seconds_warm": 1.25,
        "run.h100.decode_fixed_seconds_cold": 7.5,
        "run.h100.decode_bench_over_run": 1.04,  # 390 / 3.75 over 400 / 4
    }
    assert {entry["card"] for entry in figures.read().values()} == {"NVIDIA H100 80GB HBM3"}


def out_of_memory(result: dict[str, Any]) -> None:
    result["runs"]["cold"]["out_of_memory"] = ["out of memory in batches of 56: went on with 49"]


def smaller_pool(result: dict[str, Any]) -> None:
    result["runs"]["warm"]["generate"]["batch_size"] = 27


def smaller_cache(result: dict[str, Any]) -> None:
    result["runs"]["warm"]["generate"]["cache_tokens"] = 14000


def undivided(result: dict[str, Any]) -> None:
    del result["runs"]["warm"]["generate"]["seconds_by"]


def bench_out_of_memory(result: dict[str, Any]) -> None:
    result["decode"]["measurements"].append({"name": "fixed", "out_of_memory": True})


def bench_failed(result: dict[str, Any]) -> None:
    del result["decode"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (out_of_memory, "cold: out of memory 1 times, first: out of memory in batches of 56"),
        (smaller_pool, "warm: 56 slots were planned, 27 were used"),
        (smaller_cache, "warm: a cache of 16001 tokens was planned, 14000 were held"),
        (undivided, "warm: the manifest does not say seconds_by of answering"),
        (bench_out_of_memory, "bench.decode: out of memory with the run's pool"),
        (bench_failed, "bench.decode did not end"),
    ],
)
def test_what_ran_out_of_memory_or_kept_no_plan_makes_no_figure_of_decoding(
    samples: dict[str, Any], spoil: Any, says: str
) -> None:
    result = copy.deepcopy(samples)
    spoil(result)
    assert len(whole_run.problems(result)) == 1 and whole_run.problems(result)[0].startswith(says)
    assert set(figures_of(result)) == {"run.h100.seconds", "run.h100.seconds_cold"}
    del result["runs"]["warm"]
    assert figures_of(result) == {}


def test_a_recipe_without_prompts_is_refused_before_anything_runs(
    real: tuple[Path, dict[str, Any], Started], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = real
    assert whole_run.main([str(folder / "small.yaml"), "data.test=null", "--results", str(tmp_path / "a.json")]) == 2
    assert "data.test: null" in capsys.readouterr().err and not (tmp_path / "a.json").exists()


def test_a_command_that_fails_is_told_with_its_logs_end(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"(?s)python -m bench\.none ended with status 1; .*No module named bench.none"
    ):
        recipe_run.start("bench.none", [], tmp_path / "log", {})
    recipe_run.start("this", [], tmp_path / "log", {})
    assert "Beautiful is better than ugly" in (tmp_path / "log").read_text()


def test_out_of_memory_in_a_runs_output_is_found(
    real: tuple[Path, dict[str, Any], Started], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = real
    shown = "out of memory in batches of 3: went on with 2"

    def start(module: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        shutil.copytree(folder / "kept" / "cold", tmp_path / "run")  # a real run's folder
        log.write_text(f"note\n{shown}\n")

    monkeypatch.setattr(recipe_run, "start", start)
    overrides = [f"output_dir={tmp_path / 'run'}"]
    _, found = recipe_run.run_command(str(folder / "small.yaml"), overrides, tmp_path / "log")
    assert found["out_of_memory"] == [shown]
    with pytest.raises(InputError, match="this run is there already"):
        recipe_run.run_command(str(folder / "small.yaml"), overrides, tmp_path / "log")


def test_a_command_whose_training_was_cut_short_has_figures_of_answering_only(samples: dict[str, Any]) -> None:
    del samples["decode"]
    assert whole_run.problems(samples) == ["bench.decode did not end"]
    samples["answers_only"] = True
    assert whole_run.problems(samples) == []
    assert {name: value for name, (value, _) in whole_run.figures(samples).items()} == {
        "run.h100.decode_fixed_seconds_warm": 1.25, "run.h100.decode_fixed_seconds_cold": 7.5,
    }  # fmt: skip
