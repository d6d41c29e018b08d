"""What may be compared, and what comes out: on made-up results, and on a real run of two ways with the pocket base."""

from __future__ import annotations

import copy
import getpass
import importlib
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from bench import budget, compare, figures, submit_file, table, training, watch
from fast_ft.common.errors import InputError
from fast_ft.recipe.loader import load_recipe

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def part(speed: float, steps: int = 39, *, seed: int = 0, drop: float = 1.0) -> dict[str, Any]:
    """A way's raw samples: tokens/s, and losses that fall from 10 by about `drop`."""
    draw = random.Random(seed)
    return {
        "run": "2026-11-22", "cap_gib": 14.7, "context_after_gib": 0.5, "peak_reserved_gib": 10.0, "sms": None,
        "rates": {"tflops": 700.0, "gb_per_s": 4000.0},
        "stamps": {"imported": 20.0, "first_step_end": 31.5, "saved": 60.0 * 4000 / speed},
        "gradient": {"step": 1, "sketch": [draw.gauss(0, 1) for _ in range(256)]},
        "steps": [
            {"seconds": 3000 / speed, "loss": 10 - drop * index / 38, "grad_norm": 1.0, "digest": f"d{index}"}
            for index in range(steps)
        ],
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    settings = {
        "card": "NVIDIA H200", "base": "base", "rows": 100, "order": "file order", "effective_batch_size": 8,
        "dtype": "float16", "schedule_steps": 39, "steps_per_epoch": 13, "tokens_per_step": [3000] * 39,
        "config": LLAMA, "prequantised": True, "lora": {"r": 16}, "train": {"optim": "adamw_8bit"},
    }  # fmt: skip
    parts = {"fast_ft": part(9000), "unsloth-notebook": part(2000), "trl-peft": part(1000, 18)}
    return {"kind": "train", "settings": settings, "setups": {"whole": parts, "t4class": copy.deepcopy(parts)}}


def test_a_ratio_is_of_medians_over_the_steps_that_both_ran(result: dict[str, Any]) -> None:
    parts = result["setups"]["whole"]
    parts["unsloth-notebook"]["steps"][10]["seconds"] *= 50  # it compiled something: the median does not see it
    parts["fast_ft"]["steps"][0]["seconds"] *= 50  # warm-up
    found = compare.ratio(result["settings"], parts["fast_ft"], parts["unsloth-notebook"])
    assert (found["ratio"], found["refused"], found["one_run"], found["cosine"]) == (4.5, [], True, 1.0)
    assert found["ratio_of_totals"] > 9
    assert compare.ratio(result["settings"], parts["fast_ft"], parts["trl-peft"])["steps"] == 18


def other_tokens(theirs: dict[str, Any]) -> None:
    theirs["steps"][4]["digest"] = "other"


def other_gradient(theirs: dict[str, Any]) -> None:
    theirs["gradient"]["sketch"] = part(1, seed=1)["gradient"]["sketch"]


def other_step(theirs: dict[str, Any]) -> None:
    theirs["gradient"]["step"] = 2


def other_loss(theirs: dict[str, Any]) -> None:
    for index, step in enumerate(theirs["steps"]):
        step["loss"] = 10 - 0.9 * index / 38


def slightly_other_loss(theirs: dict[str, Any]) -> None:
    for index, step in enumerate(theirs["steps"]):
        step["loss"] = 10 - 0.94 * index / 38


def no_loss(theirs: dict[str, Any]) -> None:
    theirs["steps"][-1]["loss"] = None


def padded(theirs: dict[str, Any]) -> None:
    theirs |= {"way": "unsloth-notebook", "padding_free": True}
    theirs["steps"] = [step | {"flat": False} for step in theirs["steps"]]


def few_steps(theirs: dict[str, Any]) -> None:
    del theirs["steps"][17:]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_tokens, "trained token ids differ from step 5 on"),
        (other_gradient, "cosine"),
        (other_step, "no gradients of one step: 1 and 2"),
        (other_loss, "the loss fell by"),
        (slightly_other_loss, "over 5% apart"),
        (no_loss, "a loss is no number"),
        (padded, "unsloth-notebook was to run without padding, and did not"),
        (few_steps, "17 steps in common; 6 to warm up and 12 to measure"),
    ],
)
def test_what_did_other_work_is_refused(result: dict[str, Any], spoil: Any, says: str) -> None:
    parts = result["setups"]["whole"]
    spoil(parts["unsloth-notebook"])
    found = compare.ratio(result["settings"], parts["fast_ft"], parts["unsloth-notebook"])
    assert found["ratio"] is None and says in "; ".join(found["refused"])
    assert f"not compared: {found['refused'][0]}" in table.markdown(result)


