"""The doctor's check of the kernels: what fails is a finding with its remedy, and the way that a run takes is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import figures
from fast_ft.doctor import child, kernel_trial, kernels, measured, versions
from fast_ft.doctor.findings import Finding
from fast_ft.generate.engine import nf4_linear
from fast_ft.models import packed_attention
from fast_ft.models.fused_block import group_weights, ops_torch
from tests.helpers.patience import PATIENCE

SMALL = kernel_trial.CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
T4 = {"name": "Tesla T4", "memory": "15360 MiB", "driver": "580.1"}
H200 = {"name": "NVIDIA H200", "memory": "143771 MiB", "driver": "580.1"}
CHECKS = [
    "packed attention", "training blocks", "NF4 unpacking", "blocks in a model", "bitsandbytes' products", "decoding",
    "unsloth",
]  # fmt: skip


def lines(*, planes: bool = True, triton: bool = True, notes: Any = (), **problems: str | None) -> list[dict[str, Any]]:
    """What a trial prints where each check passes, but for `problems`, whose names have _ for a space."""
    given = {name.replace("_", " "): problem for name, problem in problems.items()}
    found: list[dict[str, Any]] = []
    for name in CHECKS:
        found += [{"begins": name}, {"check": name, "problem": given.get(name)}]
    decoding = {"planes": planes, "triton": triton, "notes": list(notes)}
    return [*found, {"dtype": "float16", "decoding": decoding}]


def named(findings: Any) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for each in findings:
        found.setdefault(each.name, []).append(each)
    return found


def test_a_trial_runs_every_check_on_one_real_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: where kernels of a card are missing, the reason is told, and what comes behind is checked too."""
    made = list(kernel_trial.trial(SMALL, "cpu"))
    assert [line["begins"] for line in made if "begins" in line] == CHECKS
    problems = {line["check"]: line["problem"] for line in made if "check" in line}
    assert [name for name in CHECKS if problems[name] is None] == [
        "packed attention", "training blocks", "NF4 unpacking", "decoding",
    ]  # fmt: skip
    assert problems["blocks in a model"] == "the 4-bit weights are not NF4 in blocks of 64 on a card"
    decoding = {"planes": False, "few_rows": None, "triton": False, "notes": []}
    assert made[-1] == {"dtype": "float32", "decoding": decoding}

    def breaks(*_: Any) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(packed_attention, "check", breaks)
    first = next(line for line in kernel_trial.trial(SMALL, "cpu") if "check" in line)
    assert first == {"check": "packed attention", "problem": "RuntimeError: no kernel image"}


def test_all_well() -> None:
    found = named(kernels.judged(lines()))
    assert [each.level for each in found["kernels"]] == ["fine"]
    assert all(name in found["kernels"][0].text for name in CHECKS[:-1]) and "float16" in found["kernels"][0].text
    (training,), (decoding,) = found["training"], found["decoding"]
    assert "our own blocks (fused)" in training.text and "model.backend=unsloth can be chosen" in training.text
    assert "decoded in registers" in decoding.text and {training.level, decoding.level} == {"fine"}
    without = named(kernels.judged(lines(unsloth="ImportError: no xformers")))
    assert "model.backend=unsloth cannot be chosen (ImportError: no xformers)" in without["training"][0].text


@pytest.mark.parametrize("name", CHECKS[:-1])
def test_each_kernel_that_fails_is_a_finding_with_its_remedy(name: str) -> None:
    found = named(kernels.judged(lines(**{name.replace(" ", "_"): "it differs by 0.5"}, planes=name != CHECKS[4])))
    passed, failed = found["kernels"]
    assert failed.text == f"{name}: it differs by 0.5" and failed.remedy and name not in passed.text
    falls_back = name in ("training blocks", "blocks in a model")
    assert failed.level == ("warning" if falls_back else "broken")
    assert ("model.backend=peft" in failed.remedy) == (falls_back or name == "NF4 unpacking")


def test_the_way_of_training_follows_from_what_failed() -> None:
    (through,) = named(kernels.judged(lines(training_blocks="no tensor cores")))["training"]
    assert through.level == "note" and through.text.startswith("through Unsloth") and "no tensor cores" in through.text
    (through,) = named(kernels.judged(lines(blocks_in_a_model="of another kind", unsloth="ImportError: x")))["training"]
    assert through.level == "warning" and through.text.startswith("through PEFT")
    assert "of another kind" in through.text and "ImportError: x" in through.text and through.remedy


