"""From a loaded model and a decoding plan to an engine. The engine's own modules, and torch, are imported late."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fast_ft.data.encoding import Encoder
from fast_ft.generate.engine.block_manager import PAGE, pages_for
from fast_ft.generate.engine.scheduler import shapes
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe import schema

if TYPE_CHECKING:
    from fast_ft.generate.engine.fused_model import FusedModel
    from fast_ft.generate.engine.llm_engine import LLMEngine


def make_engine(
    loaded: LoadedModel, encoder: Encoder, section: schema.Generate, plan: DecodePlan, longest: int
) -> LLMEngine:
    """Return an engine over the loaded model, for sequences of at most `longest` tokens, prompt and answer together."""
    import torch

    from fast_ft.generate.engine.fused_model import FusedModel

    model = FusedModel(loaded.model, dequantise=plan.dequantise, step_rows=shapes(plan.slots, planes=True))
    if loaded.device == "cuda":
        torch.cuda.empty_cache()  # what was put side by side leaves holes
    return engine_over(model, encoder, section, plan, longest)


def engine_over(
    model: FusedModel, encoder: Encoder, section: schema.Generate, plan: DecodePlan, longest: int
) -> LLMEngine:
    """Return an engine as `make_engine` does, over weights that are ready."""
    from fast_ft.generate.engine.kv_cache import KVCache
    from fast_ft.generate.engine.llm_engine import LLMEngine
    from fast_ft.generate.engine.model_runner import EngineConfig
    from fast_ft.generate.engine.sampler import Sampler

    enough = plan.slots * pages_for(longest) if plan.cache_tokens is None else plan.cache_tokens // PAGE
    cache = KVCache(model, max(pages_for(longest), enough))
    config = EngineConfig(slots=plan.slots, longest=longest, end_ids=encoder.end_ids, pad_id=encoder.pad_id)
    return LLMEngine(model, cache, Sampler.of(section), config)
