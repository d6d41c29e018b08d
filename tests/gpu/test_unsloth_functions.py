"""One training pass through `backend: unsloth` on a card: each part of each layer is Unsloth's, and none is ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fast_ft.models.loaders.unsloth import FUNCTIONS

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
NODES = ("LoRA_QKV", "LoRA_W", "LoRA_MLP", "Fast_RMS_Layernorm", "Fast_RoPE_Embedding")


@pytest.mark.parametrize("recipe", ["recipes/quickstart.yaml"])
def test_every_part_of_every_layer_is_unsloths(recipe: str) -> None:
    command = [sys.executable, "-m", "bench.step_trace", recipe, "model.backend=unsloth", "model.dtype=float16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["way"] == "unsloth"
    layers, forward = found["layers"], found["forward"]
    for part, function in FUNCTIONS.items():
        calls = forward.get(function, 0)
        assert calls == (2 * layers + 1 if part == "norms" else layers), (part, calls, forward)
    theirs = [name for name in forward if name.startswith("peft.") and name.endswith(".forward")]
    assert not any("fused_block.block" in name for name in forward) and not theirs, forward
    for node in NODES:
        assert any(name.startswith(node) for name in found["backward"]), (node, found["backward"])
    assert not any("BlockPass" in name for name in found["backward"])