def test_the_way_of_training_is_that_with_evidence_on_the_card() -> None:
    """On a T4 Unsloth comes first, where it imports; where it does not, what our own blocks' checks say counts."""

    def on_a_t4(**problems: str | None) -> Finding:
        given = lines(**problems)
        (found,) = named(kernels.judged([*given[:-1], given[-1] | {"capability": [7, 5]}]))["training"]
        return found

    assert on_a_t4().text == "through Unsloth, by the evidence on such cards; model.backend=fused can be chosen"
    assert on_a_t4(training_blocks="off").text.endswith("model.backend=fused cannot be relied on (off)")
    assert on_a_t4(unsloth="ImportError: x").text.startswith("through our own blocks (fused)")
    assert on_a_t4(unsloth="ImportError: x", training_blocks="off").text.startswith("through PEFT")
    broken = on_a_t4(packed_attention="off")
    assert broken.level == "broken" and broken.text.startswith("through Unsloth, which would go wrong")


def test_4_bit_products_are_told_with_their_times_and_what_is_wrong_with_them() -> None:
    about = {"outputs": 12288, "inputs": 4096, "rows": 64}
    timed = [
        about | {"way": "bitsandbytes", "off": 0.0002, "us": 84.7},
        about | {"way": "the CUDA kernel", "off": 0.0002, "us": 30.4},
        about | {"rows": 16, "way": "the CUDA kernel", "off": 0.5, "us": 17.1},
        about | {"rows": 16, "way": "the CUDA kernel for 7.5", "failed": "OSError: NVRTC was not found"},
    ]
    given = lines()
    (found,) = named(kernels.judged([*given[:-1], given[-1] | {"products": timed}]))["4-bit products"]
    assert found.level == "note" and found.text == (
        "12288 x 4096, 64 rows: bitsandbytes 85 us, the CUDA kernel 30 us; 12288 x 4096, 16 rows: the CUDA kernel "
        "17 us, wrong by 0.500, the CUDA kernel for 7.5 fails (OSError: NVRTC was not found)"
    )
    assert "4-bit products" not in named(kernels.judged(given)), "there are none without a card"


def test_the_way_of_decoding_says_why() -> None:
    note = "4-bit products by bitsandbytes, more slowly: ValueError: no tensor cores on this card"
    (decoding,) = named(kernels.judged(lines(planes=False, notes=[note])))["decoding"]
    assert decoding.level == "note" and note in decoding.text and "Triton kernels of ours do the rest" in decoding.text
    (decoding,) = named(kernels.judged(lines(planes=False, triton=False, notes=["a", "b"])))["decoding"]
    assert decoding.level == "warning" and "a; b" in decoding.text and decoding.remedy
    spare = named(kernels.judged(lines(**{"bitsandbytes'_products": "off"})))["kernels"][1]
    assert spare.level == "warning", "decoding does without them here"


@pytest.mark.parametrize(
    ("status", "errors", "says"),
    [
        (None, "", "it was not done after 400 s"),
        (-11, "", "the process was ended by SIGSEGV"),
        (1, "Traceback\nRuntimeError: CUDA error: an illegal memory access", "status 1: RuntimeError: CUDA error"),
    ],
)
def test_a_kernel_that_ends_the_process_is_named(
    status: int | None, errors: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = "\n".join(["a library's banner", *map(json.dumps, lines()[:5])])  # while the third check was running
    monkeypatch.setattr(child, "run", lambda *_: child.Done(status, printed, errors))
    found = named(kernels.examine(T4))
    broken = found["kernels"][-1]
    assert broken.level == "broken" and broken.text.startswith("NF4 unpacking: ") and says in broken.text
    assert found["training"][0].level != "fine", "what was not checked is not said to work"
    monkeypatch.setattr(child, "run", lambda *_: child.Done(status, "", errors))
    (only,) = kernels.examine(T4)
    assert only.level == "broken" and says in only.text and "kernel_trial" in only.remedy


def test_without_a_card_one_line_says_what_is_not_checked() -> None:
    (found,) = kernels.examine(None)
    assert found.level == "note" and "no NVIDIA GPU" in found.text and "cannot be checked here" in found.text


def test_a_child_is_stopped_in_time_and_tells_what_it_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for seconds in (1, 4, 16, 64):  # on a busy machine Python may not even begin within the first
        done = child.run("slow", seconds)
        assert done.status is None
        if done.out:
            break
    assert done.out == "begun\n"
    done = child.run("no_such_module", PATIENCE)
    assert done.status == 1 and done.last_line.endswith("No module named no_such_module")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_attention_is_held_to_each_rows_own(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.empty(1)
    assert packed_attention.check(like, 4, kv_heads, 16) is None
    right, backward = packed_attention.attend, packed_attention.backward

    def forgets_the_rows(q: Any, k: Any, v: Any, rows: Any, scale: Any = None, window: Any = None) -> Any:
        whole = packed_attention.PackedRows(torch.tensor([0, 100], dtype=torch.int32), 100)
        return right(q, k, v, whole, scale, window)

    def forgets_the_window(q: Any, k: Any, v: Any, rows: Any, scale: Any = None, window: Any = None) -> Any:
        return right(q, k, v, rows, scale)

    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "attend", forgets_the_window)
        assert "attention's result differs" in str(packed_attention.check(like, 4, kv_heads, 16))
    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "attend", forgets_the_rows)
        assert "attention's result differs" in str(packed_attention.check(like, 4, kv_heads, 16))
    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "backward", lambda *given: [each * 1.1 for each in backward(*given)])
        assert "attention's gradient differs" in str(packed_attention.check(like, 4, kv_heads, 16))
    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "backward", lambda *given: [each * float("nan") for each in backward(*given)])
        assert "differs from each row's own attention by nan" in str(packed_attention.check(like, 4, kv_heads, 16))