def test_figures_by_their_names(result: dict[str, Any]) -> None:
    result["setups"]["whole"]["fast_ft"]["steps"][0]["seconds"] += 1.0
    for name, speed in (("whole", 8460), ("t4class", 7740)):
        result["setups"][name]["fast_ft-unsloth"] = part(speed)
    found = compare.figures(result)
    epoch = 13 * 3000 / 9000
    assert {name: value for name, (value, _) in found.items()} == {
        "train.h200.unsloth_share": 0.94,
        "train.t4class.unsloth_share": 0.86,
        "train.h200.ceiling_share": round(9000 / (700e12 / 26.43e9), 3),
        "train.h200.first_over_third_epoch": round((epoch + 1) / epoch, 3),
        "train.h200.seconds_to_first_step": 11.5,
        "train.t4class.ceiling_share": round(9000 / (700e12 / 26.43e9), 3),
    }
    for name, (_, unit) in found.items():
        assert ("T4-class emulation, not a T4" in unit) == name.startswith("train.t4class."), name
    assert "T4-class emulation, not a T4" in table.markdown(result)


def test_a_sketch_keeps_the_cosine_of_gradients() -> None:
    import torch

    torch.manual_seed(0)
    a = {f"layers.{i}.lora_B.weight": torch.randn(64, 16) * (i + 1) for i in range(20)}
    b = {name: gradient + 0.12 * gradient.norm() / 32 * torch.randn(64, 16) for name, gradient in a.items()}
    flat = [torch.cat([each[name].flatten() for name in sorted(each)]) for each in (a, b)]
    exact = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    parts = [{"gradient": {"step": 1, "sketch": watch.sketch(each)}} for each in (a, b)]
    assert 0.98 < exact < 0.999
    assert compare.cosine(*parts) == pytest.approx(exact, abs=0.002)


def test_trained_pairs_do_not_depend_on_how_rows_are_laid_out() -> None:
    import torch

    ids = torch.tensor([[5, 6, 7, 8, 0], [1, 2, 3, 4, 9]])
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, -100, -100, 4, 9]])
    padded = watch.trained_pairs(ids[:, :-1], labels[:, 1:])
    flat_ids = torch.tensor([[1, 2, 3, 4, 9, 5, 6, 7, 8]])
    flat_labels = torch.tensor([[-100, -100, -100, 4, 9, -100, -100, 7, 8]])
    flat = watch.trained_pairs(flat_ids[:, :-1], flat_labels[:, 1:])
    assert watch.digest(padded) == watch.digest(flat) and len(padded) == 4
    unmasked = watch.trained_pairs(ids[:, :-1], ids[:, 1:])
    shifted = watch.trained_pairs(ids[:, :-1], labels[:, :-1])
    assert len({watch.digest(each) for each in (padded, unmasked, shifted)}) == 3


def test_projected_minutes_carry_the_word_and_their_error() -> None:
    words = {"train_verdict": "keeps to 10 min (projected, 17% off at worst)", "generate_verdict": "unsure (projected)"}
    done = {"how": "projected", "train_minutes": [5.0, 8.0], "generate_minutes": [1.0, 9.0], **words}
    found = {"errors": {"train": 0.166, "generate": 0.18}, "tflops": [14.2, 17.6], "recipes": {"simple": done}}
    shown = budget.markdown(found)
    assert "| simple | 5 to 8 | 10 | keeps to 10 min (projected, 17% off at worst) | 1 to 9 | 15 |" in shown
    assert "Projected minutes are no measurement" in shown and "within 17%" in shown
    assert budget.attempts(done) == [24, 34]


def here(job: dict[str, Any], log: Path, timeout: float, module: str = "bench.way") -> dict[str, Any]:
    """Run one job as training.run_way does, but in this process, where the libraries are imported already."""
    file = Path(job["out"]).with_suffix(".job.json")
    Path(job["work"]).mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(job | {"started": time.monotonic()}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, str(file)])
        assert importlib.import_module(module).main() == 0
    found: dict[str, Any] = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
    return found


