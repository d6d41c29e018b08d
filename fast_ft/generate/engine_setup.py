"""From a loaded model and a decoding plan to an engine. The engine's own modules, and torch, are imported late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from fast_ft.common.console import note
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.encoding import Encoder
from fast_ft.generate.engine.block_manager import PAGE, pages_for
from fast_ft.generate.engine.scheduler import BURST, shapes
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe import schema

if TYPE_CHECKING:
    from torch import Tensor

    from fast_ft.generate.engine.fused_model import FusedModel
    from fast_ft.generate.engine.library_engine import LibraryEngine
    from fast_ft.generate.engine.llm_engine import LLMEngine
    from fast_ft.generate.engine.model_runner import EngineConfig


class Engine(Protocol):
    """What answers many sequences: our LLMEngine, or LibraryEngine on the general way."""

    config: EngineConfig
    watch: Stopwatch
    products: str  #: how 4-bit weights are multiplied, as a plan has it; "" where there is nothing to choose

    @property
    def logits(self) -> Tensor:
        """The logits from which the newest tokens were chosen, one row for each live sequence."""

    @property
    def steps_made(self) -> int:
        """The steps that were decoded."""

    @property
    def cache_tokens(self) -> int:
        """The tokens that the cache holds at most."""

    def run(
        self,
        sequences: list[Sequence],
        *,
        burst: int = BURST,
        slots: int | None = None,
        on_look: Callable[[list[Sequence]], None] | None = None,
    ) -> Iterator[Sequence]:
        """Yield each sequence when its answer has ended."""


def make_engine(
    loaded: LoadedModel, encoder: Encoder, section: schema.Generate, plan: DecodePlan, longest: int
) -> Engine:
    """Return an engine over the loaded model, for sequences of at most `longest` tokens, prompt and answer together."""
    import torch

    from fast_ft.generate.engine.fused_model import FusedModel
    from fast_ft.generate.engine.product_choice import choose

    if goes_general_way(loaded):
        if plan.kv_cache != "16bit":
            note(f"note: generate.kv_cache: {plan.kv_cache} has no effect: transformers' generate keeps its own cache")
        return library_engine(loaded, encoder, section, plan.slots, longest)
    rows = shapes(plan.slots, planes=True)
    model = FusedModel(loaded.model, dequantise=plan.dequantise, step_rows=rows, kv_bits=plan.kv_bits)
    products = choose(model, rows, plan.products)
    if loaded.device == "cuda":
        torch.cuda.empty_cache()  # what was put side by side leaves holes
    engine = engine_over(model, encoder, section, plan, longest)
    engine.products = products
    return engine


def goes_general_way(loaded: LoadedModel) -> bool:
    """Return whether transformers' `generate` answers for a model; its loaded blocks are looked at, too."""
    from fast_ft.generate.engine.fused_model import unknown

    if loaded.general is None and (problem := unknown(loaded.model)):
        loaded.general = problem
        note(f"note: {problem}: transformers' generate answers, more slowly")
    return loaded.general is not None


def library_engine(
    loaded: LoadedModel, encoder: Encoder, section: schema.Generate, slots: int, longest: int
) -> LibraryEngine:
    """Return an engine by transformers' own `generate`, for `slots` sequences at a time."""
    from fast_ft.generate.engine.library_engine import LibraryEngine
    from fast_ft.generate.engine.model_runner import EngineConfig
    from fast_ft.generate.engine.sampler import Sampler

    config = EngineConfig(slots=slots, longest=longest, end_ids=encoder.end_ids, pad_id=encoder.pad_id)
    return LibraryEngine(loaded, Sampler.of(section), config)


def engine_over(
    model: FusedModel, encoder: Encoder, section: schema.Generate, plan: DecodePlan, longest: int
) -> LLMEngine:
    """Return an engine as `make_engine` does, over weights that are ready."""
    from fast_ft.generate.engine.kv_cache import KVCache
    from fast_ft.generate.engine.llm_engine import LLMEngine
    from fast_ft.generate.engine.model_runner import EngineConfig
    from fast_ft.generate.engine.sampler import Sampler

    enough = plan.slots * pages_for(longest) if plan.cache_tokens is None else plan.cache_tokens // PAGE
    cache = KVCache(model, max(pages_for(longest), enough), bits=plan.kv_bits)
    config = EngineConfig(slots=plan.slots, longest=longest, end_ids=encoder.end_ids, pad_id=encoder.pad_id)
    return LLMEngine(model, cache, Sampler.of(section), config)