def test_unpacking_is_held_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = nf4_linear._small_layer(torch.float16, "cpu")
    assert group_weights.check_unpacking(layer, torch.float16) is None
    unpack = ops_torch.unpack

    def swaps_nibbles(packed: Any, scale: Any, nested: Any, out: Any) -> None:
        unpack((packed >> 4) | (packed << 4), scale, nested, out)

    monkeypatch.setattr(ops_torch, "unpack", swaps_nibbles)
    assert "differ from bitsandbytes' by" in str(group_weights.check_unpacking(layer, torch.float16))


def test_bitsandbytes_products_are_held_to_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products into a buffer exist on cards only, so plain products stand in for them here."""
    _, weight_NE = nf4_linear._small_layer(torch.float32, "cpu")
    off = 1.0
    monkeypatch.setattr(nf4_linear, "fused_rows", lambda device: 16)
    monkeypatch.setattr(
        nf4_linear, "pieces", lambda *_: lambda x_TE: x_TE @ weight_NE.T * (1 if len(x_TE) < 17 else off)
    )
    nf4_linear.compare_pieces("float32", "cpu")
    off = 1.03
    with pytest.raises(RuntimeError, match=r"of 17 rows is off by 0\.03"):
        nf4_linear.compare_pieces("float32", "cpu")


def test_what_the_doctor_says_was_measured_is_what_the_figures_are_of() -> None:
    assert measured.read() == figures.measured(), "run python -m bench --readme"


def test_a_card_that_was_never_measured_is_told_so() -> None:
    (t4,) = measured.examine(T4)
    assert t4.level == "note" and "nothing was ever measured on a card like this one (t4)" in t4.text
    assert "h200" in t4.text and "docs/t4.md" in t4.remedy and "t4class" not in t4.text
    (h200,) = measured.examine(H200)
    assert h200.level == "fine" and "on a card like this one (h200): " in h200.text and "training (20" in h200.text
    known = {"cpu": {"pocket": "2026-01-02"}, "h200": {"train": "2026-01-02", "decode": "2026-01-02"}, "a100": {}}
    (part,) = measured.examine(H200, known | {"h200": {"train": "2026-01-02"}, "a100": {"decode": "2026-01-02"}})
    assert part.text.endswith("training (2026-01-02); never: answering")
    (cpu,) = measured.examine(None, known)
    assert cpu.text == "on CPUs: the quickstart (2026-01-02)"


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.mark.parametrize("missing", [["torch"], ["torch", "psutil", "huggingface_hub"]])
def test_the_doctor_works_without_torch_and_says_what_to_install(
    missing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi lists a T4, and packages are not there: findings with what to install, and no traceback."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(missing=missing))
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho GPU-1, Tesla T4, 15360 MiB, 580.1, 7.5\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{versions.ROOT}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = subprocess.run([sys.executable, "-m", "fast_ft", "doctor"], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stdout + done.stderr) == (3, False), done.stderr
    assert "torch does not import" in done.stdout and "python -m pip install -r requirements.txt" in done.stdout
    assert "could not be checked" in done.stdout and "kernels" in done.stdout.splitlines()[-1]
    assert ("room           cannot be looked at" in done.stdout) == ("psutil" in missing)
    assert ("GiB of host memory free" in done.stdout) == ("psutil" not in missing)
