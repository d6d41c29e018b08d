"""What the plan's constants are fitted on: short trainings on a card, in one process, over random bases of some shapes.

    python -m bench.plan_samples OUT.jsonl [TITLE ...]      on a card; a line of JSON for each, written as it comes

Each training goes through fast_ft's own session and trainer, with a plan that is given and not settled. A line holds
the base's shape, the plan, the seconds of each step and of a pass of each width, and what the allocator held; with
`--trace` also which lines of code held it at the peak, and the kernels. Rows are random tokens of given lengths.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bench import card_base, machine, pass_trace
from bench.clock import say
from fast_ft.common import gpu, gpu_rates, out_of_memory
from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import EncodedRow
from fast_ft.models import weight_layout
from fast_ft.models.base_layers import decoder_layers
from fast_ft.models.loaders import choose
from fast_ft.models.random_base import SHAPES
from fast_ft.plan.plans import widths_of
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import policy_ntu_hw5, schema
from fast_ft.train.task import TrainCallbacks, TrainTask

if TYPE_CHECKING:
    from fast_ft.train.forward_backward import Passes

_PASSES, _ROUNDS = 5, 4


@dataclass(frozen=True)
class Sample:
    """A training: `steps` are the lengths of the rows of each step, which are trained `_ROUNDS` times in turn."""

    shape: str
    layers: int
    steps: tuple[tuple[int, ...], ...]
    recompute: int = 0
    capture: bool = True
    r: int = 16
    dtype: str = "float16"

    @property
    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        shape = SHAPES.get(self.shape) or {**policy_ntu_hw5.LLAMA_2_7B, "max_position_embeddings": 4096}
        return {**shape, "num_hidden_layers": self.layers}


_SHORT, _MIDDLE, _LONG = (96,) * 8, (160,) * 8, (272,) * 8
_MIXED, _HALVES, _WHOLES = (640, 304, 200, 160, 96, 88, 72, 40), (512,) * 8, (1024,) * 6
SAMPLES: dict[str, Sample] = {
    "llama 7B, 8 layers": Sample("llama-2-7b", 8, (_SHORT, _MIDDLE, _LONG, _MIXED, _HALVES)),
    "mistral, 8 layers": Sample("mistral-7b", 8, (_SHORT, _LONG, _MIXED, _HALVES), r=8),
    "llama 1B": Sample("llama-3.2-1b", 16, (_SHORT, _MIDDLE, _MIXED, _HALVES), r=32),
    "qwen3 1.7B": Sample("qwen3-1.7b", 28, (_SHORT, _LONG, _MIXED, _HALVES)),
    "llama 7B, 8 layers, 4 again, r = 64": Sample("llama-2-7b", 8, (_SHORT, _LONG, _HALVES), recompute=4, r=64),
    "llama 7B, 8 layers, no graphs": Sample("llama-2-7b", 8, (_MIXED, _HALVES, _WHOLES, (2048,) * 4), capture=False),
    "mistral, 8 layers, 4 again, no graphs": Sample(
        "mistral-7b", 8, (_SHORT, _LONG, _WHOLES), recompute=4, capture=False, dtype="bfloat16"
    ),
    "llama 1B, no graphs": Sample("llama-3.2-1b", 16, (_SHORT, _HALVES, (512,) * 16), capture=False),
    "qwen3 1.7B, 14 again, bfloat16": Sample(
        "qwen3-1.7b", 28, (_SHORT, _LONG, _HALVES), recompute=14, dtype="bfloat16"
    ),
    "llama 7B, 8 layers, all again, no graphs": Sample(
        "llama-2-7b", 8, (_LONG, _WHOLES, (512,) * 16), recompute=8, capture=False
    ),
    "llama 7B, 32 layers": Sample("llama-2-7b", 32, (_SHORT, _LONG, _MIXED)),
    "mistral, 32 layers, 8 again": Sample("mistral-7b", 32, (_SHORT, _MIXED, _HALVES), recompute=8),
}


def measure(sample: Sample, *, trace: bool) -> dict[str, Any]:
    """Train a sample and return what was seen."""
    import torch

    from fast_ft.models.fused_block import block
    from fast_ft.train.session import TrainSession

    gc.collect()
    out_of_memory.clear_workspaces()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    loaded = card_base.in_memory(sample.config, sample.dtype, sample.r)
    weight_layout.by_layer(decoder_layers(loaded.model))  # as a loader does it
    problem = block.install(loaded.model, loaded.patches)
    assert problem is None, problem
    loaded.backend = "fused"
    out_of_memory.release()
    found: dict[str, Any] = {"reserved_before_gib": round(before / 2**30, 4), "base": held()}
    rows, batches = _rows(sample)
    most, layers = max(map(len, sample.steps)), sample.layers
    plan = TrainPlan(most, None, sample.recompute, sample.capture, backend="fused")
    entries: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="bench-") as folder:
        job = StageJob(0, "all", rows, batches, 1e-4)
        section = schema.Train(effective_batch_size=most, optim="adamw_8bit", warmup_steps=1)
        task = TrainTask([job], section, schema.Carry(), 0, 0)
        session = TrainSession(loaded, task, plan, Path(folder), TrainCallbacks(on_step=entries.append))
        passes = session.steps.passes
        session.run()
        found["trained"] = held()
        found["plan_held"] = session.steps.plan == plan
        count = len(sample.steps)
        found["steps"] = [
            {"lengths": list(lengths), "seconds": [each["seconds"] for each in entries[i::count]]}
            for i, lengths in enumerate(sample.steps)
        ]
        own = [[rows[i] for i in batch] for batch in batches[:count]]
        passes.open()  # layers are computed again
        found["passes"] = [_timed(passes, each) for each in own]
        if trace:
            found |= _traced(passes, replace(plan, capture=False), own)
        passes.close()
        session.free()
    about = {**asdict(sample), "config": sample.config, "layers": layers, "rows": most, "optim": "adamw_8bit"}
    return about | found | {"longest": max(map(max, sample.steps)), "context_gib": round(gpu.context_gib(), 4)}


def _rows(sample: Sample) -> tuple[list[EncodedRow], list[list[int]]]:
    rows: list[EncodedRow] = []
    batches = []
    for lengths in sample.steps:
        batches.append([len(rows) + i for i in range(len(lengths))])
        for length in lengths:
            ids = [1 + (7 * len(rows) + 13 * i) % 30_000 for i in range(length)]
            rows.append(EncodedRow(str(len(rows)), ids, ids))
    return rows, batches * _ROUNDS


def held() -> dict[str, float]:
    """Return GiB: what is allocated and reserved, and the most of each since it was asked the last time."""
    import torch

    torch.cuda.synchronize()
    found = {
        "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
        "most_allocated": torch.cuda.max_memory_allocated(), "most_reserved": torch.cuda.max_memory_reserved(),
    }  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    return {key: round(value / 2**30, 4) for key, value in found.items()}


def _timed(passes: Passes, rows: list[EncodedRow]) -> dict[str, Any]:
    """Return a pass's width, its seconds alone, the host's share of them, and seconds of several one behind another."""
    import torch

    micro = passes.lay_out(rows)
    whole, host = [], []
    for _ in range(_PASSES):
        torch.cuda.synchronize()
        started = time.perf_counter()
        passes(micro, seed=0)
        host.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(_PASSES):
        passes(micro, seed=0)
    torch.cuda.synchronize()
    behind = (time.perf_counter() - started) / _PASSES
    return {
        "width": micro.tokens_4T.shape[1], "lengths": [len(row.input_ids) for row in rows],
        "seconds": round(statistics.median(whole), 5), "host_seconds": round(statistics.median(host), 5),
        "one_behind_another": round(behind, 5),
    }  # fmt: skip


def _traced(passes: Passes, plan: TrainPlan, steps: list[list[EncodedRow]]) -> dict[str, Any]:
    widest = max(max(widths_of(plan, [len(row.input_ids) for row in rows])) for rows in steps)
    passes.follow(plan)
    out_of_memory.clear_workspaces()
    found = {"peak": pass_trace.peak(lambda: passes.rehearse([widest]))}
    micro = passes.lay_out(steps[-1])
    return found | {"kernels": pass_trace.kernels(lambda: passes(micro, seed=0))}


def main() -> int:
    """Measure the samples that the command line names, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_samples", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("titles", nargs="*")
    parser.add_argument("--trace", action="append", default=[], help="a title, of which a pass is taken apart")
    options = parser.parse_args()
    choose.prepare_libraries()
    started = time.monotonic()
    rates = gpu_rates.measure()
    assert rates is not None, "a card is needed"
    with options.out.open("a", encoding="utf-8") as file:
        head = {"kind": "plan-samples", **machine.stamp("python -m bench.plan_samples"), "rates": asdict(rates)}
        print(json.dumps(head), file=file, flush=True)
        for title in options.titles or SAMPLES:
            try:
                line = measure(SAMPLES[title], trace=title in options.trace)
            except Exception as error:  # the others are measured all the same
                traceback.print_exc()
                line = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"title": title, **line}), file=file, flush=True)
            say(f"{time.monotonic() - started:6.1f} s  {title}: {_short(line)}")
    return 0


def _short(line: dict[str, Any]) -> str:
    if "error" in line:
        return str(line["error"])
    passes = [f"{each['width']}: {each['seconds']:.4f} host {each['host_seconds']:.4f}" for each in line["passes"]]
    steps = [f"{statistics.median(each['seconds'][1:]):.4f}" for each in line["steps"]]
    trained = line["trained"]
    return (
        f"{trained['most_allocated']} in {trained['most_reserved']} GiB; {'; '.join(passes)}; steps {' '.join(steps)}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
