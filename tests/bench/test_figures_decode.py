"""bench.decode from command to figures, on a small model; and its figures from given samples."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import decode, decode_figures, decode_long, decode_measures, random_gguf
from bench.__main__ import figures_of
from bench.decode_subject import Subject
from fast_ft.generate.engine.cuda_graphs import Graphs
from fast_ft.generate.engine.model_runner import ModelRunner
from tests.helpers.parts import save_random_llama

RUN = {
    "tokens": 1000, "seconds": 0.25, "steps": 10, "burst_seconds": 0.2, "weight_bytes": 4_280_000_000,
    "cells_read": 100_000, "bytes_a_cell": 428_000, "peak_gib": 14.5,
}  # fmt: skip


def result(*measurements: dict[str, Any], sms: int | None = None, card: str = "NVIDIA H200") -> dict[str, Any]:
    environment = {"gpu": {"name": card} if card else None}
    return {
        "kind": "decode", "environment": environment, "settings": {"sms": sms}, "measurements": list(measurements),
    }  # fmt: skip


def test_figures_follow_from_the_samples() -> None:
    given = result(
        {"name": "fixed", **RUN}, {"name": "fixed", **RUN, "seconds": 0.2, "peak_gib": 14.6},
        {"name": "fixed", **RUN, "seconds": 1.0}, {"name": "plain", "tokens": 100, "seconds": 0.5},
        {"name": "plain", "tokens": 100, "seconds": 0.25}, {"name": "plain", "out_of_memory": True, "batch": 150},
        {"name": "mixed", "refill": True, "shrinks": True, "tokens": 900, "seconds": 0.3},
        {"name": "mixed", "refill": False, "shrinks": False, "tokens": 900, "seconds": 0.6},
        {"name": "mixed", "refill": False, "shrinks": True, "tokens": 900, "seconds": 0.45},
        {"name": "mixed", "refill": True, "shrinks": True, "draw": 1, "tokens": 900, "seconds": 0.25},
        {"name": "unsloth", "tokens": 100, "seconds": 4.0}, {"name": "steps", "ms_a_step": 3},
        {"name": "before", **RUN, "seconds": 0.5}, {"name": "products", "rows": 64, "milliseconds": 2.5},
        {"name": "steady", "kv_cache": "16bit", "tokens": 900, "seconds": 0.6},
        {"name": "steady", "kv_cache": "8bit", "tokens": 900, "seconds": 0.3},
        {"name": "long", "kv_cache": "16bit", "tokens": 900, "seconds": 0.6},
        {"name": "long", "kv_cache": "8bit", "tokens": 900, "seconds": 0.4},
    )  # fmt: skip
    found = {name: value for name, (value, _) in figures_of(given).items()}
    assert found == {
        "decode.h200.tokens_per_s": 4000.0,  # the median of three
        "decode.h200.peak_gib": 14.6,
        "decode.h200.floor_share": 0.1,  # 10 ms of weights and 10 ms of cells in 200 ms
        "decode.h200.vs_generate": 10.0,
        "decode.h200.mixed_over_fixed": 0.825,  # the mean of two draws
        "decode.h200.gain": 2.0,
        "decode.h200.products_ms": 2.5,
        "decode.h200.long_gain": 1.5,
        "decode.h200.long_gain_steady": 2.0,
        "decode.h200.refill_gain": 2.0,
        "decode.h200.refill_gain_shrinking": 1.5,
    }


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100"), ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla V100-SXM2-16GB", "v100"), ("NVIDIA L4", "l4"), ("", "cpu"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-mig-1g-10gb"),
    ],
)  # fmt: skip
def test_figures_are_named_after_the_card_that_was_there(card: str, name: str) -> None:
    rates = {"name": "rates", "tflops": 1.0, "gb_per_s": 2140.0}
    found = figures_of(result(rates, {"name": "fixed", **RUN}, card=card))
    assert set(found) == {f"decode.{name}.tokens_per_s", f"decode.{name}.peak_gib", f"decode.{name}.floor_share"}
    assert found[f"decode.{name}.floor_share"][0] == 0.2, "by the memory's speed as it was measured there"
    unknown = figures_of(result({"name": "fixed", **RUN}, card=card))
    assert (f"decode.{name}.floor_share" in unknown) == (name == "h200"), "no other card is taken for an H200"


def test_what_was_not_measured_or_failed_makes_no_figure() -> None:
    assert figures_of(result()) == {}
    some = result({"name": "fixed", **RUN}, {"name": "unsloth", "failed": "no such package"})
    assert set(decode_figures.figures(some)) == {
        "decode.h200.tokens_per_s", "decode.h200.peak_gib", "decode.h200.floor_share",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("launched", "replayed", "counts"),
    [(55.0, 54.0, True), (55.0, 60.0, True), (55.0, 700.0, False), (700.0, 700.0, False)],
)
def test_an_emulation_counts_where_its_limit_holds_in_replay(launched: float, replayed: float, counts: bool) -> None:
    runs = ({"name": "fixed", **RUN}, {"name": "plain", "tokens": 100, "seconds": 0.2})
    card = {"whole_card_tflops": 743.0, "sms_of_card": 132, "sms_got": 8}
    limit = {"name": "sm_limit", "launched_tflops": launched, "replayed_tflops": replayed} | card
    found = decode_figures.figures(result(limit, *runs, sms=8))
    assert set(found) == ({"decode.t4class.vs_generate"} if counts else set())
    for value, unit in found.values():
        assert value == 8.0 and "T4-class emulation, not a T4" in unit
    assert decode_figures.figures(result(*runs, sms=8)) == {}


def test_a_run_on_a_small_model_becomes_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_random_llama(tmp_path / "base")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": str(i), "instruction": "word " * (3 + i)} for i in range(6)]))
    arguments = [
        "--base", str(base), "--prompts", str(prompts), "--results", str(tmp_path / "out.json"), "--random",
        "--draws", "2", "--only", "fixed,plain,mixed,unsloth,long,steady,products",
        "--limit", "4", "--repeat", "2", "--batches", "3,6", "--cap", "0",
        "--dtype", "float32",
    ]  # fmt: skip
    monkeypatch.setattr(decode_measures, "MEAN", 8)
    monkeypatch.setattr(decode_measures, "LONGEST", 24)
    monkeypatch.setattr(decode_long, "LONG", 48)
    monkeypatch.setattr(sys, "argv", ["bench.decode", *arguments])
    assert decode.main() == 0
    made = json.loads((tmp_path / "out.json").read_text())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert made["measurements"] == lines
    names = [*["fixed"] * 2, *["plain"] * 2, *["mixed"] * 4, "unsloth", *["long"] * 2, *["steady"] * 2, "products"]
    assert [each["name"] for each in lines] == names
    fixed = lines[0]
    assert fixed["tokens"] == 24 and fixed["cells_read"] == sum(4 * n + 6 for n in made["settings"]["prompt_tokens"])
    assert sum(count for count, _ in fixed["steps_by_slots"].values()) == fixed["steps"] == 3
    refilled, still, shrinking, other = (each for each in lines if each["name"] == "mixed")
    assert (refilled["draw"], other["draw"]) == (0, 1)
    wide, narrow = (each for each in lines if each["name"] == "long")
    assert wide["tokens"] == narrow["tokens"] == 6 * 48
    assert narrow["bytes_a_cell"] < wide["bytes_a_cell"]
    assert refilled["tokens"] == still["tokens"] == shrinking["tokens"] == pytest.approx(6 * 8, abs=3)
    assert max(each["steps"] for each in (refilled, still, shrinking)) < 60, "answers end at their forced lengths"
    assert refilled["cells_read"] == still["cells_read"] == shrinking["cells_read"], "the same work"
    assert set(figures_of(made)) >= {
        "decode.cpu.tokens_per_s", "decode.cpu.vs_generate", "decode.cpu.mixed_over_fixed", "decode.cpu.refill_gain",
        "decode.cpu.refill_gain_shrinking", "decode.cpu.long_gain", "decode.cpu.products_ms",
    }  # fmt: skip
    assert made["command"].startswith("python -m bench.decode --base ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*", made["date"]) and made["cores"] >= 1


def peer(name: str, speed: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "tokens": 1000, "seconds": 1000 / speed, "tokens_per_s": speed, "batch": 48, **more}


def test_the_best_peer_of_answering_is_the_best_setting_of_all_that_were_tried() -> None:
    llama = [peer("llama.cpp", speed, cache="q8_0", batch=96) for speed in (900, 1100)]
    tried = [
        {"name": "fixed", **RUN}, {"name": "fixed", **RUN}, peer("plain", 400), peer("static", 300), *llama,
        peer("llama.cpp", 800, cache="f16"), peer("llama.cpp", 800, cache="f16"), {"name": "unsloth", "failed": "so"},
    ]  # fmt: skip
    assert "decode.h200.vs_best_peer" not in figures_of(result(*tried)), "one peer was not tried"
    assert all("kept yet" in decode_figures.readme(each) for each in (None, result(*tried)))
    whole = result(*tried, {"name": "compiled", "failed": "no"})
    value, unit = figures_of(whole)["decode.h200.vs_best_peer"]
    assert value == 4.0 and unit.endswith("llama.cpp, Q4_K_M without LoRA, q8_0 cache, 96 at once")
    shown = decode_figures.readme(whole)
    assert "| fast_ft | 4,000 | |" in shown and "| transformers' generate, 48 at once | 400 | 10.0 times" in shown
    assert "f16" not in shown, "each library in its best setting"
    every = decode_figures.markdown(whole | {"date": "2026-11-28T12:00"})
    assert "| llama.cpp, Q4_K_M without LoRA, f16 cache, 48 at once | 800 and 800 |" in every and "2026-11-28" in every
    assert "kept yet" in decode_figures.markdown(None)
    once = result(*[each for each in whole["measurements"] if each != llama[0]])
    assert "decode.h200.vs_best_peer" not in figures_of(once), "the best ran once"


def test_a_random_model_for_llama_cpp_has_the_shape_and_types_of_q4_k_m(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    }  # fmt: skip
    random_gguf.write(tmp_path / "a.gguf", config)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(kinds) == 3 + 9 * 8 and kinds["output.weight"] == "Q6_K" and kinds["token_embd.weight"] == "Q4_K"
    wide = [layer for layer in range(8) if kinds[f"blk.{layer}.ffn_down.weight"] == "Q6_K"]
    assert wide == [layer for layer in range(8) if random_gguf.more_bits(layer, 8)] == [0, 3, 6, 7]
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert abs(values).max() <= 1.0 and values.size == tensor.n_elements, tensor.name


def test_a_runner_counts_captures_apart_and_takes_as_many_steps() -> None:
    runner, made = object.__new__(ModelRunner), list[str]()

    def step(slots: int, columns: int) -> None:
        made.append("step")

    def capture(work: Any) -> tuple[Any, None]:
        return SimpleNamespace(replay=lambda: made.append("replay")), None

    def captures() -> float:
        return graphs.watch.seconds()["captures"]

    graphs = Graphs(works=True)
    vars(graphs).update(capture=capture)
    vars(runner).update(graphs=graphs, _captured={}, _step=step)
    for count in (8, 5):
        runner._run_steps(16, 256, count)
    first = captures()
    assert made == ["step"] + ["replay"] * 12 and first > 0
    runner._run_steps(16, 256, 3)
    assert captures() == first, "a shape is captured once"
    runner._run_steps(8, 256, 1)
    assert made[-1] == "step" and captures() > first


def test_a_step_that_cannot_be_captured_ahead_is_not_tried_at_each_burst() -> None:
    runner, tried = object.__new__(ModelRunner), list[int]()
    graphs = SimpleNamespace(capture_ahead=lambda work: tried.append(1))
    model = SimpleNamespace(ops=SimpleNamespace(COLUMNS=0))
    vars(runner).update(graphs=graphs, model=model, _captured={(8, 0): None}, _foreseen=set())
    for slots in (16, 16, None, 8, 24, 16):
        runner._capture_ahead(slots)
    assert tried == [1, 1], "16 and 24 slots, once each; 8 were captured before"
    assert set(runner._captured) == {(8, 0)}


def test_out_of_memory_takes_an_eighth_of_the_cache_and_tries_again() -> None:
    import torch

    subject, tried = SimpleNamespace(room=1.0), list[float]()

    def work(fits: float) -> dict[str, Any]:
        tried.append(subject.room)
        if subject.room > fits:
            raise torch.OutOfMemoryError
        return {"tokens": 5}

    assert Subject.with_room(subject, work, 0.8) == {"tokens": 5} and subject.room == 49 / 64  # type: ignore[arg-type]
    assert Subject.with_room(subject, work, 0.0) == {"out_of_memory": True}  # type: ignore[arg-type]
    assert tried[:3] == [1.0, 7 / 8, 49 / 64] and len(tried) == 7
