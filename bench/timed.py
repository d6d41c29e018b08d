"""A pool that times itself, the yardsticks, and what the memory's speed alone would allow. Used by bench.decode."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.clock import clock
from fast_ft.generate.engine.kv_cache import pages_for
from fast_ft.generate.engine.prefill import Row
from fast_ft.generate.engine.scheduler import BURST, Pool
from fast_ft.hub.families import GIB, ModelShape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class TimedPool(Pool):
    """A pool with clocks. `forced`: rows that end after so many tokens, which the pool does not know beforehand."""

    def __init__(self, *given: Any, **values: Any) -> None:
        super().__init__(*given, **values)
        self.forced: dict[Row, int] = {}
        self.prefill_seconds = self.burst_seconds = 0.0
        self.capture_seconds = 0.0  #: of burst_seconds: the first step of a shape, and its capture
        self.steps = self.set_aside = 0
        self.by_slots: dict[int, tuple[int, float]] = {}  #: the shape that ran: steps and seconds

    def _is_over(self, row: Row) -> bool:
        return len(row.tokens) >= self.forced.get(row, row.limit)

    def _prefill(self, rows: list[Row]) -> None:
        started = time.perf_counter()
        self.set_aside += sum(bool(row.tokens) for row in rows)
        super()._prefill(rows)  # reads the new tokens, so the device is done
        self.prefill_seconds += time.perf_counter() - started

    def _burst(self, live: list[Row], steps: int, shape: int | None) -> None:
        started = time.perf_counter()
        super()._burst(live, steps, shape)
        spent = time.perf_counter() - started
        self.burst_seconds += spent
        self.steps += steps
        slots = shape or self.shape_for(len(live))
        count, before = self.by_slots.get(slots, (0, 0.0))
        self.by_slots[slots] = (count + steps, before + spent)

    def _steps(self, slots: int, columns: int, count: int) -> None:
        if self.graphs.works and (slots, columns) not in self._captured:
            self.capture_seconds += clock(lambda: super(TimedPool, self)._steps(slots, columns, 1))
            count -= 1
        super()._steps(slots, columns, count)

    def step_milliseconds(self, length: int) -> dict[str, Any]:
        """Return ms a step (bursts of 8, the host's share included) with every slot at about `length` tokens."""
        live = self._filled(length)
        self._burst(live, BURST, None)  # captures
        times = []
        for _ in range(5):
            started = time.perf_counter()
            self._burst(live, BURST, None)
            times.append((time.perf_counter() - started) / BURST * 1e3)
        times.sort()
        middle, fastest, slowest = (round(times[i], 3) for i in (2, 0, 4))
        found = {"ms_a_step": middle, "fastest": fastest, "slowest": slowest}
        return {"slots_filled": len(live), "length": length, "captured": self.graphs.works} | found

    def profile(self, length: int) -> str:
        """Return the kernels of one burst, those that take longest first."""
        import torch

        live = self._filled(length)
        self._burst(live, BURST, None)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self._burst(live, BURST, None)
        return profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70)

    def _filled(self, length: int) -> list[Row]:
        """As many rows as there are slots and pages for, with whatever the cache holds."""
        self.cache.clear()
        count = min(self.slots, self.cache.pages // pages_for(length + 8 * BURST))
        live = [Row([1] * length, self.longest - length, key=index, tokens=[5]) for index in range(count)]
        for row in live:
            self._grow(row, length + 8 * BURST)
        return live


def step_bytes(shape: ModelShape) -> int:
    """Return the bytes of weights that a step reads: all but the embeddings, of which it reads a row a slot."""
    return round(shape.weights_gib(load_in_4bit=True) * GIB) - shape.vocab_size * shape.hidden_size * 2


def plain_generate(model: PreTrainedModel, ids: Sequence[Sequence[int]], limit: int, **values: Any) -> Tensor:
    """Answer a left-padded batch with transformers' generate, sampling, without an end: the yardstick."""
    import torch
    import transformers

    model.generation_config = transformers.GenerationConfig()
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=30, top_p=0.9, max_new_tokens=limit, pad_token_id=0, use_cache=True,
        **values,
    )  # fmt: skip
    with torch.inference_mode():
        output = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)
    assert output.shape == (len(ids), width + limit), "the yardstick must do the same work"
    return output


def unsloth_one_by_one(job: dict[str, Any]) -> dict[str, Any]:
    """The homework's way: Unsloth's for_inference, one prompt at a time."""
    from fast_ft.common import gpu
    from fast_ft.models.loaders import choose
    from fast_ft.recipe import schema

    model = schema.Model(name_or_path=job["base"], dtype=job["dtype"])
    maker = choose.make_backend(model, schema.Lora(), seed=1, name="unsloth")
    import torch

    if job["cap"]:
        gpu.cap_gpu_gib(job["cap"])
    loaded = maker.for_generation(Path(job["adapter"]))
    for ids in (min(job["ids"], key=len), max(job["ids"], key=len)):
        plain_generate(loaded.model, [ids], 8)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for ids in job["ids"]:
        plain_generate(loaded.model, [ids], job["limit"])
    torch.cuda.synchronize()
    seconds, tokens = time.perf_counter() - started, len(job["ids"]) * job["limit"]
    return {"prompts": len(job["ids"]), "tokens": tokens, "seconds": round(seconds, 2),
            "tokens_per_s": round(tokens / seconds, 2)}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(unsloth_one_by_one(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
