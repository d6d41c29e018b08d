"""What bench.decode measures: the model with its adapter, within its limits, and pools over it."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.clock import empty_cache, out_of_memory_is_a_result, say
from bench.emulation import measured_rates
from bench.sm_limit import limit_sms, replayed_tflops
from bench.timed import TimedEngine
from fast_ft.common import environment, gpu, gpu_rates
from fast_ft.data import dataset
from fast_ft.data.encoding import Encoder
from fast_ft.data.shared_start import shared_start
from fast_ft.generate.engine import sampler as sampling
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache
from fast_ft.generate.engine.model_runner import EngineConfig
from fast_ft.generate.engine.scheduler import shapes
from fast_ft.hub.families import ModelShape
from fast_ft.models import lora_files
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import Loader
from fast_ft.models.random_base import random_model
from fast_ft.plan.decode_pool import Answers, PoolMemory, has_tiles, settle_pool
from fast_ft.recipe import schema


class Subject:
    """The prompts' tokens and, loaded at first use, the model. `keep` takes what is found out about limits."""

    def __init__(self, options: argparse.Namespace, keep: Callable[[str, dict[str, Any]], None]) -> None:
        self.options, self._keep = options, keep
        self.encoder = Encoder(Path(options.tokenizer or options.base))
        prompts = dataset.load_prompts(options.prompts)[0][: options.take]
        self.ids = [self.encoder.prompt_ids(prompt.messages) for prompt in prompts]
        self.shape = ModelShape.from_config(json.loads((Path(options.base) / "config.json").read_text()))
        self.slots = [None if each == "auto" else int(each) for each in options.slots.split(",")]
        self.workspaces = [int(each) for each in options.workspace.split(",")]
        self.context = 0.0
        self.room = 1.0  #: of the planned cache: less after running out of memory
        self._loaded: Any = None

    @property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        import torch

        if self._loaded is None:
            started = time.monotonic()
            environment.expand_segments()
            cap = self.options.cap
            self.context = gpu.cap_gpu_gib(cap) if cap else gpu.context_gib()
            if torch.cuda.is_available():
                self._keep("rates", measured_rates())
            self._loaded = self._load()
            if self.options.sms:
                self._limit_sms(self.options.sms)
            segments = "expandable" if gpu.segments_expand() else "fixed"
            seconds = time.monotonic() - started
            say(f"loaded in {seconds:.1f} s; {self.context:.2f} GiB for the context, {segments} segments")
        return self._loaded.model

    def free(self) -> None:
        """Give the model's memory back; it is loaded again where it is wanted again."""
        if self._loaded is not None:
            self._loaded.free()
            self._loaded = None

    def _load(self) -> Any:
        if self.options.random:
            config = json.loads((Path(self.options.base) / "config.json").read_text())
            return SimpleNamespace(model=random_model(config, self.options.dtype), free=lambda: None)
        section = schema.Model(name_or_path=self.options.base, dtype=self.options.dtype)
        maker = choose.make_loader(section, schema.Lora(), seed=1, name="peft")
        if self.options.adapter is not None:
            return maker.for_generation(self.options.adapter)
        self.options.adapter = Path(tempfile.mkdtemp()) / "adapter"
        self.options.adapter.mkdir()
        return _random_adapter(maker, self.options.adapter)

    def _limit_sms(self, sms: int) -> None:
        import torch

        found: dict[str, Any] = {"sms": sms, "whole_card_tflops": gpu_rates.matmul_tflops()}
        found["sms_of_card"] = torch.cuda.get_device_properties(0).multi_processor_count
        self._kept = limit_sms(sms)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        found["launched_tflops"], found["replayed_tflops"] = replayed_tflops()
        self._keep("sm_limit", found | {"sms_got": self._kept[2]})

    def pool(
        self, slots: int | None, new_tokens: int, workspace: int, *, greedy: bool = False, kv_cache: str = "16bit"
    ) -> TimedEngine:
        """A pool of the plan's shape, or of `slots`."""
        model, started = self.model, time.monotonic()
        fixed_gib = self.shape.weights_gib(load_in_4bit=True) + self.context
        tiles = self.options.sms is not None or has_tiles(gpu.capability() or (0, 0))  # few SMs stand for a T4
        memory = PoolMemory(fixed_gib, self.options.cap or 100.0, load_in_4bit=True, tiles=tiles)
        shared = shared_start({*map(tuple, self.ids)}, self.options.prefill)
        answers = Answers([len(row) for row in self.ids], new_tokens, shared_tokens=shared, kv_cache=kv_cache)
        plan = settle_pool(self.shape, answers, slots, memory)
        cells = round((self.options.cells or plan.cache_tokens or 0) * self.room)
        fused = FusedModel(
            model, dequantise=workspace == 0, workspace_mib=workspace or 1, kv_bits=plan.kv_bits,
            step_rows=shapes(plan.slots, planes=True),
        )  # fmt: skip
        empty_cache()
        cache = KVCache(fused, cells // PAGE, bits=plan.kv_bits)
        sampler = sampling.Sampler(not greedy, temperature=0.7, top_k=30, top_p=0.9)
        config = EngineConfig(plan.slots, max(map(len, self.ids)) + new_tokens, (), 0, self.options.prefill)
        pool = TimedEngine(fused, cache, sampler, config)
        say(
            f"pool: {plan.slots} slots, {cells} cells, {plan.gib:.1f} GiB predicted, workspace {workspace} MiB, "
            f"{fused.ops.__name__}, planes {fused.planes}, made in {time.monotonic() - started:.1f} s"
        )
        return pool

    def with_room(self, work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
        """Do some work; out of memory makes the cache of all pools an eighth smaller, as in a run, at most thrice."""
        for _ in range(4):
            result = out_of_memory_is_a_result(work, *given)
            empty_cache()
            if not result.get("out_of_memory"):
                break
            self.room *= 7 / 8
            say(f"out of memory: from here on {self.room:.2f} of the planned cache")
        return result


def _random_adapter(maker: Loader, folder: Path) -> Any:
    """Return the base with an adapter of random B matrices, saved to `folder` too."""
    import torch

    loaded = maker.for_training()
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.002)
    lora_files.save(loaded.model, folder, "random", "random")
    loaded.model.eval().requires_grad_(False)
    return loaded
