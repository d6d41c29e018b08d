"""The small model's whole run on a GPU, through each backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("backend", "dtype"), [("fused", "bfloat16"), ("unsloth", "float16")])
def test_a_run_ends_with_adapter_and_answers(backend: str, dtype: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fast_ft", "recipes/quickstart.yaml", f"model.backend={backend}", f"model.dtype={dtype}",
        f"output_dir={tmp_path}/run", "generate.max_new_tokens=24", "train.optim=adamw_8bit",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["phases"]["train"]["backend"] == backend
    assert manifest["phases"]["train"]["last_loss"] < 0.7 * manifest["phases"]["train"]["first_loss"]
    pred = json.loads((tmp_path / "run" / "pred.json").read_text())
    prompts = json.loads((ROOT / "fast_ft/pocket/test.json").read_text())
    assert list(pred) == [row["id"] for row in prompts]
    assert all(entry["output"][0] for entry in pred.values())


@pytest.mark.parametrize("backend", ["fused", "peft"])
def test_the_same_bits_under_deterministic(backend: str, tmp_path: Path) -> None:
    adapters = []
    for name in ("one", "two"):
        command = [
            sys.executable, "-m", "fast_ft", "train", "recipes/quickstart.yaml", f"model.backend={backend}",
            "train.deterministic=true", f"output_dir={tmp_path}/{name}", "train.optim=adamw_8bit", "train.max_steps=30",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    def losses(name: str, *words: str) -> list[float]:
        command = [
            sys.executable, "-m", "fast_ft", "recipes/quickstart.yaml", f"output_dir={tmp_path}/{name}",
            "train.save_steps=10", "judge.kind=none", "judge.base_prompts=0", "generate.max_new_tokens=4", *words,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in log]

    whole = losses("whole")
    assert len(losses("stopped", "--stop-after", "25")) == 25
    assert losses("stopped") == pytest.approx(whole, abs=1e-3)
