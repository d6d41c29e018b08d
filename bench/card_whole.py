"""A whole 7B in the card's memory: simple.yaml's first epoch, and a decoding step in each way that the card takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import card_base
from bench.card_layers import random_rows, task_over
from bench.card_scale import Scale
from bench.clock import clock, empty_cache, out_of_memory_is_a_result
from bench.timed import TimedEngine
from fast_ft.common import environment
from fast_ft.generate.engine.block_manager import pages_for
from fast_ft.generate.engine.scheduler import BURST
from fast_ft.hub.families import ModelShape, read_config
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan import planner, plans
from fast_ft.plan.decode_pool import Answers
from fast_ft.plan.run_plan import RunPlan, TrainPlan
from fast_ft.plan.training_work import Training, takes_flash
from fast_ft.recipe import schema

RANK = 16  #: simple.yaml's
SIMPLE = schema.Train(effective_batch_size=8, num_train_epochs=1, warmup_steps=10, weight_decay=0.01)


def measure(scale: Scale, keep: Callable[[str, Any], None], base: str | None) -> None:
    """Keep what an epoch as simple.yaml trains it takes, and the milliseconds of a decoding step."""
    environment.expand_segments()
    config = scale.config if base is None else read_config(Path(base))
    plan = plan_here(scale, config)
    keep("plan", None if plan is None else plan.to_json())
    made: list[LoadedModel] = []
    keep("seconds_to_load", round(clock(lambda: made.append(_load(scale, config, base))), 2))
    loaded = made[0]
    model = loaded.model
    keep("simple", simple(scale, loaded, config, plan))
    model.eval().requires_grad_(False)
    empty_cache()
    decoding: dict[str, Any] = {}
    for way in ("ours", "bitsandbytes"):
        decoding[way] = decode(scale, model, kernels=way == "ours")
        keep("decode", decoding)


def plan_here(scale: Scale, config: dict[str, Any]) -> RunPlan | None:
    """Return the plan that an epoch of simple.yaml would follow on this card; None without a card."""
    card = planner.card_here()
    if card is None:
        return None
    size = scale.simple_tokens
    shape = ModelShape.from_config(config)
    work = Training(
        r=RANK, optim=SIMPLE.optim, load_in_4bit=True, backend="fused", rows=8, longest=size,
        flash=takes_flash(card.capability, shape.head_dim),
    )  # fmt: skip
    machine = plans.Machine(card.memory_gib, card.expected)
    answers = Answers([scale.length] * 150, 100)
    return plans.settle(shape, work, _steps(scale), answers, plans.Wanted(), machine)


def simple(scale: Scale, loaded: LoadedModel, config: dict[str, Any], plan: RunPlan | None) -> dict[str, Any]:
    """Train as simple.yaml does, for one epoch, over random tokens; return its seconds, step by step and in all."""
    import torch

    from fast_ft.models.fused_block import block
    from fast_ft.train.session import TrainSession
    from fast_ft.train.task import TrainCallbacks

    like = torch.empty(1, dtype=getattr(torch, loaded.dtype), device=loaded.device)
    why = block.check(like, ModelShape.from_config(config)) or block.install(loaded.model, loaded.patches)
    loaded.backend = "peft" if why else "fused"
    rows = random_rows(scale.simple_rows, scale.simple_tokens, config["vocab_size"])
    entries: list[dict[str, Any]] = []
    batches = [list(range(at, min(at + 8, len(rows)))) for at in range(0, len(rows), 8)]
    task = task_over(rows, batches, SIMPLE)
    started = time.monotonic()
    train = plan.train if plan is not None else TrainPlan(8)
    with tempfile.TemporaryDirectory() as folder:
        session = TrainSession(loaded, task, train, Path(folder), TrainCallbacks(on_step=entries.append))
        session.run()
        followed = session.steps.plan
    seconds = time.monotonic() - started
    loaded.patches.undo()
    return {
        "backend": loaded.backend, "why_not_fused": why, "steps": len(entries), "planned_steps": len(batches),
        "tokens": [each["tokens"] for each in entries], "step_seconds": [each["seconds"] for each in entries],
        "losses": [round(each["loss"], 4) for each in entries], "skipped": sum(each["skipped"] for each in entries),
        "seconds": round(seconds, 2), "peak_gib": round(session.peak_gib, 3), "captured": followed.capture,
    }  # fmt: skip


def decode(scale: Scale, model: Any, *, kernels: bool) -> dict[str, Any]:
    """Return the ms of a step for each number of slots; without `kernels`, by bitsandbytes and plain torch alone."""
    from fast_ft.generate.engine import ops_torch
    from fast_ft.generate.engine.fused_model import FusedModel
    from fast_ft.generate.engine.kv_cache import KVCache
    from fast_ft.generate.engine.model_runner import EngineConfig
    from fast_ft.generate.engine.sampler import Sampler

    fused = FusedModel(model, kernels=kernels)
    longest = scale.length + 9 * BURST
    found: dict[str, Any] = {
        "planes": fused.planes, "few_rows": fused.few_rows, "triton": fused.ops is not ops_torch,
        "notes": fused.notes, "steps": [],
    }  # fmt: skip

    def step(slots: int) -> dict[str, Any]:
        """Return a step's milliseconds with this number of slots, each at about `scale.length` tokens."""
        cache = KVCache(fused, slots * pages_for(longest))
        config = EngineConfig(slots=slots, longest=longest, end_ids=(), pad_id=0)
        engine = TimedEngine(fused, cache, Sampler(True, temperature=0.7, top_k=30, top_p=0.9), config)
        return engine.step_milliseconds(scale.length)

    for slots in scale.slots:
        found["steps"].append({"slots": slots} | out_of_memory_is_a_result(step, slots))
        empty_cache()
    return found


def _steps(scale: Scale) -> list[list[int]]:
    """Return the token counts of each step's rows: 8 a step, one epoch."""
    sizes = [scale.simple_tokens] * scale.simple_rows
    return [sizes[at : at + 8] for at in range(0, len(sizes), 8)]


def _load(scale: Scale, config: dict[str, Any], base: str | None) -> LoadedModel:
    if base is None:
        return card_base.in_memory(config, scale.dtype, RANK)
    section = schema.Model(name_or_path=base, dtype=scale.dtype)
    return choose.make_loader(section, schema.Lora(r=RANK), seed=1, name="peft").for_training()
