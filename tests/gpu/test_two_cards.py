"""One recipe on one card and on two: the same losses and the same adapter, up to rounding.

Run on a machine with two NVIDIA GPUs: pytest -m gpu
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
STEPS = 20
#: How: model keys; the largest difference of a loss in nats, and of the adapter relative to its own norm. In fp32 sums
#: are added in another order. In fp16 each pass rounds to 2^-11, its matrix products' order depends on how many rows it
#: has, and AdamW's first steps are as large for a gradient of rounding errors as for another.
WAYS = {
    "peft, fp32": (["model.backend=peft", "model.dtype=float32"], 1e-4, 1e-2),
    "fused, fp16": (["model.backend=fused", "model.dtype=float16"], 1e-2, 0.1),
}


def cards() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(listed.stdout.splitlines())


def train(folder: Path, keys: list[str], launcher: list[str]) -> subprocess.Popen[str]:
    words = [
        sys.executable, *launcher, "-m", "fast_ft", "train", "recipes/quickstart.yaml", f"output_dir={folder}", *keys,
        "curriculum.stages=[]", f"train.max_steps={STEPS}", "train.optim=adamw_8bit",
    ]  # fmt: skip
    return subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.skipif(cards() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", WAYS)
def test_two_cards_train_what_one_does(way: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    keys, nats, relative = WAYS[way]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, launcher in ((one, []), (two, ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        process = train(folder, keys, launcher)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        assert "cannot be captured" not in errors
    assert json.loads((two / "plan.json").read_text())["world_size"] == 2
    pairs = list(zip(log(one), log(two), strict=True))
    assert len(pairs) == STEPS and all(a["tokens"] == b["tokens"] and a["skipped"] == b["skipped"] for a, b in pairs)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < nats
    left, right = (
        torch.cat([each.flatten() for each in load_file(folder / "adapter" / "adapter_model.safetensors").values()])
        for folder in (one, two)
    )
    assert (left - right).norm() < relative * left.norm()
    assert not [text for text in json.loads((two / "manifest.json").read_text())["notes"] if "not equal" in text]
