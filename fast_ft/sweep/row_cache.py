"""Prepared rows that are kept from one trial to the next."""

from __future__ import annotations

from dataclasses import replace

from fast_ft.data import contamination, curriculum
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe


class RowCache:
    """Rows that are tokenised once: trials that differ in stages, training or decoding share them."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._prepared: PreparedData | None = None

    def prepared(self, recipe: Recipe) -> PreparedData:
        """Return what `prepare` returns, made from the rows of the trial before where these are the same."""
        needed = curriculum.metrics_needed(recipe.curriculum)
        parts = [recipe.model, recipe.data, recipe.select, recipe.seed, recipe.rules, needed]
        key = repr(parts)
        if key != self._key or self._prepared is None:
            self._prepared, self._key = prepare(recipe), key
            return self._prepared
        limit = policy_ntu_hw5.max_train_rows(recipe)
        stages = curriculum.build_stages(recipe.curriculum, recipe.train, self._prepared.selection, limit)
        found = replace(self._prepared, stages=stages)
        return replace(found, leakage=contamination.certificate(found.examples, found.prompts))