@pytest.fixture(
    scope="module", params=["here", pytest.param("each way in a process of its own", marks=pytest.mark.soak)]
)
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """fast_ft and TRL + PEFT on 12 of the pocket's rows, through the command line."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = folder / "pocket.yaml"
    recipe.write_text(
        "model: {name_or_path: fast_ft/pocket/base, max_length: 256, backend: peft, dtype: float32}\n"
        "data: {train: fast_ft/pocket/train.json}\n"
        "select: {take: 12, deduplicate: none}\n"
        "train: {num_train_epochs: 10, learning_rate: 1e-3, warmup_steps: 3, optim: adamw_torch}\n"
    )
    arguments = [str(recipe), "--only", "fast_ft,trl-peft:18", "--results", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "here":
            patch.setattr(training, "run_way", here)
        assert bench.main(arguments) == 0
    yield folder, json.loads((folder / "pocket-train.json").read_text())


def test_a_way_is_a_process_whose_failure_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = {"way": "a way", "work": str(tmp_path / "work"), "out": str(tmp_path / "out.json")}
    Path(job["out"]).write_text('{"steps": []}')
    log = tmp_path / "logs" / "way.log"
    assert training.run_way(job, log, 60, module="this") == {"steps": []}
    assert "Beautiful is better than ugly" in log.read_text() and (tmp_path / "work").is_dir()
    assert training.run_way(job, log, 60, module="bench.none") is None
    assert training.run_way(job, log, 0, module="this") is None
    said = capfd.readouterr().err
    assert "a way failed (1)" in said and "No module named bench.none" in said and "nothing after 0 s" in said


@pytest.mark.pictures
def test_two_ways_do_the_same_work(real: tuple[Path, dict[str, Any]]) -> None:
    folder, result = real
    parts = result["setups"]["whole"]
    assert [len(parts[way]["steps"]) for way in ("fast_ft", "trl-peft")] == [20, 18]
    found = compare.ratio(result["settings"], parts["fast_ft"], parts["trl-peft"])
    assert found["refused"] == [] and found["cosine"] > 0.9999 and found["ratio"] > 0
    assert found["loss_drops"][0] > 0.1
    assert [step["supervised_tokens"] for step in parts["fast_ft"]["steps"][:18]] == [
        step["supervised_tokens"] for step in parts["trl-peft"]["steps"]
    ]
    stamps = [list(part["stamps"].values()) for part in parts.values()]
    assert all(each == sorted(each) for each in stamps)
    assert f"**{found['ratio']:.2f}** times" in (folder / "pocket-train.md").read_text()
    assert (folder / "pocket-train.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(("cosine", "agrees"), [(0.995, True), (0.985, False), (0.6, False), (-1.0, False)])
def test_a_way_whose_gradients_point_elsewhere_is_refused(
    real: tuple[Path, dict[str, Any]], cosine: float, agrees: bool
) -> None:
    """Two real ways did the same work. Then one's first gradient is turned, and nothing else: no ratio, no figure."""
    result = copy.deepcopy(real[1])
    parts = result["setups"]["whole"]
    assert compare.ratio(result["settings"], parts["fast_ft"], parts["trl-peft"])["refused"] == []
    gradient = parts["trl-peft"]["gradient"]
    draw, before = random.Random(5), parts["fast_ft"]["gradient"]["sketch"]
    other = [draw.gauss(0, 1) for _ in before]
    shared = sum(p * q for p, q in zip(other, before, strict=True)) / math.hypot(*before) ** 2
    other = [p - shared * q for p, q in zip(other, before, strict=True)]
    scale = (1 - cosine**2) ** 0.5 * math.hypot(*before) / math.hypot(*other)
    gradient["sketch"] = [cosine * q + scale * p for p, q in zip(other, before, strict=True)]
    found = compare.ratio(result["settings"], parts["fast_ft"], parts["trl-peft"])
    says = f"the first step's gradients: cosine {cosine:.4f}, under 0.99"
    assert found["refused"] == ([] if agrees else [says])
    assert (found["ratio"] is None) == (found["ratio_of_totals"] is None) == (not agrees)
    assert (f"not compared: {says}" in table.markdown(result)) == (not agrees)


