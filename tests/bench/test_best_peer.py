"""Peers at their best: which of a survey they are, what makes a figure, and a real survey and finals on a CPU."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import best_peer, compare, ours, peer_figures, process
from bench import way as way_module
from bench.__main__ import figures_of
from bench.peer_table import PEERS
from fast_ft.models.loaders.choose import Unavailable
from tests.bench.test_bench import LLAMA, part
from tests.helpers.parts import POCKET

COMMIT = "0123456789abcdef"
FASTEST, SECOND = "unsloth-budget-kept", "unsloth-packed-2048-kept"


def measured(way: str, speed: float, steps: int = 18, **more: Any) -> dict[str, Any]:
    found = part(speed, steps) | {"way": way, "commit": COMMIT, "packed": PEERS[way].packed if way in PEERS else None}
    for step in found["steps"]:
        step |= {"positions": 2990, "passes": 10}
    return found | more


def finished(way: str, speed: float, **more: Any) -> dict[str, Any]:
    return measured(way, speed, 39, **more)


@pytest.fixture
def result() -> dict[str, Any]:
    settings = {
        "card": "NVIDIA H200", "config": LLAMA, "tokens_per_step": [3000] * 65, "steps_per_epoch": 13,
        "schedule_steps": 65, "rows": 100, "effective_batch_size": 8,
    }  # fmt: skip
    survey = {way: measured(way, 1000.0, refused=[]) for way in PEERS}
    survey |= {FASTEST: measured(FASTEST, 4000.0, refused=[]), SECOND: measured(SECOND, 3000.0, refused=["other ids"])}
    survey["fast_ft"] = measured("fast_ft", 8000.0)
    survey["unsloth-8x1"] = {"way": "unsloth-8x1", "out_of_memory": True, "steps": []}
    survey["trl-liger"] = measured("trl-liger", 9000.0, refused=["the loss fell by 1 and 2"])
    finals = [
        finished(way, speed + run)
        for run in (-100, 100)
        for way, speed in (("fast_ft", 8000.0), ("fast_ft-unsloth", 6000.0), (FASTEST, 3000.0), (SECOND, 4000.0))
    ]
    whole = {"survey": survey, "finals": finals}
    return {
        "kind": "peers", "date": "2026-11-28T12:00:00", "environment": {"gpu": {"name": "NVIDIA H200"}},
        "settings": settings, "setups": {"whole": whole, "t4class": copy.deepcopy(whole)},
    }  # fmt: skip


def test_the_best_peer_is_the_fastest_of_the_finals(result: dict[str, Any]) -> None:
    """The survey chooses two. A way that packs has other batches and is one of them; other work is none."""
    assert peer_figures.best_two(result["settings"], result["setups"]["whole"]["survey"]) == [FASTEST, SECOND]
    found = figures_of(result)
    assert {name: value for name, (value, _) in found.items()} == {
        "train.h200.vs_best_peer": 2.0, "train.h200.unsloth_layers_vs_best_peer": 1.5,
        "train.h200.tokens_per_s": 8000.0, "train.h200.unsloth_layers_tokens_per_s": 6000.0,
        "train.t4class.vs_best_peer": 2.0, "train.t4class.unsloth_layers_vs_best_peer": 1.5,
        "train.h200.ceiling_share": round(8000 / (700e12 / 26.43e9), 3),
        "train.t4class.ceiling_share": round(8000 / (700e12 / 26.43e9), 3),
    }  # fmt: skip
    for name in ("train.h200.vs_best_peer", "train.t4class.vs_best_peer"):
        assert PEERS[SECOND].about in found[name][1], "with the peer's settings"
        assert ("not a T4" in found[name][1]) == (".t4class." in name)


def test_a_third_peer_that_was_faster_in_final_runs_is_the_best(result: dict[str, Any]) -> None:
    """A short run may misjudge a way that waits for the host; whoever had final runs counts."""
    result["setups"]["whole"]["finals"] += [finished("trl-padding-free", 5000.0) for _ in range(2)]
    value, unit = figures_of(result)["train.h200.vs_best_peer"]
    assert value == 1.6 and PEERS["trl-padding-free"].about in unit
    del result["setups"]["whole"]["finals"][-1]
    assert "trl-padding-free: 1 runs, 2 are needed" in peer_figures.problems(result, "whole")


def test_a_run_to_the_schedules_end_is_long_enough(result: dict[str, Any]) -> None:
    runs = [part for part in result["setups"]["whole"]["finals"] if part["way"] == SECOND]
    for index, run in enumerate(runs):
        run["steps"] = finished(SECOND, 4000.0)["steps"] + measured(SECOND, 5000.0 + index, 26)["steps"]
    assert peer_figures.problems(result, "whole") == []
    runs[0]["steps"].pop()
    assert f"{SECOND}: the rate of its last steps does not stand" in peer_figures.problems(result, "whole")


def no_survey(parts: dict[str, Any]) -> None:
    parts["survey"].clear()


def not_all_surveyed(parts: dict[str, Any]) -> None:
    del parts["survey"]["trl-liger-kept"]


def one_run(parts: dict[str, Any]) -> None:
    del parts["finals"][-1]


def another_peer(parts: dict[str, Any]) -> None:
    parts["survey"]["unsloth-budget"] = measured("unsloth-budget", 5000.0, refused=[])


def no_commit(parts: dict[str, Any]) -> None:
    parts["finals"][0]["commit"] = f"{COMMIT}+changes"


def still_warming(parts: dict[str, Any]) -> None:
    for step in parts["finals"][2]["steps"][:26]:
        step["seconds"] *= 1.2


def other_tokens(parts: dict[str, Any]) -> None:
    parts["finals"][2]["steps"][5]["digest"] = "other"


def out_of_memory(parts: dict[str, Any]) -> None:
    parts["finals"][2] = {"way": FASTEST, "commit": COMMIT, "out_of_memory": True, "steps": []}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_survey, "no best peer: no peer was surveyed"),
        (not_all_surveyed, "trl-liger-kept was not surveyed"),
        (one_run, f"{SECOND}: 1 runs, 2 are needed"),
        (another_peer, "unsloth-budget: 0 runs, 2 are needed"),
        (no_commit, "fast_ft: measured from no commit"),
        (still_warming, f"{FASTEST}: the rate of its last steps does not stand"),
        (other_tokens, f"{FASTEST}: trained token ids differ from step 6 on"),
        (out_of_memory, f"{FASTEST}: 1 runs, 2 are needed"),
    ],
)
def test_without_a_best_peer_there_is_no_headline(result: dict[str, Any], spoil: Any, says: str) -> None:
    spoil(result["setups"]["whole"])
    assert says in peer_figures.problems(result, "whole")
    found = figures_of(result)
    assert "train.h200.vs_best_peer" not in found and "train.t4class.vs_best_peer" in found
    # a fault of our own blocks' run stands against their figure alone
    assert ("train.h200.unsloth_layers_vs_best_peer" in found) == (spoil is no_commit)
    assert f"No figure: {says}." in peer_figures.markdown(result)
    if spoil is not no_survey:
        assert "These are no figures yet" in peer_figures.readme(result)


def test_an_emulation_may_leave_out_what_names_its_reason(result: dict[str, Any]) -> None:
    survey = result["setups"]["t4class"]["survey"]
    left_out = [way for way, peer in PEERS.items() if peer.not_emulated]
    assert left_out and not {FASTEST, SECOND} & set(left_out)
    for way in left_out:
        del survey[way]
    assert peer_figures.problems(result, "t4class") == []
    del survey["trl-liger-kept"]
    assert peer_figures.problems(result, "t4class") == ["trl-liger-kept was not surveyed"]


def test_tables_hold_every_setting_and_its_rate(result: dict[str, Any]) -> None:
    shown, first = peer_figures.markdown(result), peer_figures.readme(result)
    for way, peer in PEERS.items():
        assert f"| {way} |" in shown and peer.about in shown
    assert "| unsloth-8x1 | out of memory |" in shown and "3,100 and 2,900" not in shown
    assert "| 4,000 | 2,900 and 3,100 |" in shown
    assert "| fast_ft, own blocks | 8,000 |" in first and "| fast_ft, Unsloth's layers | 6,000 | 1.33 times" in first
    assert f"| {PEERS['unsloth-notebook'].about} | 1,000 (one short run) | 8.00 times as fast |" in first
    assert "is kept yet" in peer_figures.readme(None) and "no figures" not in first
    del result["setups"]["t4class"], result["setups"]["whole"]["survey"]["trl-liger-kept"]
    result["setups"]["whole"] |= {"finals": []}
    once = peer_figures.readme(result)
    assert f"| {PEERS[FASTEST].about} | 4,000 (one short run) | 2.00 times as fast |" in once
    assert "is kept yet" not in once
    assert f"no figures yet: 1 of {len(PEERS)} settings were not tried" in once and "T4-class" not in once
    for way in peer_figures.KINDS:
        survey = {name: found for name, found in result["setups"]["whole"]["survey"].items() if name != way}
        partial = result | {"setups": {"whole": {"survey": survey, "finals": []}}}
        assert peer_figures.readme(partial) == peer_figures.readme(None), "one kind of peer was not tried"


def test_a_rate_stands_where_an_epoch_repeats_the_one_before() -> None:
    settings = {"steps_per_epoch": 13, "tokens_per_step": [3000] * 39}
    steady, warming = part(1000, 39), part(1000, 39)
    for index, step in enumerate(warming["steps"]):
        step["seconds"] *= 1.0 + 0.5 * (39 - index) / 39
    ends = {
        n: compare.stands_by_epochs(settings, steady | {"steps": steady["steps"][:n]}) for n in (13, 25, 26, 27, 39)
    }
    assert ends == {13: False, 25: False, 26: True, 27: False, 39: True}
    assert not compare.stands_by_epochs(settings, warming)
    assert compare.stands(settings, steady) and not compare.stands(settings, warming)
    assert not compare.stands(settings, part(1000, 17)), "too few steps"
    assert compare.stands(settings, part(1000, 18))


def test_packed_rows_count_by_what_passed_through_the_model() -> None:
    way = measured(SECOND, 1000.0)
    assert compare.step_tokens({"tokens_per_step": [1] * 39}, way) == [3000] * 18
    assert compare.step_tokens({"tokens_per_step": [1] * 39}, way | {"packed": None}) == [1] * 18


class TurnHere(best_peer.Turn):
    """A turn in this process, where the libraries are imported already."""

    def __enter__(self) -> TurnHere:
        self._file.write_text(json.dumps(self._job | {"started": time.monotonic()}), encoding="utf-8")
        self._process = self._file  # type: ignore[assignment]
        self.log.parent.mkdir(exist_ok=True)
        self.log.write_text("its last line")
        return self

    def wait_at(self, *gates: str) -> None:
        """It stands at each gate."""

    def __exit__(self, *_: object) -> None:
        """Nothing runs."""


def way_here(file: Any, timeout: float) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.way", str(file)])
        try:
            return way_module.main()
        except Unavailable:
            return 1


@pytest.mark.parametrize("where", ["here", pytest.param("in processes", marks=pytest.mark.soak)])
def test_a_survey_and_its_finals_on_a_cpu(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's padding-free batches, without FlashAttention, give the gradients of padded ones: rows do not see others."""
    recipe, rows, results = (tmp_path / name for name in ("pocket.yaml", "rows.json", "peers.json"))
    rows.write_text(json.dumps(json.loads((POCKET.parent / "train.json").read_text(encoding="utf-8"))[:40]))
    recipe.write_text(
        "model: {name_or_path: fast_ft/pocket/base, max_length: 256, backend: peft, dtype: float32}\n"
        f"data: {{train: {rows}}}\n"
        "select: {take: 12, deduplicate: none}\n"
        "train: {num_train_epochs: 4, learning_rate: 1e-3, warmup_steps: 3, optim: adamw_torch}\n"
    )
    monkeypatch.setenv("BENCH_COMMIT", COMMIT)
    monkeypatch.setattr(best_peer, "SURVEY_STEPS", 8)
    monkeypatch.setattr(best_peer, "SURVEY_SECONDS", 600.0)  # all steps, however busy this machine is
    if where == "here":
        monkeypatch.setattr(best_peer, "Turn", TurnHere)
        monkeypatch.setattr(process, "wait", way_here)
    ways = "fast_ft,trl-padding-free-kept,trl-8x1"
    assert best_peer.main(["survey", str(recipe), "--results", str(results), "--ways", ways]) == 0
    survey = json.loads(results.read_text())["setups"]["whole"]["survey"]
    assert set(survey) == set(ways.split(",")) and all(found["refused"] == [] for found in survey.values())
    assert survey["trl-padding-free-kept"]["cosine"] > 0.9999
    assert all(step["flat"] for step in survey["trl-padding-free-kept"]["steps"])
    assert not survey["trl-8x1"]["steps"][0]["flat"]
    assert {found["commit"] for found in survey.values()} == {COMMIT}
    assert best_peer.main(["finals", str(recipe), "--results", str(results), "--steps", "2"]) in (0, 2)
    finals = json.loads(results.read_text())["setups"]["whole"]["finals"]
    best = peer_figures.best_two(json.loads(results.read_text())["settings"], survey)
    assert [each["way"] for each in finals] == [*ours.WAYS, *best] * 2 and len(finals[0]["steps"]) == 2
    assert finals[1]["failed"].startswith("1: "), "a way that fails leaves the others to run"
    assert {found["settings"]["rows"] for found in survey.values()} == {12}, "at most 24"
    assert figures_of(json.loads(results.read_text())) == {}, "no figure of so few steps"
    assert best_peer.main(["survey", str(recipe), "--results", str(results), "--ways", "none"]) == 2
    other = ["finals", str(recipe), "lora.r=8", "--results", str(tmp_path / "other.json")]
    assert best_peer.main(other) == 2, "finals without a survey"


def test_results_of_two_calls_become_one(tmp_path: Path, result: dict[str, Any]) -> None:
    whole, emulated, both = (tmp_path / f"{name}.json" for name in ("whole", "emulated", "both"))
    for path, name, commit in ((whole, "whole", "aaaaaaa"), (emulated, "t4class", "bbbbbbb")):
        one = result | {"setups": {name: result["setups"][name]}, "command": f"python -m {name}", "commit": commit}
        path.write_text(json.dumps(one))
    for path in (whole, emulated, emulated):
        assert best_peer.main(["merge", str(path), "--results", str(both)]) == 0
    merged = json.loads(both.read_text())
    assert merged["setups"] == result["setups"], "and nothing twice"
    assert (merged["commit"], merged["command"]) == ("aaaaaaa; bbbbbbb", "python -m whole; python -m t4class")
    emulated.write_text(json.dumps(result | {"settings": result["settings"] | {"rows": 99}}))
    assert best_peer.main(["merge", str(emulated), "--results", str(both)]) == 2
    assert json.loads(both.read_text()) == merged
