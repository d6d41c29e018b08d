"""Own blocks and the own engine on a card, by family: true widths, few layers, rows longer than the window.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_families.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_ft.models.random_base import SHAPES, write_base

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
POCKET = ROOT / "fast_ft" / "pocket"
WINDOW = 24

#: Compares the kernels that know a window with plain torch on a CPU, forward and backward.
ATTENTION = """
import torch
from fast_ft.models import packed_attention
torch.manual_seed(0)
starts = torch.tensor([0, 5, 205, 300], dtype=torch.int32)
for kv_heads in (8, 2):
    shapes = [(1, 300, heads, 64) for heads in (8, kv_heads, kv_heads)]
    host = [torch.randn(shape) for shape in shapes]
    grad = torch.randn(shapes[0])
    for window in (None, 7, 64, 200):
        made = []
        for device in ("cpu", "cuda"):
            q, k, v = (each.to(device) for each in host)
            rows = packed_attention.PackedRows(starts.to(device), 200)
            out, kept = packed_attention.forward(q, k, v, rows, window)
            back = packed_attention.backward(grad.to(device), q, k, v, out, kept, rows, window)
            made.append((out.cpu(), torch.cat(back, dim=1).cpu()))
        for ours, plain in zip(made[1], made[0]):
            torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-3)
print("attention agrees")
"""

#: Holds flash attention, and the kernel that a T4 has, to each row's own attention in fp32, forward and backward.
FLASH = """
import torch
from fast_ft.models import flash_attention, packed_attention
for dtype in (torch.float16, torch.bfloat16):
    like = torch.empty(1, dtype=dtype, device="cuda")
    for heads in ((32, 32, 128), (32, 8, 128), (14, 2, 64), (8, 8, 96), (4, 4, 16)):
        taken = flash_attention.takes(torch.empty(1, 1, heads[0], heads[2], dtype=dtype, device="cuda"))
        assert taken == (torch.cuda.get_device_capability() >= (8, 0)), heads
        for flash in (True, False):
            torch.backends.cuda.enable_flash_sdp(flash)
            problem = packed_attention.check(like, *heads)
            assert problem is None, (dtype, heads, flash, problem)
        torch.backends.cuda.enable_flash_sdp(True)
starts = torch.tensor([0, 5, 205, 300, 300, 300], dtype=torch.int32, device="cuda")
leaf = torch.randn(1, 8, 300, 64, device="cuda").half().requires_grad_()
rows = packed_attention.PackedRows(starts, 200)
made = []
for flash in (True, False):  # through autograd, as PEFT's and Unsloth's layers attend
    torch.backends.cuda.enable_flash_sdp(flash)
    packed_attention.attend(leaf, leaf[:, :2], leaf[:, 2:4], rows, window=50).float().square().sum().backward()
    made.append(leaf.grad)
    leaf.grad = None
torch.testing.assert_close(*made, rtol=2e-2, atol=2e-2)
print("flash attention agrees")
"""


def run(base: Path, folder: Path, backend: str) -> tuple[dict[str, Any], list[float], dict[str, str]]:
    """A whole run; return its manifest, its losses and its answers."""
    tree = {
        "output_dir": str(folder),
        "model": {"name_or_path": str(base), "max_length": 256, "dtype": "bfloat16", "backend": backend},
        "data": {"train": str(POCKET / "train.json"), "test": str(POCKET / "test.json")},
        "select": {"take": 16, "where": {"prompt_words": ">= 8"}},
        "train": {"effective_batch_size": 8, "warmup_steps": 0},
        "generate": {"do_sample": False, "max_new_tokens": 16},
    }
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(json.dumps(tree))
    done = subprocess.run([sys.executable, "-m", "fast_ft", str(recipe)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    pred = json.loads((folder / "pred.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, losses, {key: entry["output"][0] for key, entry in pred.items()}


@pytest.mark.parametrize("script", [ATTENTION, FLASH], ids=["fp32", "16 bits"])
def test_windows_in_the_attention_kernel_are_those_of_plain_torch(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", SHAPES)
def test_own_blocks_train_and_answer_a_family(name: str, tmp_path: Path) -> None:
    """Own blocks give PEFT's loss; the engine agrees with the model's own pass; the adapter is what was trained."""
    window = {"sliding_window": WINDOW} if name == "mistral-7b" else {}
    base = write_base(tmp_path / "base", SHAPES[name], POCKET / "base", num_hidden_layers=2, **window)
    manifest, losses, answers = run(base, tmp_path / "fused", "fused")
    train, answered = manifest["phases"]["train"], manifest["phases"]["generate"]
    assert train["backend"] == "fused"
    assert not [text for text in manifest["notes"] if "general way" in text or "PEFT's own layers" in text]
    assert answered["batched_difference_nats"] <= 0.1 and answered["adapter_difference_nats"] <= 0.1
    assert len(answers) == 100
    _, expected, _ = run(base, tmp_path / "peft", "peft")
    assert losses == pytest.approx(expected, rel=5e-3)
    print(name, losses, expected, answered["batched_difference_nats"], answered["adapter_difference_nats"])