def test_what_is_there_is_not_measured_again(
    real: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = real
    monkeypatch.setattr(training, "run_way", lambda *_, **__: pytest.fail("measured again"))
    assert bench.main([str(folder / "pocket.yaml"), "--only", "trl-peft:18", "--results", str(folder)]) == 0
    other = [str(folder / "pocket.yaml"), "lora.r=8", "--only", "trl-peft", "--results", str(folder)]
    assert bench.main(other) == 2  # another run's samples are not merged
    assert json.loads((folder / "pocket-train.json").read_text()) == result


def test_a_file_to_send_back_names_nobody(real: tuple[Path, dict[str, Any]]) -> None:
    folder, result = real
    spoilt = copy.deepcopy(result)
    spoilt["setups"]["whole"]["fast_ft"]["work"] = str(folder)
    (folder / "pocket-train.json").write_text(json.dumps(spoilt))
    path = submit_file.write("pocket", folder)
    text = path.read_text()
    (folder / "pocket-train.json").write_text(json.dumps(result))
    for private in (platform.node(), str(folder), str(Path.cwd()), str(Path.home()), f'"{getpass.getuser()}"'):
        assert private not in text, private
    sent = json.loads(text)
    assert compare.figures(sent) == compare.figures(result)


def test_received_files_have_a_column(tmp_path: Path, result: dict[str, Any]) -> None:
    result["settings"]["card"] = "Tesla T4"
    del result["setups"]["t4class"]
    (tmp_path / "one.json").write_text(json.dumps(result))
    entry = {"value": 4.6, "unit": "times", "card": "NVIDIA H200", "date": "2026-11-22", "commit": None}
    known = {"train.h200.seconds_to_first_step": entry, "train.t4class.seconds_to_first_step": entry}
    shown = figures.table(known, figures.received(tmp_path))
    _, _, real, emulated = shown.splitlines()
    assert real.endswith("| 11.5 (Tesla T4) |") and emulated.endswith("| 2026-11-22 | not recorded |  |  |")


def test_adopted_figures_are_those_of_the_samples(
    tmp_path: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures.json")
    path = tmp_path / "h200-train.json"
    measured = {"command": "python -m bench", "date": "2026-01-31T23:00:00+00:00", "commit": "0123abc"}
    result |= {"environment": {"gpu": {"name": "NVIDIA H200"}}, **measured}
    path.write_text(json.dumps(result))
    assert bench.main(["--adopt", str(path)]) == 0
    adopted = figures.read()
    assert {name: (each["value"], each["unit"]) for name, each in adopted.items()} == compare.figures(result)
    about = {(each["card"], each["source"], each["date"], each["commit"]) for each in adopted.values()}
    assert about == {("NVIDIA H200", "h200-train.json", "2026-01-31", "0123abc")}, "not the day of adoption"
    del result["setups"]["whole"]["fast_ft"], result["setups"]["t4class"]
    path.write_text(json.dumps(result))
    assert bench.main(["--adopt", str(path)]) == 2
    assert "nothing in it may become a figure" in capsys.readouterr().err


def test_a_result_names_the_commits_of_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, settings = tmp_path / "a-train.json", {"rows": 12}
    monkeypatch.setenv("BENCH_COMMIT", "aaa1")
    path.write_text(json.dumps(training.merged(path, settings, "one", kind="train")))
    assert training.merged(path, settings, "one", kind="train")["commit"] == "aaa1"
    monkeypatch.setenv("BENCH_COMMIT", "bbb2")
    later = training.merged(path, settings, "two", kind="train")
    assert (later["command"], later["commit"]) == ("one; two", "aaa1; bbb2")
    path.write_text(json.dumps({key: value for key, value in later.items() if key != "commit"}))
    assert training.merged(path, settings, "two", kind="train")["commit"] == "None; bbb2", (
        "a part's commit was not recorded"
    )


def test_the_judged_rows_are_the_first_hundred() -> None:
    recipe = load_recipe(bench.RECIPE)
    assert (recipe.select.take, recipe.select.where, recipe.select.rank_by) == (100, {}, {})
    assert (recipe.lora.r, recipe.model.dtype, recipe.train.neftune_noise_alpha) == (16, "float16", None)
    assert not recipe.curriculum.stages


@pytest.mark.parametrize("arguments", [["--only", "warp"], ["--only", "train:0"], ["--only", "fast_ft:x"]])
def test_unknown_parts_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    assert "is none of fast_ft, fast_ft-unsloth, unsloth-budget-kept" in capsys.readouterr().err


def test_nothing_to_send_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Measure first"):
        submit_file.write(None, tmp_path)
