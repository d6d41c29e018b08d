"""On a card: a step of AdamW with 8-bit moments against bitsandbytes' own, and sessions that run ahead.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_train_step.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
COUNT = 256 * 4099 + 77


def made(kind: type) -> tuple[torch.nn.Parameter, Any]:
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter((torch.randn(COUNT, generator=draw) * 0.02).cuda())
    return weight, kind([weight], lr=2e-4, weight_decay=0.01)


def gradient(step: int) -> torch.Tensor:
    draw = torch.Generator("cuda").manual_seed(step)
    normal = torch.randn(COUNT, generator=draw, device="cuda")
    return normal * torch.rand(COUNT, generator=draw, device="cuda") ** 6 * 10.0 ** (-2 - step % 3)


def test_the_kernel_steps_as_bitsandbytes_and_as_plain_torch_do() -> None:
    import bitsandbytes

    from fast_ft.train import adamw_8bit, adamw_8bit_triton

    ours, theirs = made(adamw_8bit.AdamW8bit), made(bitsandbytes.optim.AdamW8bit)
    start = ours[0].detach().clone()
    for step in range(8):
        for weight, optimizer in (ours, theirs):
            weight.grad = gradient(step)
            optimizer.step()
        left, right = ours[1].state[ours[0]], theirs[1].state[theirs[0]]
        moved = (theirs[0] - start).detach().norm()
        off = {name: float((left[name] != right[name]).float().mean()) for name in ("state1", "state2")}
        largest = {name: float((left[name] - right[name]).abs().max()) for name in ("absmax1", "absmax2")}
        away = float((ours[0] - theirs[0]).detach().norm() / moved)
        print(f"step {step}: weights {away:.2e} of the way, codes that differ {off}, largest {largest}")
        assert away < 1e-3 and max(off.values()) < 0.01
    assert float(left["step"]) == right["step"] == 8

    # one step in plain torch from the same state
    weight, optimizer = ours
    copies = {name: value.clone() for name, value in optimizer.state[weight].items()}
    other, numbers = weight.detach().clone(), torch.tensor([0.0, 3e-4, 1.5], device="cuda")
    constants = (0.9, 0.999, 1e-8, 0.999)
    adamw_8bit_triton.update_(weight.detach(), gradient(9), optimizer.state[weight], numbers, constants)
    adamw_8bit.update_(other, gradient(9), copies, numbers, constants)
    assert torch.allclose(weight, other, atol=1e-7)
    for name in ("absmax1", "absmax2"):
        assert torch.allclose(optimizer.state[weight][name], copies[name], rtol=1e-5)


def test_a_step_that_overflows_changes_nothing_and_nobody_waits() -> None:
    from fast_ft.train.adamw_8bit import AdamW8bit

    weight, optimizer = made(AdamW8bit)
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    for _ in range(2):
        weight.grad = gradient(1)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    before = {name: value.clone() for name, value in optimizer.state[weight].items()}
    kept = weight.detach().clone()
    weight.grad = gradient(2)
    weight.grad[5] = float("inf")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.detach().equal(kept) and scaler.get_scale() == 2.0**15
    assert all(value.equal(before[name]) for name, value in optimizer.state[weight].items())
    assert float(before["step"]) == 2


def test_the_steps_seconds_on_this_card() -> None:
    import bitsandbytes

    from fast_ft.train.adamw_8bit import AdamW8bit

    for kind in (AdamW8bit, bitsandbytes.optim.AdamW8bit):
        weight = torch.nn.Parameter(torch.zeros(40_000_000, device="cuda"))
        optimizer = kind([weight], lr=2e-4, weight_decay=0.01)
        weight.grad = torch.randn_like(weight)
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        print(f"{kind.__module__}: {1e3 * min(times):.3f} ms a step of 40 million weights")
        assert min(times) < 0.05


#: A session over the pocket base in float16 on the card: its lines, and what in its steps waited for the card.
SESSION = """
import json, sys, warnings, torch
from pathlib import Path
from fast_ft.data.prepare import prepare
from fast_ft.models.loaders import choose
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe.loader import load_recipe
from fast_ft.train.task import TrainTask, TrainCallbacks

