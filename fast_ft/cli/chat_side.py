"""One of the two models that answer in a talk, and the engine that it answers by."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from fast_ft.common import out_of_memory
from fast_ft.data.encoding import Encoder
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine_setup import Engine, engine_over, goes_general_way, library_engine
from fast_ft.pipeline.adapter_loading import Ready
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe.schema import Generate


class Side:
    """One of the two models, what was said to it, and its engine.

    The engine grows with the talk: a long context's whole cache would not fit.
    """

    def __init__(self, ready: Ready, encoder: Encoder, context: int, *, base: bool) -> None:
        self.said: list[dict[str, str]] = []
        self._ready, self._encoder, self._context, self._is_base = ready, encoder, context, base
        self._section: Generate | None = None  # of the engine that is there
        self._engine: Engine | None = None
        self._longest = 0  # tokens for which it has room
        self._model: FusedModel | None = None
        self._plan = DecodePlan(slots=1, dequantise=ready.plan.dequantise, kv_cache=ready.plan.kv_cache)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Return what switches the adapter off meanwhile, for the base model."""
        return self._ready.loaded.model.disable_adapter() if self._is_base else contextlib.nullcontext()

    def engine(self, tokens: int, section: Generate) -> Engine:
        """Return an engine for `tokens` tokens, at most the context's: the former one, or one twice as long."""
        if self._engine is None or self._longest < tokens or section != self._section:
            if self._longest < tokens:
                self._longest = min(self._context, max(tokens, 2 * self._longest))
            self._engine = None  # its memory is free for the next one
            self._engine, self._section = self._new_engine(self._longest, section), section
        return self._engine

    def makes_room(self, tokens: int) -> bool:
        """Give up the engine, and what an answer does not need that is to have `tokens` tokens, prompt included.

        That is room for more tokens; then weights that were dequantised to 16 bits. Return False where neither is left.
        """
        has_spare, self._longest, self._engine = self._longest > tokens, 0, None
        gives_weights = self._plan.dequantise and not has_spare
        if gives_weights:
            self._plan, self._model = replace(self._plan, dequantise=False), None
        out_of_memory.release()
        return has_spare or gives_weights

    def _new_engine(self, longest: int, section: Generate) -> Engine:
        loaded = self._ready.loaded
        if goes_general_way(loaded):
            return library_engine(loaded, self._encoder, section, 1, self._context)
        plan = self._plan
        if self._model is None:
            self._model = FusedModel(loaded.model, dequantise=plan.dequantise, step_rows=(1,), kv_bits=plan.kv_bits)
        return engine_over(self._model, self._encoder, section, plan, longest)
