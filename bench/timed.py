"""An engine that times itself, the yardsticks, and what the memory's speed alone would allow. Used by bench.decode."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.clock import clock, peak_gib
from fast_ft.common import gpu
from fast_ft.generate.engine.block_manager import PAGE, pages_for
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache
from fast_ft.generate.engine.llm_engine import LLMEngine
from fast_ft.generate.engine.model_runner import EngineConfig
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.generate.engine.scheduler import BURST, Admission, Burst, Scheduler
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.hub.families import GIB, ModelShape
from fast_ft.plan.decode_pool import kv_bytes


class ForcedScheduler(Scheduler):
    """A scheduler that ends sequences after lengths of their own, which it does not know beforehand: `forced`."""

    forced: dict[Sequence, int]

    def is_finished(self, sequence: Sequence) -> bool:
        """Return whether the sequence has its forced length, or its limit."""
        return len(sequence.tokens) >= self.forced.get(sequence, sequence.limit)


class TimedEngine(LLMEngine):
    """An engine with clocks. `forced`: sequences with the number of tokens after which each ends."""

    def __init__(self, model: FusedModel, cache: KVCache, sampler: Sampler, config: EngineConfig) -> None:
        super().__init__(model, cache, sampler, config)
        plain = self.scheduler
        scheduler = ForcedScheduler(
            plain.blocks, plain.shapes, longest=plain.longest, end_ids=plain.end_ids, most_shared=plain.most_shared
        )
        self.forced: dict[Sequence, int] = {}
        scheduler.forced = self.forced
        self.scheduler = scheduler
        self.prefill_seconds = self.burst_seconds = 0.0
        self.steps = self.preempted = 0
        self.by_slots: dict[int, tuple[int, float]] = {}  #: the shape that ran: steps and seconds

    @property
    def capture_seconds(self) -> float:
        """Seconds of the first step of each shape, and of all captures."""
        return self.runner.graphs.watch.seconds().get("captures", 0.0)

    @property
    def kv_cache(self) -> str:
        """The kind of cache, as a recipe names it."""
        return "16bit" if self.runner.cache.scales is None else "8bit"

    def restart_clocks(self) -> None:
        """Forget what was timed and counted so far, captures apart."""
        self.prefill_seconds = self.burst_seconds = 0.0
        self.steps, self.preempted, self.by_slots = 0, 0, {}

    def graph_milliseconds(self, work: Callable[[], None], repeats: int = 20) -> float:
        """Return the ms of one replay of `work`, captured in a graph; on a CPU of one run."""
        import torch

        work()
        if self.runner.model.device.type != "cuda":
            started = time.perf_counter()
            work()
            return round((time.perf_counter() - started) * 1e3, 3)
        captured = self.runner.graphs.capture(work)
        assert captured is not None, "what cannot be captured is not timed"
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        captured[0].replay()
        begin.record()
        for _ in range(repeats):
            captured[0].replay()
        end.record()
        torch.cuda.synchronize()
        return round(begin.elapsed_time(end) / repeats, 3)

    def prefill(self, admission: Admission) -> None:
        """Prefill as LLMEngine does, timed."""
        started = time.perf_counter()
        self.preempted += sum(bool(each.tokens) for each in admission.sequences)
        super().prefill(admission)  # reads the new tokens, so the device is done
        self.prefill_seconds += time.perf_counter() - started

    def decode(self, burst: Burst) -> None:
        """Decode as LLMEngine does, timed."""
        started = time.perf_counter()
        super().decode(burst)
        spent = time.perf_counter() - started
        self.burst_seconds += spent
        self.steps += burst.steps
        count, before = self.by_slots.get(burst.slots, (0, 0.0))
        self.by_slots[burst.slots] = (count + burst.steps, before + spent)

    def step_milliseconds(self, length: int) -> dict[str, Any]:
        """Return ms a step (bursts of 8, the host's share included) with every slot at about `length` tokens."""
        burst = self._filled(length)
        self.decode(burst)  # captures
        times = []
        for _ in range(5):
            started = time.perf_counter()
            self.decode(burst)
            times.append((time.perf_counter() - started) / BURST * 1e3)
        times.sort()
        middle, fastest, slowest = (round(times[i], 3) for i in (2, 0, 4))
        found = {"ms_a_step": middle, "fastest": fastest, "slowest": slowest}
        return {"slots_filled": len(burst.sequences), "length": length, "captured": self.runner.graphs.works} | found

    def profile(self, length: int) -> str:
        """Return the kernels of one burst, those that take longest first."""
        import torch

        burst = self._filled(length)
        self.decode(burst)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.decode(burst)
        return profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70)

    def _filled(self, length: int) -> Burst:
        """Return a burst of as many sequences as there are slots and pages for, with whatever the cache holds."""
        blocks, config = self.scheduler.blocks, self.config
        blocks.clear()
        count = min(config.slots, blocks.pages // pages_for(length + 8 * BURST))
        live = [Sequence([1] * length, config.longest - length, key=index, tokens=[5]) for index in range(count)]
        for sequence in live:
            blocks.grow(sequence, length + 8 * BURST)
        return Burst(live, BURST, self.scheduler.shape_for(count))


def step_bytes(shape: ModelShape) -> int:
    """Return the bytes of weights that a step reads: all but the embeddings, of which it reads a row a slot."""
    return round(shape.weights_gib(load_in_4bit=True) * GIB) - shape.vocab_size * shape.hidden_size * 2


def timed_run(
    shape: ModelShape, pool: TimedEngine, rows: list[Sequence], refill: bool = True, shrinks: bool = True
) -> dict[str, Any]:
    """Run rows, all of them or in batches of the pool's slots. Batches that do not shrink keep their first shape."""
    groups = [rows] if refill else [rows[i : i + pool.config.slots] for i in range(0, len(rows), pool.config.slots)]

    def _work() -> None:
        for group in groups:
            list(pool.run(group, slots=None if shrinks else pool.scheduler.shape_for(len(group))))

    seconds = clock(_work)
    tokens = sum(min(len(row.tokens), pool.forced.get(row, len(row.tokens))) for row in rows)
    cells = sum(sum(range(len(row.prompt), len(row.prompt) + len(row.tokens))) for row in rows)
    return {
        "tokens": tokens, "seconds": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1),
        "slots": pool.config.slots, "cells": pool.scheduler.blocks.pages * PAGE, "steps": pool.steps,
        "prefill_seconds": round(pool.prefill_seconds, 4), "burst_seconds": round(pool.burst_seconds, 4),
        "capture_seconds": round(pool.capture_seconds, 4),
        "steps_by_slots": {slots: [count, round(spent, 4)] for slots, (count, spent) in pool.by_slots.items()},
        "set_aside": pool.preempted, "weight_bytes": step_bytes(shape), "cells_read": cells,
        "bytes_a_cell": kv_bytes(shape, pool.kv_cache), "kv_cache": pool.kv_cache,
        "planes": pool.runner.model.planes,
        "few_rows": pool.runner.model.few_rows,
        "captured": pool.runner.graphs.works, "graphs": pool.runner.graphs.count, "peak_gib": _peak(),
    }  # fmt: skip


def _peak() -> float:
    """GiB reserved at most since the last reset, with the context as it is now."""
    return peak_gib(gpu.context_gib())