recipe = load_recipe("recipes/quickstart.yaml", json.loads(sys.argv[1]))
prepared = prepare(recipe)
maker = choose.make_loader(recipe.model, recipe.lora, seed=1, name="fused")
loaded = maker.for_training()
from fast_ft.train.session import TrainSession
from fast_ft.train.launched_step import LaunchedStep
lines, waits = [], []
task = TrainTask(prepared.jobs, recipe.train, recipe.curriculum.carry, recipe.seed, prepared.encoder.pad_id, 24,
                 prepared.validation)
session = TrainSession(loaded, task, TrainPlan(8, capture=sys.argv[2] == "graphs"), Path(sys.argv[3]),
                       TrainCallbacks(on_step=lines.append))
session.ahead = sys.argv[4] == "ahead"
def full(module, given):
    if not torch.is_grad_enabled() and session.steps.passes._graphs:
        raise torch.OutOfMemoryError("beside graphs")
if len(sys.argv) > 5:
    session.loaded.model.get_input_embeddings().register_forward_pre_hook(full)
train_step = session.steps.train_step
def watched(*given):
    torch.cuda.set_sync_debug_mode("warn" if 12 <= len(lines) < 20 else "default")
    return train_step(*given)
session.steps.train_step = watched
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    session.run()
torch.cuda.set_sync_debug_mode("default")
waits = [f"{each.filename}:{each.lineno} {each.message}" for each in found
         if "synchroniz" in str(each.message) and "prototype" not in str(each.message)]
bits = int(session.flat.parameter.detach().view(torch.int32).sum(dtype=torch.int64))
print(json.dumps({"lines": lines, "waits": waits, "bits": bits}))
"""


def session(tmp_path: Path, name: str, passes: str, when: str, *short: str, **values: Any) -> dict[str, Any]:
    overrides = [
        "model.dtype=float16", "model.backend=fused", "train.optim=adamw_8bit", "budget.train_minutes=null",
        *(f"{key}={value}" for key, value in values.items()),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SESSION, json.dumps(overrides), passes, str(tmp_path / name), when, *short],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("passes", ["graphs", "eager"])
def test_running_ahead_changes_no_bit_and_its_steps_wait_for_nothing(tmp_path: Path, passes: str) -> None:
    made = {when: session(tmp_path, when, passes, when) for when in ("ahead", "waiting")}
    told = [[{k: v for k, v in line.items() if k not in ("seconds", "gib")} for line in each["lines"]]
            for each in made.values()]  # fmt: skip
    print([line["loss_scale"] for line in told[0]], [line["skipped"] for line in told[0]])
    assert repr(told[0]) == repr(told[1]) and made["ahead"]["bits"] == made["waiting"]["bits"]
    assert len(told[0]) == 24 and not made["ahead"]["waits"], made["ahead"]["waits"]


def test_a_measurement_may_take_the_graphs_memory_and_the_next_step_captures_again(tmp_path: Path) -> None:
    values = {"data.validation": "{take: 8}", "train.eval_steps": 9, "train.load_best": "false"}
    plain, short = (
        session(tmp_path, name, "graphs", "ahead", *more, **values) for name, more in (("a", ()), ("b", ("short",)))
    )
    losses = [[line["loss"] for line in made["lines"]] for made in (plain, short)]
    validation = [
        [line["validation_loss"] for line in made["lines"] if "validation_loss" in line] for made in (plain, short)
    ]
    assert losses[0] == losses[1] and plain["bits"] == short["bits"] and len(losses[0]) == 24
    assert len(validation[0]) >= 2 and validation[1] == pytest.approx(validation[0], rel=1e-3)
