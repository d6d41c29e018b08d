"""python -m bench.decode --base DIR --prompts FILE [--only fixed,plain,...]: decoding, one JSON line a measurement.

With --results FILE the raw samples are kept there; `python -m bench --adopt FILE` takes the figures out of them.

    steps    one captured step, in ms, at several pool sizes and ways with 4-bit weights; --profile: its kernels
    check    greedy answers, captured and twice; teacher-forced through the model's own forward pass
    fixed    every prompt, --limit new tokens each: prefill, capture and all
    plain    transformers' generate on one batch of each size
    mixed    answers as long as Alpaca's long ones (mean 250, up to 1,024): refill, and the pool in fixed batches
    unsloth  Unsloth one by one on every tenth prompt, in a process of its own

The adapter is r = 16 on all linear layers with random B unless --adapter names one. No answer ends at EOS: all ways
do the same work. Memory is capped at --cap GiB, the CUDA context included. With --sms the measurements run on so many
of the card's SMs, without flash and cuDNN attention: a T4-class emulation, not a T4.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.clock import clock, empty_cache, out_of_memory_is_a_result, peak_gib, reset_peak, say
from bench.decode_figures import floor_share
from bench.emulation import LABEL, context_gib
from bench.random_base import random_model
from bench.sm_limit import limit_sms, replayed_tflops
from bench.timed import TimedPool, plain_generate, step_bytes
from fast_ft import adapter_file, backend, data, environment, recipe
from fast_ft.atomic import write_json
from fast_ft.cost import CONTEXT_GIB
from fast_ft.decode import sampling
from fast_ft.decode.cache import PAGE, Cache
from fast_ft.decode.fused import Fused
from fast_ft.decode.prefill import Row
from fast_ft.plan_pool import settle_pool
from fast_ft.shape import GIB, ModelShape
from fast_ft.template import Encoder

ALL = ("steps", "check", "fixed", "plain", "mixed", "unsloth")
NO_EOS = -1
LONGEST = 1024


def main() -> int:
    """Run the measurements asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--base", required=True, help="a Llama-like base model's folder")
    parser.add_argument("--prompts", required=True, help="a file of prompts, in any layout")
    parser.add_argument("--random", action="store_true", help="draw the weights; of the base config.json and tokenizer")
    parser.add_argument("--adapter", type=Path, help="an adapter's folder; default: a random one")
    parser.add_argument("--only", default="steps,check,fixed,plain,mixed", help="of: " + ",".join(ALL))
    parser.add_argument("--limit", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--take", type=int, default=150, help="the first so many prompts")
    parser.add_argument("--cap", type=float, default=14.7, help="GiB, the CUDA context included; 0: no cap")
    parser.add_argument("--slots", default="auto", help="pool sizes for fixed and steps, as 75,150; auto: the plan's")
    parser.add_argument("--cells", type=int, help="tokens in the cache; default: the plan's for these slots")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of prompts in one pass")
    parser.add_argument("--workspace", default="96", help="MiB for dequantised weights: 0 is 16-bit weights throughout")
    parser.add_argument("--batches", default="16,25,32,50", help="batch sizes for plain")
    parser.add_argument("--lengths", type=Path, help="a file of rows whose responses give the lengths for mixed")
    parser.add_argument("--sms", type=int, help="use so many of the card's SMs; 8 of an H200's are a T4's class")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--repeat", type=int, default=3, help="runs of fixed, each with a pool of its own")
    parser.add_argument("--results", type=Path, help="a JSON for the raw samples")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for name in options.only.split(","):
        if name not in ALL:
            parser.error(f"--only: {name!r} is none of {', '.join(ALL)}")
    bench = Bench(options)
    for name in options.only.split(","):
        for result in getattr(bench, name)():
            bench.keep(name, result)
    return 0


class Bench:
    """The model, loaded at first use, and the measurements, each a generator of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.encoder = Encoder(Path(options.base))
        prompts = data.load_prompts(options.prompts)[0][: options.take]
        self.ids = [self.encoder.prompt_ids(prompt.messages) for prompt in prompts]
        self.shape = ModelShape.from_config(json.loads((Path(options.base) / "config.json").read_text()))
        self.context = 0.0
        self._loaded: Any = None
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        self.result: dict[str, Any] = {
            "kind": "decode", "command": shlex.join(["python", "-m", "bench.decode", *sys.argv[1:]]),
            "label": LABEL if options.sms else None, "environment": environment.describe(),
            "settings": settings | {"prompt_tokens": [len(row) for row in self.ids]}, "measurements": [],
        }  # fmt: skip

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Print a measurement, and write all so far."""
        print(json.dumps({"name": name, **result}), flush=True)
        self.result["measurements"].append({"name": name, **result})
        if self.options.results:
            write_json(self.options.results, self.result)

    @property
    def model_section(self) -> recipe.Model:
        return recipe.Model(name_or_path=self.options.base, dtype=self.options.dtype)

    @property
    def loaded(self) -> Any:
        if self._loaded is None:
            import torch

            self._limit_memory()
            started = time.monotonic()
            self._loaded = self._load()
            if self.options.sms:
                self.kept = limit_sms(self.options.sms)
                torch.backends.cuda.enable_flash_sdp(False)
                torch.backends.cuda.enable_cudnn_sdp(False)
                launched, replayed = replayed_tflops()
                limit = {"sms": self.options.sms, "launched_tflops": launched, "replayed_tflops": replayed}
                self.keep("sm_limit", limit)
            say(f"loaded in {time.monotonic() - started:.1f} s; context {self.context:.2f} GiB")
        return self._loaded

    def _load(self) -> Any:
        if self.options.random:
            config = json.loads((Path(self.options.base) / "config.json").read_text())
            model = random_model(config, self.options.dtype)
            return SimpleNamespace(model=model, free=lambda: None)
        maker = backend.make_backend(self.model_section, recipe.Lora(), seed=1, name="peft")
        if self.options.adapter is not None:
            return maker.for_generation(self.options.adapter)
        self.options.adapter = Path(tempfile.mkdtemp()) / "adapter"
        self.options.adapter.mkdir()
        return random_adapter(maker, self.options.adapter)

    def _limit_memory(self) -> None:
        import torch

        if not torch.cuda.is_available():
            return
        total = torch.cuda.mem_get_info()[1]
        self.context = max(context_gib(), CONTEXT_GIB)  # it grows by some libraries' handles
        if self.options.cap:
            torch.cuda.set_per_process_memory_fraction((self.options.cap - self.context) * GIB / total)

    def pool(self, slots: int | None, new_tokens: int, workspace: int, *, greedy: bool = False) -> TimedPool:
        """A pool of the plan's shape, or of `slots`."""
        started = time.monotonic()
        fixed = self.shape.weights_gib(load_in_4bit=True) + self.context
        slots, cells, _, predicted = settle_pool(
            self.shape, [len(row) for row in self.ids], candidates=1, max_new_tokens=new_tokens, wanted_slots=slots,
            load_in_4bit=True, fixed_gib=fixed, budget_gib=self.options.cap or 100.0,
        )  # fmt: skip
        cells = self.options.cells or cells
        fused = Fused(self.loaded.model, dequantise=workspace == 0, workspace_mib=workspace or 1)
        empty_cache()
        longest = max(map(len, self.ids)) + new_tokens
        cache = Cache(len(fused.layers), fused.kv_heads, fused.head_dim, cells // PAGE, fused.dtype, fused.device)
        sampler = sampling.Sampler(not greedy, temperature=0.7, top_k=30, top_p=0.9)
        pool = TimedPool(fused, cache, sampler, slots=slots, eos_id=NO_EOS, pad_id=0, longest=longest,
                         prefill_tokens=self.options.prefill)  # fmt: skip
        say(
            f"pool: {slots} slots, {cells} cells, {predicted:.1f} GiB predicted, workspace {workspace} MiB, "
            f"{fused.ops.__name__}, planes {fused.planes}, made in {time.monotonic() - started:.1f} s"
        )
        return pool

    def slots(self) -> list[int | None]:
        return [None if each == "auto" else int(each) for each in self.options.slots.split(",")]

    def workspaces(self) -> list[int]:
        return [int(each) for each in self.options.workspace.split(",")]

    def steps(self) -> Iterator[dict[str, Any]]:
        for workspace in self.workspaces():
            for slots in self.slots():
                pool = self.pool(slots, max(300, self.options.limit), workspace)
                yield {"workspace_mib": workspace, "slots": pool.slots, **pool.step_milliseconds(200)}
                if self.options.profile:
                    say(pool.profile(200))
                del pool
                empty_cache()

    def check(self) -> Iterator[dict[str, Any]]:
        from bench.agreement_decode import teacher_forced

        pool = self.pool(None, 64, self.workspaces()[0], greedy=True)
        made = []
        for _ in range(2):
            rows = [Row(row, 64) for row in self.ids[:24]]
            list(pool.run(rows))
            made.append([row.tokens for row in rows])
        yield {"same_twice": made[0] == made[1], "captured": pool.graphs.works, "graphs": pool.graphs.count,
               **teacher_forced(self.loaded.model, self.ids[:24], made[0])}  # fmt: skip

    def fixed(self) -> Iterator[dict[str, Any]]:
        for workspace in self.workspaces():
            for slots in self.slots():
                self.warm_up(slots, workspace)
                for _ in range(self.options.repeat):
                    reset_peak()
                    yield {"workspace_mib": workspace} | out_of_memory_is_a_result(self.fixed_once, slots, workspace)
                    empty_cache()

    def warm_up(self, slots: int | None, workspace: int) -> None:
        """Let kernels be compiled and libraries loaded, once in a process; no pool or graph of it is kept."""

        def once() -> dict[str, Any]:
            pool = self.pool(slots, self.options.limit, workspace)
            list(pool.run([Row(row, 2 + index % 3) for index, row in enumerate(self.ids)], burst=2))
            return {}

        out_of_memory_is_a_result(once)
        empty_cache()

    def fixed_once(self, slots: int | None, workspace: int) -> dict[str, Any]:
        pool = self.pool(slots, self.options.limit, workspace)
        return self.timed(pool, [Row(row, self.options.limit, key=index) for index, row in enumerate(self.ids)])

    def mixed(self) -> Iterator[dict[str, Any]]:
        lengths = self.lengths()
        for refill in (True, False):
            reset_peak()
            pool = self.pool(None, LONGEST, self.workspaces()[0])
            rows = [Row(row, LONGEST, key=index) for index, row in enumerate(self.ids)]
            pool.forced = dict(zip(rows, lengths, strict=True))
            yield {"refill": refill, "mean_length": sum(lengths) / len(lengths)} | self.timed(pool, rows, refill)
            del pool
            empty_cache()

    def lengths(self) -> list[int]:
        """Lengths of long Alpaca responses, scaled to a mean of 250; without a file a log-normal like them."""
        draw = random.Random(0)
        if self.options.lengths:
            pool = data.load_pool(recipe.Data(train=str(self.options.lengths)))
            counts = [len(self.encoder.response_ids([], each.response)) for each in pool.examples(range(len(pool)))]
            picked = [float(count) for count in draw.choices(counts, k=len(self.ids))]
        else:
            picked = [205 + draw.lognormvariate(4.4, 0.9) for _ in self.ids]
        scale = 250 * len(picked) / sum(picked)
        return [max(1, min(LONGEST, round(each * scale))) for each in picked]

    def timed(self, pool: TimedPool, rows: list[Row], refill: bool = True) -> dict[str, Any]:
        groups = [rows] if refill else [rows[i : i + pool.slots] for i in range(0, len(rows), pool.slots)]
        seconds = clock(lambda: [list(pool.run(group)) for group in groups])
        tokens = sum(min(len(row.tokens), pool.forced.get(row, len(row.tokens))) for row in rows)
        cells = sum(sum(range(len(row.prompt), len(row.prompt) + len(row.tokens))) for row in rows)
        found = {
            "tokens": tokens, "seconds": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1),
            "slots": pool.slots, "cells": pool.cache.pages * PAGE, "steps": pool.steps,
            "prefill_seconds": round(pool.prefill_seconds, 4), "burst_seconds": round(pool.burst_seconds, 4),
            "steps_by_slots": {slots: [count, round(spent, 4)] for slots, (count, spent) in pool.by_slots.items()},
            "set_aside": pool.set_aside, "weight_bytes": step_bytes(self.shape), "cells_read": cells,
            "bytes_a_cell": self.shape.kv_bytes, "planes": pool.fused.planes,
            "captured": pool.graphs.works, "graphs": pool.graphs.count, "peak_gib": _peak(),
        }  # fmt: skip
        return found | {"floor_share": round(floor_share(found), 3)}

    def plain(self) -> Iterator[dict[str, Any]]:
        model, by_length = self.loaded.model, sorted(self.ids, key=len)
        plain_generate(model, by_length[:2], 4)
        for size in map(int, self.options.batches.split(",")):
            reset_peak()
            batch = [by_length[i * len(by_length) // size] for i in range(min(size, len(by_length)))]
            yield {"batch": size} | out_of_memory_is_a_result(self.one_batch, model, batch)
            empty_cache()

    def one_batch(self, model: Any, batch: list[list[int]]) -> dict[str, Any]:
        seconds = clock(lambda: plain_generate(model, batch, self.options.limit))
        tokens = len(batch) * self.options.limit
        return {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1),
                "peak_gib": _peak()}  # fmt: skip

    def unsloth(self) -> Iterator[dict[str, Any]]:
        """In a new process, for importing Unsloth patches transformers; this one's memory is given back first."""
        if self.options.random:
            yield {"failed": "with --random there is no checkpoint that Unsloth could load"}
            return
        if self.options.adapter is None:
            _ = self.loaded
        if self._loaded is not None:
            self._loaded.free()
            self._loaded = None
        job = {"base": self.options.base, "adapter": str(self.options.adapter), "limit": self.options.limit,
               "dtype": self.options.dtype, "ids": self.ids[::10], "cap": self.options.cap}  # fmt: skip
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(job, file)
            file.flush()
            done = subprocess.run([sys.executable, "-m", "bench.timed", file.name], capture_output=True, text=True)
        last = done.stdout.strip().splitlines()[-1:] or ["{}"]
        yield json.loads(last[0]) if done.returncode == 0 else {"failed": done.stderr[-1500:]}


def _peak() -> float:
    """GiB reserved at most since the last reset, with the context as it is now."""
    import torch

    return peak_gib(context_gib()) if torch.cuda.is_available() else 0.0


def random_adapter(maker: backend.Backend, folder: Path) -> Any:
    """Return the base with an adapter of random B matrices, saved to `folder` too."""
    import torch

    loaded = maker.for_training()
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.002)
    adapter_file.save(loaded.model, folder, "random", "random")
    loaded.model.eval().requires_grad_(False)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
