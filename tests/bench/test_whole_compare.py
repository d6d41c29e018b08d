"""Whole commands beside a peer's: figures from given samples, how a command is timed, and a peer's command for real."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import emulation, peer_command, watch, whole_compare
from bench.__main__ import figures_of
from fast_ft.common.errors import InputError
from tests.helpers.patience import PATIENCE


def result(*runs: tuple[str, str, float]) -> dict[str, Any]:
    """A result of these runs: way, turn, seconds to pred.json."""
    return {
        "kind": "whole", "environment": {"gpu": {"name": "NVIDIA H200"}}, "limit": 64,
        "peers": {"one": "Unsloth, so", "two": "Unsloth, other"}, "settings": {"schedule_steps": 26},
        "runs": [{"way": way, "turn": turn, "pred_seconds": s, "answers": 150} for way, turn, s in runs],
    }  # fmt: skip


def test_a_peers_time_over_ours_the_first_and_the_second_time() -> None:
    given = result(
        ("fast_ft", "cold", 40.0), ("fast_ft", "warm", 28.0), ("fast_ft-unsloth", "cold", 80.0),
        ("fast_ft-unsloth", "warm", 60.0), ("one", "cold", 100.0), ("one", "warm", 95.0), ("two", "cold", 120.0),
        ("two", "warm", 90.0), ("fast_ft", "warm", 32.0),
    )  # fmt: skip
    found = figures_of(given)
    assert {name: value for name, (value, _) in found.items()} == {
        "run.h200.vs_best_peer_cold": 2.5, "run.h200.vs_best_peer": 3.0,
        "run.h200.unsloth_layers_vs_best_peer_cold": 1.25, "run.h200.unsloth_layers_vs_best_peer": 1.5,
    }  # fmt: skip
    assert "one (Unsloth, so), the fastest of 2 peers" in found["run.h200.vs_best_peer_cold"][1]
    assert "two (Unsloth, other), the fastest of 2 peers" in found["run.h200.vs_best_peer"][1]
    assert "26 steps and 150 answers" in found["run.h200.vs_best_peer"][1]
    assert set(figures_of(result(("fast_ft", "cold", 1.0), ("one", "cold", 2.0)))) == {"run.h200.vs_best_peer_cold"}
    assert figures_of(result(("fast_ft", "cold", 1.0))) == {}


def test_a_command_is_timed_to_its_adapter_and_to_its_answers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "import json, os, pathlib, sys; out = pathlib.Path(sys.argv[1]); (out / 'adapter').mkdir(parents=True); "
        "(out / 'adapter' / 'adapter_model.safetensors').write_bytes(b''); "
        "(out / 'pred.json').write_text(json.dumps({'a': os.environ['WHERE']}))"
    )
    found = whole_compare.timed([sys.executable, "-c", code, str(folder)], folder, tmp_path / "log", {"WHERE": "x"})
    assert 0 <= found["adapter_seconds"] <= found["pred_seconds"] <= found["seconds"] + 0.1 and found["answers"] == 1
    assert json.loads((folder / "pred.json").read_text()) == {"a": "x"}
    with pytest.raises(InputError, match=r"ended with status 3; .*log ends with"):
        whole_compare.timed([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "none", tmp_path / "log", {})


def test_waiting_for_the_card_counts_nowhere(tmp_path: Path) -> None:
    way = tmp_path / "way"
    limits, began = emulation.Limits(0, None, t4_attention=False, turn=str(way)), time.monotonic()
    seen, waited = watch.Watch(began), 0.0

    def timed(wait: Callable[[], None]) -> None:
        nonlocal waited
        waits = time.monotonic()
        wait()
        waited += time.monotonic() - waits

    for gate, wait in (("load", limits.may_load), ("turn", limits.take_turn)):
        opened = tmp_path / f"way.{gate}"
        threading.Timer(0.2, opened.touch).start()
        seen.leave_out(functools.partial(timed, wait))
        assert opened.exists() and (tmp_path / f"way.at-{gate}").exists()
    stamp = seen.stamp("imported")
    assert waited > 0.3 and stamp <= time.monotonic() - began - waited
    emulation.Limits(0, None, t4_attention=False).take_turn()


def test_a_peer_trains_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(Path("fast_ft/pocket/base").resolve())
    rows = [{"input_ids": [1, 5 + index, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]} for index in range(8)]
    job = {
        "way": "trl-padding-free-kept", "work": str(tmp_path), "cap_gib": 0, "base": base, "tokenizer": base,
        "rows": rows, "adapter": None, "lora": {"r": 2, "lora_alpha": 4}, "dtype": "float32", "steps": 1,
        "stop_after": 1, "seed": 1, "max_length": 64, "unwatched": True, "limit": 3, "answers_at_once": 2,
        "prompts": {"a": [1, 5], "b": [1, 6, 7], "c": [1, 8]},
        "train": {
            "num_train_epochs": 1, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 0,
            "weight_decay": 0.0, "max_grad_norm": 1.0, "optim": "adamw_torch",
        },
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr(sys, "argv", ["bench.peer_command", str(tmp_path / "job.json")])
    assert peer_command.main() == 0
    answers = json.loads((tmp_path / "pred.json").read_text())
    assert set(answers) == {"a", "b", "c"} and all(isinstance(text, str) for text in answers.values())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_card_is_locked_while_a_way_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock that GPU_LOCK names keeps other programs' timings apart from ours; models load while nobody measures."""
    monkeypatch.setenv("GPU_LOCK", str(tmp_path / "lock"))
    first, second, loading = (emulation.Limits(0, None, t4_attention=False) for _ in range(3))
    first.may_load()
    loading.may_load()
    for before, asks in ((loading, first.take_turn), (first, second.take_turn), (second, loading.may_load)):
        waiting = threading.Thread(target=asks)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        before.end_turn()
        waiting.join(PATIENCE)
        assert not waiting.is_alive()
    loading.end_turn()


def test_a_batch_that_runs_out_of_memory_is_answered_in_halves() -> None:
    import torch

    sizes: list[int] = []

    def generate(ids: list[list[int]]) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) * max(map(len, ids)) > 6:
            raise torch.OutOfMemoryError("no room")
        longest = max(map(len, ids))
        return torch.tensor([[0] * (longest - len(row)) + row + [row[0] * 10, row[0] * 10 + 1] for row in ids])

    rows = [[1], [2, 2], [3, 3], [4, 4, 4], [5, 5, 5]]
    assert peer_command.answered(generate, rows) == [[number * 10, number * 10 + 1] for number in range(1, 6)]
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        peer_command.answered(generate, [[1] * 7])
