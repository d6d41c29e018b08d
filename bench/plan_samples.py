"""What the plan's constants are fitted on: short trainings on a card, in one process, of random bases of several shapes.

    python -m bench.plan_samples OUT.jsonl [TITLE ...]      on a card; one line of JSON a training, written as it comes

Each training goes through fast_ft's own session and trainer, with a plan that is given and not settled. A line holds
the shape, the plan, the seconds of each step and of a pass of each width, what the allocator held at the peak, and
with `--trace` which lines of code held it. No row is real: rows are random tokens of given lengths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import card_base, machine, ours
from bench.clock import say
from bench.watch import Watch
from fast_ft.common import gpu, gpu_rates, out_of_memory
from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import EncodedRow
from fast_ft.hub.families import FamilySpec
from fast_ft.models.loaders import choose
from fast_ft.models.random_base import SHAPES
from fast_ft.plan.plans import TrainPlan, widths_of
from fast_ft.recipe import policy_ntu_hw5, schema
from fast_ft.train.task import TrainTask

LLAMA: dict[str, Any] = {**policy_ntu_hw5.LLAMA_2_7B, "max_position_embeddings": 4096}
_PASSES, _ROUNDS = 5, 3


@dataclass(frozen=True)
class Sample:
    """A training: `steps` are the lengths of the rows of each step, which are trained `_ROUNDS` times in turn."""

    config: dict[str, Any]
    steps: tuple[tuple[int, ...], ...]
    recompute: int = 0
    capture: bool = True
    r: int = 16
    dtype: str = "float16"
    most_tokens: int | None = None
    optim: str = "adamw_8bit"


def _shape(name: str, layers: int) -> dict[str, Any]:
    return {**SHAPES[name], "num_hidden_layers": layers}


_MISTRAL_8 = _shape("mistral-7b", 8)
_STEPS = ((96,) * 8, (160,) * 8, (272,) * 8, (640, 304, 200, 160, 96, 88, 72, 40))
SAMPLES: dict[str, Sample] = {
    "llama 32 layers": Sample({**LLAMA}, _STEPS),
    "llama 32 layers, 8 again, r 64": Sample({**LLAMA}, _STEPS, recompute=8, r=64),
    "llama 8 layers": Sample({**LLAMA, "num_hidden_layers": 8}, _STEPS),
    "llama 8 layers, long rows, no graph": Sample(
        {**LLAMA, "num_hidden_layers": 8}, ((1024,) * 2, (2048, 1024), (1024,) * 8, (512,) * 16), capture=False
    ),
    "llama 8 layers, all again, no graph": Sample(
        {**LLAMA, "num_hidden_layers": 8}, (*_STEPS, (1024,) * 4), recompute=8, capture=False
    ),
    "mistral 8 layers": Sample(_MISTRAL_8, _STEPS, r=8),
    "mistral 8 layers, 4 again, no graph": Sample(_MISTRAL_8, (*_STEPS, (1024,) * 4), recompute=4, capture=False),
    "llama 1B": Sample(_shape("llama-3.2-1b", 16), (*_STEPS, (1024,) * 4), r=32),
    "llama 1B, no graph": Sample(_shape("llama-3.2-1b", 16), (*_STEPS, (512,) * 16), capture=False),
    "qwen3 1.7B": Sample(_shape("qwen3-1.7b", 28), (*_STEPS, (1024,) * 4)),
    "qwen3 1.7B, 14 again, bf16": Sample(_shape("qwen3-1.7b", 28), _STEPS, recompute=14, dtype="bfloat16"),
}


def measure(sample: Sample, *, trace: bool = False) -> dict[str, Any]:
    """Train a sample and return what was seen."""
    import torch

    before = torch.cuda.memory_reserved()
    loaded = card_base.in_memory(sample.config, sample.dtype, sample.r)
    _own_blocks(loaded)
    out_of_memory.release()
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"reserved_before": before, "base": _held()}
    rows, batches = _rows(sample)
    job = StageJob(0, "all", rows, batches, 1e-4)
    most = max(map(len, sample.steps))
    section = schema.Train(effective_batch_size=most, optim=sample.optim, warmup_steps=1)
    layers = sample.config["num_hidden_layers"]
    plan = TrainPlan(most, sample.most_tokens, sample.recompute, sample.capture, backend="fused")
    watch = Watch(time.monotonic())
    from fast_ft.train.session import TrainSession

    with TemporaryDirectory(prefix="bench-") as folder:
        task = TrainTask([job], section, schema.Carry(), 0, 0, len(batches))
        session = TrainSession(loaded, task, plan, Path(folder))
        found["session"] = _held()
        passes = session.steps.passes
        kept, passes.close = passes.close, lambda: None  # type: ignore[method-assign]
        rehearse = passes.rehearse

        def seen(widths: Any) -> dict[int, float]:
            found["before_passes"] = _held()
            seconds = rehearse(widths)
            found["rehearsed"] = {"held": _held(), "seconds": {w: round(s, 5) for w, s in seconds.items()}}
            return seconds

        passes.rehearse = seen  # type: ignore[method-assign]
        ours.train(session, watch)
        found["trained"] = _held()
        found["plan_held"] = session.steps.plan == plan
        count = len(sample.steps)
        steps = [each["seconds"] for each in watch.steps]
        found["steps"] = [
            {"lengths": list(lengths), "seconds": steps[i::count]} for i, lengths in enumerate(sample.steps)
        ]
        found["passes"] = _timed(passes, [[rows[i] for i in batch] for batch in batches[:count]])
        if trace:
            kept()
            out_of_memory.clear_workspaces()
            passes.follow(replace(plan, capture=False))
            found["peak"] = traced(lambda: passes.rehearse([max(max(widths_of(plan, s)) for s in sample.steps)]))
            found["kernels"] = [profiled(passes, [rows[i] for i in batches[number]]) for number in (0, count - 1)]
        kept()
        session.free()
    out_of_memory.clear_workspaces()
    about = {
        "config": sample.config, "layers": layers, "r": sample.r, "dtype": sample.dtype, "recompute": sample.recompute,
        "capture": sample.capture, "most_tokens": sample.most_tokens, "rows": most, "optim": sample.optim,
        "longest": max(map(max, sample.steps)),
    }  # fmt: skip
    return about | found | {"context_gib": round(gpu.context_gib(), 4)}


def _own_blocks(loaded: Any) -> None:
    from fast_ft.models.fused_block import block

    problem = block.install(loaded.model, loaded.patches)
    assert problem is None, problem
    loaded.backend = "fused"


def _rows(sample: Sample) -> tuple[list[EncodedRow], list[list[int]]]:
    rows: list[EncodedRow] = []
    batches = []
    for lengths in sample.steps:
        batches.append([len(rows) + i for i in range(len(lengths))])
        for length in lengths:
            ids = [1 + (7 * len(rows) + 13 * i) % 30_000 for i in range(length)]
            rows.append(EncodedRow(str(len(rows)), ids, ids))
    return rows, batches * _ROUNDS


def _held() -> dict[str, float]:
    """Return GiB: what is allocated and reserved, and the most of each since it was asked the last time."""
    import torch

    torch.cuda.synchronize()
    found = {
        "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
        "most_allocated": torch.cuda.max_memory_allocated(), "most_reserved": torch.cuda.max_memory_reserved(),
        "free": torch.cuda.mem_get_info()[0],
    }  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    return {key: round(value / 2**30, 4) for key, value in found.items()}


def _timed(passes: Any, steps: list[list[EncodedRow]]) -> list[dict[str, Any]]:
    """Return of each step's rows, in one pass: its width, seconds until the card is done, the host's share of them."""
    import torch

    found = []
    for rows in steps:
        micro = passes.lay_out(rows)
        whole, host, back = [], [], []
        for _ in range(_PASSES + 1):
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
        back.append((time.perf_counter() - started) / _PASSES)
        found.append(
            {
                "width": micro.tokens_4T.shape[1],
                "lengths": [len(row.input_ids) for row in rows],
                "seconds": round(statistics.median(whole[1:]), 5),
                "host_seconds": round(statistics.median(host[1:]), 5),
                "one_behind_another": round(back[0], 5),
            }
        )
    return found


def traced(work: Any, most: int = 40) -> dict[str, Any]:
    """Return what lived at the peak of the memory that `work` allocates: MiB by the line of code, and of what was there.

    A block counts for the innermost two lines of fast_ft's own code that allocated it.
    """
    import torch

    there = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=400_000)
    try:
        work()
        torch.cuda.synchronize()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    events = [each for trace in snapshot["device_traces"] for each in trace]
    live: dict[int, tuple[int, str]] = {}
    total = best = there
    at_peak: dict[int, tuple[int, str]] = {}
    for event in sorted(events, key=lambda each: each["time_us"]):
        if event["action"] == "alloc":
            live[event["addr"]] = (event["size"], _place(event.get("frames", [])))
            total += event["size"]
            if total > best:
                best, at_peak = total, dict(live)
        elif event["action"] == "free_completed" and event["addr"] in live:
            total -= live.pop(event["addr"])[0]
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for size, place in at_peak.values():
        sizes[place] += size
        counts[place] += 1
    lines = [[round(size / 2**20, 2), counts[place], place] for place, size in sizes.most_common(most)]
    return {"there_mib": round(there / 2**20, 2), "peak_mib": round(best / 2**20, 2), "by_line": lines}


def profiled(passes: Any, rows: list[EncodedRow], most: int = 30) -> dict[str, Any]:
    """Return the kernels of one pass, run kernel by kernel: milliseconds, calls and name, the longest first."""
    import torch

    micro = passes.lay_out(rows)
    passes(micro, seed=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        passes(micro, seed=0)
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda each: -each.device_time_total)
    listed = [[round(each.device_time_total / 1e3, 3), each.count, each.key[:90]] for each in kernels[:most]]
    total = sum(each.device_time_total for each in kernels) / 1e3
    return {"width": micro.tokens_4T.shape[1], "milliseconds": round(total, 3), "by_kernel": listed}


def _place(frames: list[dict[str, Any]]) -> str:
    own = [each for each in frames if "fast_ft" in each["filename"] and "bench" not in each["filename"]]
    chosen = own[:2] or frames[:2]
    return " < ".join(f"{Path(each['filename']).name}:{each['line']} {each['name']}" for each in chosen)


def main() -> int:
    """Measure the samples that the command line names, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_samples", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("titles", nargs="*")
    parser.add_argument("--trace", action="append", default=[], help="a title, of which the peak is taken apart")
    options = parser.parse_args()
    choose.prepare_libraries()
    started = time.monotonic()
    found = gpu_rates.measure()
    assert found is not None, "a card is needed"
    out_of_memory.release()
    with options.out.open("a", encoding="utf-8") as file:
        head = {"kind": "plan-samples", **machine.stamp("python -m bench.plan_samples"), "rates": vars(found)}
        print(json.dumps(head), file=file, flush=True)
        for title in options.titles or SAMPLES:
            try:
                line = measure(SAMPLES[title], trace=title in options.trace)
                FamilySpec.from_config(SAMPLES[title].config)
            except Exception as error:  # the others are measured all the same
                line = {"error": f"{type(error).__name__}: {error}"}
                import traceback

                traceback.print_exc()
            print(json.dumps({"title": title, **line}), file=file, flush=True)
            say(f"{time.monotonic() - started:6.1f} s  {title}: {_short(line)}")
    return 0


def _short(line: dict[str, Any]) -> str:
    if "error" in line:
        return str(line["error"])
    names = [name for name in ("base", "session", "before_passes", "trained") if name in line]
    held = [f"{name} {line[name]['most_reserved']:.2f}" for name in names]
    passes = [f"{each['width']}: {each['seconds']:.4f}" for each in line["passes"]]
    steps = [f"{statistics.median(each['seconds'][1:]):.4f}" for each in line["steps"]]
    return "; ".join([*held, *passes, f"steps {' '.join(steps)}"])


if __name__ == "__main__":
    raise SystemExit(main())
