"""The doctor on a card: every kernel is checked, the way is said, and a kernel that is wrong is a finding.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_doctor.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common import gpu
from fast_ft.doctor import kernels

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]

# A process of its own: kernels are checked once in a process, and here one of them is spoilt.
SPOILT = """
import json, sys
import torch
from fast_ft.doctor import kernel_trial
from fast_ft.models import nf4, packed_attention
from fast_ft.models.fused_block import dispatch
spoil, ops = sys.argv[1], dispatch.ops_for(torch.empty(1, device="cuda"))
if spoil == "training blocks":
    swiglu = ops.swiglu
    ops.swiglu = lambda *given: swiglu(*given) * 1.1
elif spoil == "NF4 unpacking":
    right = ops.unpack
    def unpack(packed, scale, nested, out, *lora):
        right(packed, scale, nested, out, *lora)
        out.mul_(1.1)
    ops.unpack = unpack
elif spoil == "packed attention":
    kernel = packed_attention.one_kernel
    def whole(q, k, v, rows, **named):
        return kernel(q, k, v, packed_attention.PackedRows(rows.starts[[0, -1]], int(rows.starts[-1])), **named)
    packed_attention.one_kernel = whole
elif spoil == "decoding":
    scales = nf4.pack_scales
    nf4.pack_scales = lambda absmax, dtype: scales(absmax * 1.1, dtype)
for line in kernel_trial.trial(kernel_trial.CONFIG, "cuda:0"):
    print(json.dumps(line), flush=True)
"""


def named(findings: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [each for each in findings if each["name"] == name]


def test_the_doctor_checks_every_kernel_and_says_the_way() -> None:
    command = [sys.executable, "-m", "fast_ft", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    findings = json.loads(done.stdout)["findings"]
    print(json.dumps(findings, indent=1))
    (checked,) = named(findings, "kernels")
    assert checked["level"] == "fine", checked
    for kernel in ("packed attention", "training blocks", "NF4 unpacking", "blocks in a model", "decoding"):
        assert kernel in checked["text"], kernel
    (training,), (decoding,) = named(findings, "training"), named(findings, "decoding")
    assert "our own blocks (fused)" in training["text"] and training["level"] == "fine"
    import torch

    in_registers = torch.cuda.get_device_capability() >= (8, 0)
    assert ("decoded in registers" if in_registers else "Triton kernels of ours") in decoding["text"], decoding
    (measured,) = named(findings, "measured")
    here = gpu.gpu()
    assert here is not None and gpu.card_slug(here["name"]) in measured["text"]


@pytest.mark.parametrize("kernel", ["training blocks", "NF4 unpacking", "packed attention", "decoding"])
def test_a_kernel_that_is_wrong_is_a_finding(kernel: str) -> None:
    done = subprocess.run([sys.executable, "-c", SPOILT, kernel], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    findings = list(kernels.judged(lines))
    if kernel == "decoding":  # it goes on by bitsandbytes, and says so
        (decoding,) = (each for each in findings if each.name == "decoding")
        assert decoding.level in ("note", "warning") and "is off by" in decoding.text
        return
    failed = [each for each in findings if each.name == "kernels" and each.level != "fine"]
    assert any(each.text.startswith(f"{kernel}: ") and "differ" in each.text and each.remedy for each in failed), failed
    (training,) = (each for each in findings if each.name == "training")
    assert training.level != "fine"
