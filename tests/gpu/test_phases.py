"""Memory between the phases of a run on a card: what training took is given back before the base is loaded again.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_phases.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "fast_ft" / "pocket"
MIB = 2**20

# A process of its own: whatever other tests hold is not counted.
RUN = """
import json, sys
from unittest import mock
import torch, transformers
from fast_ft.pipeline import adapter_loading
from fast_ft.recipe.loader import validated
from fast_ft.pipeline.run import run
before, load = [], transformers.AutoModelForCausalLM.from_pretrained
def loads(*given, **named):
    before.append(torch.cuda.memory_allocated())
    model = load(*given, **named)
    before.append(torch.cuda.memory_allocated())
    return model
transformers.AutoModelForCausalLM.from_pretrained = loads
with mock.patch.object(adapter_loading, "_compile_ahead", lambda *_: None):  # a thread that takes memory meanwhile
    folder = run(validated(json.loads(sys.argv[1]), {}, "test"), "test.yaml")
torch._C._cuda_clearCublasWorkspaces()  # what is left besides is ours
print(json.dumps({"allocated": before, "end": torch.cuda.memory_allocated()}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base whose 4-bit weights, some 50 MiB, are told from what libraries keep."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models") / "wide"
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    for path in (POCKET / "base").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def ran(base: Path, folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a recipe; return what was allocated at its loads and at its end, and the manifest's phases."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(base), "max_length": 256, "dtype": "float16"},
        "data": {"train": str(POCKET / "train.json"), "test": str(POCKET / "test.json")},
        "select": {"take": 16},
        "train": {"effective_batch_size": 8, "warmup_steps": 0, "neftune_noise_alpha": 5},
        "generate": {"do_sample": False, "max_new_tokens": 16},
        "judge": {"kind": "none", "base_prompts": 2},
    }
    tree["model"] |= changes
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", RUN, json.dumps(tree)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    phases = json.loads((folder / "run" / "manifest.json").read_text())["phases"]
    assert "out of memory" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]), phases


@pytest.mark.parametrize("backend", ["fused", "peft"])
def test_answering_begins_with_an_empty_card(base: Path, tmp_path: Path, backend: str) -> None:
    found, phases = ran(base, tmp_path, backend=backend)
    first, trained, again, loaded = found["allocated"]
    assert phases["train"]["backend"] == backend
    assert trained - first > 30 * MIB and loaded - again > 30 * MIB, "the model is large enough to be missed"
    assert again - first < 4 * MIB, "before the base is loaded for the answers"
    assert found["end"] - first < 4 * MIB, "after the answers"


def test_the_planned_pool_is_the_pool_and_fixed_seconds_are_few(base: Path, tmp_path: Path) -> None:
    """The second run of two finds its kernels compiled."""
    for name in ("one", "two"):
        _, phases = ran(base, tmp_path / name, backend="fused")
        answering = phases["generate"]
        planned = json.loads((tmp_path / name / "run" / "plan.json").read_text())
        assert answering["batch_size"] == min(planned["generation_batch"], answering["answers"])
        assert answering["cache_tokens"] == planned["cache_tokens"] // 16 * 16
        parts = answering["seconds_by"]
        # captures cost no seconds of their own: the card computes meanwhile
        assert {"loading", "set_up", "checks", "prefill", "steps"} <= parts.keys() and parts.get("captures", 0) < 0.2
        assert abs(sum(parts.values()) - answering["seconds"]) < 0.1
        print(name, parts)
    fixed = sum(seconds for part, seconds in parts.items() if part not in ("loading", "prefill", "steps"))
    assert fixed <= 2, parts
